"""docs/options.md lists every option of every command, as its help says it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import cloup

from converter.cli.commands import cli
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "options.md"
HEAD = """\
# Options

Written by `make pages` from the commands' own help; do not edit. [Command line](command-line.md) says how they go
together, and which other spellings are understood.
"""


def text() -> str:
    """The page as it should be."""
    commands = {"convert": cli, **{f"convert {name}": command for name, command in sorted(cli.commands.items())}}
    return HEAD + "".join(line for name, command in commands.items() for line in section(name, command))


def section(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name, terminal_width=100_000, max_content_width=100_000)
    arguments = " ".join(part for part in command.collect_usage_pieces(context) if part != "[OPTIONS]")
    yield f"\n## {name}\n\n`{f'{name} [OPTIONS] {arguments}'.strip()}`\n"
    yield f"\n{' '.join((command.help or '').split())}\n"
    assert isinstance(command, cloup.Command | cloup.Group)
    groups = [*command.option_groups, command.get_default_option_group(context)]
    for group in groups:
        shown = [option for option in group.options if not option.hidden]
        if shown:
            yield f"\n**{group.title}**{f': {group.help}' if group.help else ''}\n\n"
        for option in shown:
            record = option.get_help_record(context)
            assert record is not None
            says = " ".join(record[1].split()).replace("[", r"\[")  # no link
            yield f"- `{record[0]}`: {says}\n"


def test_the_page_has_every_option_of_every_command() -> None:
    found = set(re.findall(r"(?<=[` ])--[a-z][a-z0-9-]*", PAGE.read_text()))
    commands = [cli, *cli.commands.values()]

    options = [p for command in commands for p in command.params if isinstance(p, click.Option) and not p.hidden]
    assert {name for option in options for name in option.opts if name.startswith("--")} <= found


if __name__ == "__main__":
    PAGE.write_text(text())

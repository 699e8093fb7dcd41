"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import converter
from converter.cli.commands import cli
from converter.cli.main import main
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
_VARIES = re.compile(r"[\d.]+ s,|memory [\d.]+ [kMG]B")


def options(command: click.Command) -> set[str]:
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")}


def test_the_command_on_top_prints_what_is_printed_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.search(r"\$ convert (.*)\n((?:.*\n)*?)```", README)
    assert shown is not None
    for name in ("fixtures", "converter"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit) as end:
        main(shown[1].split())

    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert _VARIES.sub("…", shown[2]) == _VARIES.sub("…", printed)


def test_every_option_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"`(--[a-z-]+)|convert .*?(--[a-z-]+)", README))
    known = options(cli).union(*(options(command) for command in cli.commands.values())) | {"--help"}

    assert {name for pair in named for name in pair if name} <= known


def test_every_option_says_what_it_does() -> None:
    for command in (cli, *cli.commands.values()):
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


def test_every_public_name_is_documented() -> None:
    for name in converter.__all__:
        assert getattr(converter, name).__doc__, name

"""The help, as wide and as narrow terminals show it, and what shells complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from converter.cli.commands import cli
from tests.cli.conftest import Run
from tests.conftest import REPOSITORY
from tests.limits import HANG

COMMANDS = [[], *([name] for name in cli.commands)]
GROUPS = ["Input", "Output", "Quality", "Resources", "Behaviour"]


Help = Callable[[list[str], int], str]


@pytest.fixture
def help_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> Help:
    """The help of a command in a terminal of so many columns."""

    def help_of(command: list[str], columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        ran = run(*command, "--help")
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    return help_of


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_help_fits_the_terminal_and_shows_every_option(command: list[str], columns: int, help_of: Help) -> None:
    shown = help_of(command, columns)

    assert max(map(len, shown.splitlines())) <= columns
    assert "\\b" not in shown
    assert "\b" not in shown
    assert "…" not in re.sub(r"cuda:0, …", "", shown), "something is cut"
    of: click.Command = cli.commands[command[0]] if command else cli
    for parameter in of.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert all(name in shown for name in parameter.opts)


@pytest.mark.parametrize("columns", [40, 80])
def test_the_help_has_groups_in_the_order_of_the_work_and_three_examples(columns: int, help_of: Help) -> None:
    shown = help_of([], columns)

    assert re.findall(r"^(\w+):$", shown, re.MULTILINE) == [*GROUPS, "Commands", "Examples"]
    examples = re.findall(r"^ +(convert .+)$", shown.partition("Examples:")[2], re.MULTILINE)
    assert len(examples) == 3


@pytest.mark.parametrize("columns", [40, 80])
def test_what_each_command_is_for_is_said_in_full(columns: int, help_of: Help) -> None:
    shown = " ".join(help_of([], columns).split())

    for name, command in cli.commands.items():
        assert command.short_help
        assert f"{name} {command.short_help}" in shown


def test_convert_alone_shows_how_to_begin(run: Run) -> None:
    ran = run()

    assert (ran.code, ran.out) == (2, "")
    lines = ran.err.splitlines()
    assert lines[0] == "Usage: convert [OPTIONS] [COMMAND]"
    assert len(lines) < 24, "a screen"
    assert "  convert --base X --adapter Y --out Z" in lines
    assert lines[-1] == "convert --help lists every option."
    assert not [line for line in lines if line.lstrip().startswith("--")]


def test_the_version_is_told(run: Run) -> None:
    assert re.fullmatch(r"convert, version \d+\.\d+\.\d+\n", run("--version").out)


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_completes_both_names_of_the_program(shell: str, run: Run) -> None:
    ran = run("completion", shell)

    assert (ran.code, ran.err) == (0, "")
    for name in ("_convert_completion", "_nf4_convert_completion", "nf4-convert"):
        assert name in ran.out
    assert f"_CONVERT_COMPLETE={shell}_complete" in ran.out
    assert "_NF4_CONVERT_COMPLETE" not in ran.out


def completed(words: str) -> list[str]:
    """What the program answers a bash that asks for what comes next."""
    asked = {"_CONVERT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    ran = subprocess.run(
        [sys.executable, REPOSITORY / "cli.py"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    return ran.stdout.splitlines()


def test_commands_options_folders_files_and_formats_are_completed() -> None:
    assert completed("convert ver") == ["plain,verify"]
    assert completed("convert --merge-p") == ["plain,--merge-precision"]
    assert completed("convert --base mod") == ["dir,mod"]
    assert completed("convert verify ou") == ["dir,ou"]
    assert completed("convert batch jo") == ["file,jo"]
    assert completed("convert --card te") == ["file,te"]
    assert completed("convert --format fp8") == ["plain,fp8", "plain,fp8-block"]
    assert completed("convert completion z") == ["plain,zsh"]


def test_bash_takes_the_script_and_completes_by_it(tmp_path: Path) -> None:
    program = tmp_path / "nf4-convert"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{REPOSITORY / "cli.py"}" "$@"\n')
    program.chmod(0o755)
    asked = """
eval "$(nf4-convert completion bash)"
COMP_WORDS=(nf4-convert ver) COMP_CWORD=1
_nf4_convert_completion nf4-convert
echo "${COMPREPLY[@]}"
complete -p convert nf4-convert
"""

    ran = subprocess.run(
        ["bash", "--norc", "-c", asked],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )

    first, *registered = ran.stdout.splitlines()
    assert first == "verify"
    assert [line.rpartition(" ")[2] for line in registered] == ["convert", "nf4-convert"]

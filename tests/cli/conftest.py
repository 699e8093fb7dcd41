"""The command line, run in this process or in one of its own, and what it is given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from converter.cli.main import main
from tests.limits import HANG


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], signal_handlers: None) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1


def start(command: Sequence[object], **settings: Any) -> Ran:
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
        **settings,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)

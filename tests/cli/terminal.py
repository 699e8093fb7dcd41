"""A real terminal, by tmux: what a command shows in it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.limits import HANG


class Terminal:
    """A terminal of so many columns, in which one command runs."""

    def __init__(self, command: Sequence[object], columns: int, cwd: Path, environment: Mapping[str, str]) -> None:
        if shutil.which("tmux") is None:
            pytest.skip("tmux is not installed")
        self._name = f"converter-{uuid.uuid4().hex}"
        words = shlex.join(map(str, command))
        self._tmux(
            *("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", "50", "-c", str(cwd)),
            f"{words}; tmux -L {self._name} wait-for -S ended; exec sleep {HANG}",
            environment=environment,
        )

    def screen(self) -> str:
        """What is on the screen now, and above it."""
        return re.sub(r"[ \n]+\Z", "\n", self._tmux("capture-pane", "-p", "-S", "-"))

    def lines(self) -> str:
        """The same, with the lines in one piece that the terminal broke."""
        return re.sub(r" *\n", "\n", self._tmux("capture-pane", "-p", "-J", "-S", "-")).rstrip("\n") + "\n"

    def type(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def wait(self) -> str:
        """The screen when the command has ended."""
        self._tmux("wait-for", "ended")
        return self.screen()

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        ran = subprocess.run(
            ["tmux", "-L", self._name, *arguments],
            capture_output=True,
            text=True,
            timeout=HANG,
            check=True,
            env=None if environment is None else {**without_a_size(), **environment},
        )
        return ran.stdout

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def without_a_size() -> dict[str, str]:
    """Our environment without the size of our terminal, which pytest-xdist states: programs would believe that."""
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


def shown(arguments: Sequence[object], columns: int, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """What is on the screen of a terminal once the command line has ended."""
    environment = {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color", **(environment or {})}
    with Terminal([sys.executable, REPOSITORY / "cli.py", *arguments], columns, cwd, environment) as terminal:
        return terminal.wait()

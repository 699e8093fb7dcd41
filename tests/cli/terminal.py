"""A real terminal, by tmux: what the command line shows in it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest

from converter.cli.main import run
from tests.limits import HANG

AS_A_TERMINAL = {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}


class Terminal:
    """A terminal of so many columns, which shows what is written to `tty`."""

    def __init__(self, columns: int) -> None:
        if shutil.which("tmux") is None:
            pytest.skip("tmux is not installed")
        self._name = f"converter-{uuid.uuid4().hex}"
        self._tmux(
            *("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", "50", f"exec sleep {HANG}"),
            environment={**without_a_size(), **AS_A_TERMINAL},
        )

    @property
    def tty(self) -> Path:
        return Path(self._tmux("display-message", "-p", "#{pane_tty}").strip())

    def screen(self) -> str:
        """What is on the screen now, and above it."""
        return re.sub(r"[ \n]+\Z", "\n", self._tmux("capture-pane", "-p", "-S", "-"))

    def lines(self) -> str:
        """The same, with the lines in one piece that the terminal broke."""
        return re.sub(r" *\n", "\n", self._tmux("capture-pane", "-p", "-J", "-S", "-")).rstrip("\n") + "\n"

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        command = ["tmux", "-L", self._name, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True, env=environment)
        return ran.stdout

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def without_a_size() -> dict[str, str]:
    """Our environment without the size of our terminal, which pytest-xdist states: programs would believe that."""
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


def shown(
    arguments: Sequence[object],
    columns: int,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    *,
    raw: bool = False,
) -> str:
    """What is on the screen of a terminal once the command line, in this process, has ended; if not `raw`, with the
    lines in one piece that the terminal broke."""
    with Terminal(columns) as terminal:
        descriptor = os.open(terminal.tty, os.O_RDWR | os.O_NOCTTY)
        try:
            run_here(arguments, cwd, {**AS_A_TERMINAL, **(environment or {})}, (descriptor, descriptor))
        finally:
            os.close(descriptor)
        return terminal.screen() if raw else terminal.lines()


def run_here(arguments: Sequence[object], cwd: Path, environment: Mapping[str, str], streams: tuple[int, int]) -> int:
    """The exit code of the command line, run in this process: in a folder, with these variables, and with two
    descriptors as stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = [os.dup(number) for number in (1, 2)]
    with mock.patch.dict(os.environ, {**without_a_size(), **environment}, clear=True), contextlib.chdir(cwd):
        try:
            for number, descriptor in zip((1, 2), streams, strict=True):
                os.dup2(descriptor, number)
            out, err = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115  (below)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = run([str(word) for word in arguments])
            for file in (out, err):
                with contextlib.suppress(OSError):  # as `leave` does
                    file.close()
            return code
        finally:
            for number, descriptor in zip((1, 2), before, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

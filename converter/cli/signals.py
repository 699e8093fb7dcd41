"""SIGINT and SIGTERM: the first asks for an end, the second is one."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_PATIENCE = 5
"""Seconds that a process has to put things in order at the second signal: it takes one, a cluster of its own a few."""


class Signalled(BaseException):
    """A signal that ends the process at once; unwinds as an interrupt from the keyboard does."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum
        super().__init__(f"{signal.Signals(signum).name}: nothing was written to OUT")

    def now(self) -> NoReturn:
        """End the process, whatever is under way; the next run takes what is durable."""
        os.write(sys.stderr.fileno(), f"error: {self}\n".encode())
        os._exit(self.exit_code)


class Signals:
    """The first signal ends a conversion between two tiles, if the conversion has begun to ask for signals. Any other
    signal ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self.received: int | None = None
        for signum in (signal.SIGINT, signal.SIGTERM):
            # A shell starts what it puts in the background so that Ctrl-C, meant for others, doesn't end it.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._receive)

    def __call__(self) -> int | None:
        """The signal that was received, if any."""
        self._asked = True
        return self.received

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        first, self.received = self.received is None, signum
        if not self._asked or not first:
            end = Signalled(signum)
            # Threads are waited for on the way out, and a disk may take its time, or never answer.
            signal.signal(signal.SIGALRM, lambda *_: end.now())
            signal.alarm(_PATIENCE)
            raise end  # a library that is being imported may swallow it; then whoever asks next hears of it

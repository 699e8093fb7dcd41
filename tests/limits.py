"""Bounds that hold on a busy machine: the processor's seconds, not the clock's; and bounds on the size of files."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANG = 300
"""Seconds of the clock on the wall after which something counts as hanging: many times what anything here takes."""


def cpu_seconds() -> float:
    """That this process and those that it has waited for have used so far: others' load makes it little longer."""
    return sum(os.times()[:4])


@contextmanager
def cpu_below(seconds: float) -> Iterator[None]:
    """What is done takes less of the processor's time."""
    before = cpu_seconds()
    yield
    assert cpu_seconds() - before < seconds


@contextmanager
def no_hang() -> Iterator[None]:
    """What is done ends."""

    def hangs(_signum: int, _frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to make this process's files longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

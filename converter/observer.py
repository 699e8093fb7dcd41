"""Who is told how far a conversion is, and asked whether to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from converter.errors import Interrupted


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    stage: str
    """planned, fetching, checking, sampling, converting or sealing"""
    done: int
    """Bytes of the base."""
    total: int
    name: str
    """The tensor, or the file that is fetched; of a plan, what to know before it begins."""


@dataclass(frozen=True)
class Observer:
    """Hears of the progress, and is asked before each tile whether to stop."""

    progress: Callable[[Progress], None] = lambda _: None
    stop: Callable[[], int | None] = lambda: None
    """Gives the number of a signal once the conversion is to end."""

    def stop_if_asked(self, under_way: str) -> None:
        """Raise `Interrupted` if the work is to end; `under_way` is what its message says after "while"."""
        if (signum := self.stop()) is not None:
            raise Interrupted(signum, f"{signal.Signals(signum).name} while {under_way}")

    def tell(self, stage: str, done: int, total: int, name: str) -> None:
        self.progress(Progress(stage, done, total, name))

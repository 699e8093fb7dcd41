"""Who is told what a batch does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converter.batch.forecast import Forecast
from converter.batch.outcomes import Outcome
from converter.observer import Observer


@dataclass(frozen=True)
class PassBegun:
    """A pass over a base that begins."""

    base: str
    outputs: int
    """That are made together."""
    memory: int
    """Bytes above the imports that are predicted, at most."""


@dataclass(frozen=True)
class BatchObserver(Observer):
    """Is told of a batch's progress, of each job's outcome as soon as it is known, and asked whether to stop.

    All of it happens in the thread that runs the batch, so whatever a terminal shows can be changed there.
    """

    planned: Callable[[int, int], None] = lambda *_: None
    """So many jobs of so many are planned or refused."""
    begun: Callable[[PassBegun], None] = lambda _: None
    ended: Callable[[Outcome], None] = lambda _: None
    """Also of a job that was refused or failed: its `message` says why."""
    foretold: Callable[[Forecast], None] | None = None
    """Of a dry run: what the jobs of each base and recipe would take. None: that is not sampled."""

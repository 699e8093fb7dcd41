"""Samples of a run, for its report: how far it was, and how much memory the process held."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from converter.observer import Progress

MOST = 400
"""Samples that are held; a longer run has them at longer intervals."""
INTERVAL = 0.02
"""Seconds between two samples, at first."""


def resident_memory() -> int:
    """Bytes of memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class Sample(NamedTuple):
    seconds: float
    """Since the run began."""
    stage: str
    done: int
    """Bytes of the base, in this stage."""
    memory: int
    """Bytes."""


class Stage(NamedTuple):
    """One stage of a run, in figures."""

    name: str
    seconds: float
    done: int
    """Bytes of the base that it took."""
    memory: int
    """Bytes, the most that was sampled."""


class Samples:
    """Takes a sample of the run at every step that it is told of, but not more often than is useful.

    `clock` gives seconds, `memory` the bytes that the process holds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, memory: Callable[[], int] = resident_memory
    ) -> None:
        self._clock, self._memory = clock, memory
        self._start = clock()
        self._interval = INTERVAL
        self._taken = [Sample(0.0, "planning", 0, memory())]

    def progress(self, progress: Progress) -> None:
        """Take a sample, if it is time: for an observer's `progress`."""
        if progress.stage == "planned":
            return
        now, last = self._clock() - self._start, self._taken[-1]
        if progress.stage == last.stage and progress.done < progress.total and now - last.seconds < self._interval:
            return
        self._taken.append(Sample(now, progress.stage, progress.done, self._memory()))
        if len(self._taken) > MOST:
            self._taken = thinned(self._taken)
            self._interval = 2 * max(self._interval, now / MOST)

    def ended(self) -> list[Sample]:
        """All samples, in their order, and one of now."""
        last = self._taken[-1]
        return [*self._taken, Sample(self._clock() - self._start, last.stage, last.done, self._memory())]


def thinned(samples: Sequence[Sample]) -> list[Sample]:
    """About half of the samples; of each stage the first and the last stay."""

    def stays(number: int) -> bool:
        beside = [samples[other].stage for other in (number - 1, number + 1) if 0 <= other < len(samples)]
        return number % 2 == 0 or len(beside) < 2 or any(stage != samples[number].stage for stage in beside)

    return [sample for number, sample in enumerate(samples) if stays(number)]


def stages(samples: Sequence[Sample]) -> list[Stage]:
    """What each stage took, all its turns together: a batch has some stages more than once. A turn lasts until the
    next one begins."""
    stages: dict[str, Stage] = {}
    for turn in _turns(samples):
        sum_ = stages.get(turn.name, Stage(turn.name, 0.0, 0, 0))
        seconds, done = sum_.seconds + turn.seconds, sum_.done + turn.done
        stages[turn.name] = Stage(turn.name, seconds, done, max(sum_.memory, turn.memory))
    return list(stages.values())


def _turns(samples: Sequence[Sample]) -> list[Stage]:
    found: list[list[Sample]] = []
    for sample in samples:
        if not found or found[-1][0].stage != sample.stage:
            if found:
                found[-1].append(sample)
            found.append([])
        found[-1].append(sample)
    return [
        Stage(
            of[0].stage,
            of[-1].seconds - of[0].seconds,
            max(sample.done for sample in of if sample.stage == of[0].stage) - of[0].done,
            max(sample.memory for sample in of),
        )
        for of in found
    ]


def rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(seconds, bytes a second) between each two samples of one stage, at the second one."""
    return [
        (later.seconds, (later.done - earlier.done) / (later.seconds - earlier.seconds))
        for earlier, later in itertools.pairwise(samples)
        if later.stage == earlier.stage and later.seconds > earlier.seconds and later.done >= earlier.done
    ]

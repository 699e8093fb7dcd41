"""What parts of a batch tell: outcomes of their jobs, and how far the whole is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converter.batch.cluster.parts import Part
from converter.batch.observer import BatchObserver
from converter.batch.outcomes import Outcome, Outcomes
from converter.errors import ConverterError
from converter.job import Job
from converter.observer import Progress


class PartsReport:
    """Puts together what the parts tell. `jobs` are those of the whole batch, as the parts know them."""

    def __init__(self, jobs: Sequence[Job], parts: Sequence[Part], outcomes: Outcomes, observer: BatchObserver) -> None:
        self._jobs, self._parts, self._outcomes, self._observer = jobs, parts, outcomes, observer
        self._by_out: dict[Path, int] = {jobs[index].out: index for part in parts for index in part.indices}
        self._done = {number: (0, part.base_bytes) for number, part in enumerate(parts)}
        """Of each part: bytes of the base that it has done, and will have."""
        self._notes: dict[int, tuple[str, ...]] = {}

    def hear(self, told: Sequence[tuple[int, Outcome | Progress]]) -> None:
        """Take what parts tell on their way."""
        latest: Progress | None = None
        for number, item in told:
            if isinstance(item, Outcome):
                self._record(number, self._by_out[item.job.out], item)
            else:
                latest = item
                self._done[number] = (item.done, item.total)
        if latest is not None:
            self._show(latest.stage, latest.name)

    def note(self, number: int, note: str) -> None:
        """What is to be known of the outputs that a part makes from now on."""
        self._notes[number] = (*self._notes.get(number, ()), note)

    def end(self, number: int, outcomes: Sequence[Outcome]) -> None:
        """A part has ended, with these outcomes of its jobs."""
        for index, outcome in zip(self._parts[number].indices, outcomes, strict=True):
            self._record(number, index, outcome)
        _, total = self._done[number]
        self._done[number] = (total, total)
        self._show("converting", str(self._jobs[self._parts[number].indices[-1]].out))

    def fail(self, number: int, why: str) -> None:
        """A part is given up; what was known of its jobs stays."""
        for index in self._parts[number].indices:
            if index not in self._outcomes:
                self._outcomes.end(index, "failed", str(ConverterError(why)))

    def _record(self, number: int, index: int, outcome: Outcome) -> None:
        self._outcomes.record(index, replace(outcome, notes=outcome.notes + self._notes.get(number, ())))

    def _show(self, stage: str, name: str) -> None:
        done, total = map(sum, zip(*self._done.values(), strict=True))
        self._observer.tell(stage, done, total, name)

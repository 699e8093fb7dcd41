"""The outcomes of a batch's jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from converter.errors import ConversionRefused, ConverterError, GateFailed, OutputLocked
from converter.job import Job
from converter.quantize.measure import Fidelity

Status = Literal["made", "nothing to do", "planned", "refused", "failed"]


@dataclass(frozen=True, repr=False)
class Outcome:
    """The outcome of one job."""

    job: Job
    status: Status
    message: str = ""
    """Why it was refused or failed."""
    fingerprint: str = ""
    output_bytes: int = 0
    """Of the shards; of an output that is only planned, at most."""
    shared_bytes: int = 0
    """Of these, in shards that other outputs have, too, or may have."""
    link: str = ""
    """How it has them: hard, reflink, copy."""
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict)
    """Of the tensors that the adapter changed."""
    notes: tuple[str, ...] = ()
    checked: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """As in `Report.checked`."""
    is_locked: bool = False
    """Refused because another process is writing it."""
    is_below_gate: bool = False
    """Failed because a figure of it does not reach its gate."""

    def __repr__(self) -> str:
        return f"Outcome({self.job.label!r}: {self.status}{self.message and f': {self.message}'})"

    @property
    def why(self) -> str:
        """The message without the output's name, for a line that has the name already."""
        return self.message.removeprefix(f"{self.job.label}: ")

    @property
    def is_good(self) -> bool:
        return self.status in ("made", "nothing to do", "planned")


class Outcomes:
    """The outcomes of a batch so far, one for each job. `tell` is called with each as soon as it is known.

    The first outcome of a job counts; but a good one replaces a bad one, and is told, too.
    """

    def __init__(self, jobs: Sequence[Job], tell: Callable[[Outcome], None] = lambda _: None) -> None:
        self.unfinished: set[int] = set()
        """Jobs that failed and that another run of the same batch can resume."""
        self._jobs, self._tell = jobs, tell
        self._known: dict[int, Outcome] = {}

    def __contains__(self, index: object) -> bool:
        return index in self._known

    def __iter__(self) -> Iterator[Outcome]:
        """Those that are known, in the order of the jobs."""
        return iter([self._known[index] for index in sorted(self._known)])

    def __len__(self) -> int:
        return len(self._known)

    def record(self, index: int, outcome: Outcome) -> None:
        """Note the outcome of the job of this index, whatever job the outcome names."""
        known = self._known.get(index)
        if known is None or (outcome.is_good and not known.is_good):
            self._known[index] = replace(outcome, job=self._jobs[index])
            self._tell(self._known[index])

    def end(self, index: int, status: Status, message: str = "", **figures: Any) -> None:
        self.record(index, Outcome(self._jobs[index], status, message, **figures))

    def refuse(self, index: int, error: ConverterError) -> None:
        self.end(index, "refused", str(error))

    def fail(self, index: int, error: ConverterError) -> None:
        """A job ended by an error, which may be a late refusal."""
        if error.resumable:
            self.unfinished.add(index)
        status: Status = "refused" if isinstance(error, ConversionRefused) else "failed"
        self.end(
            index,
            status,
            str(error),
            is_locked=isinstance(error, OutputLocked),
            is_below_gate=isinstance(error, GateFailed),
        )

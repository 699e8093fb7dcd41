"""A batch on many machines: jobs of one base in parts, parts on nodes, what is lost begun again, one report of it all.

Inputs and outputs must lie where every node sees them under the same path. What a lost node had finished is kept,
because a batch makes nothing twice.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from converter.batch.batch import convert_batch
from converter.batch.cluster.parts import Ask, Node, Part, Prediction, divide, on_gpus, predict
from converter.batch.cluster.ray_cluster import Lost, connected, refuse_if_unusable
from converter.batch.forecast import Forecast
from converter.batch.jobs import grouped
from converter.batch.members import BatchOptions, Outcome
from converter.errors import ConverterError, Interrupted
from converter.job import Job
from converter.observer import Progress
from converter.read.folder import is_folder

MOST_BEGINNINGS = 4
"""How often a part is begun whose node or process is lost each time."""
_TURN_SECONDS = 0.3
_LOOK_SECONDS = 5.0


class Cluster(Protocol):
    """What is asked of a cluster; `ray_cluster.RayCluster` says what each does."""

    def nodes(self) -> list[Node]: ...
    def start(self, number: int, ask: Ask, jobs: Sequence[Job], terms: BatchOptions) -> None: ...
    def finished(self, seconds: float) -> list[tuple[int, list[Outcome] | Lost]]: ...
    def heard(self) -> list[tuple[int, Outcome | Progress]]: ...
    def cancel(self, numbers: Sequence[int]) -> None: ...


def convert_on_cluster(
    jobs: Sequence[Job],
    terms: BatchOptions = BatchOptions(),
    address: str = "local",
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
    tell: Callable[[Outcome], None] = lambda _: None,
    foretell: Callable[[Forecast], None] | None = None,
) -> list[Outcome]:
    """`convert_batch` on the nodes of the Ray cluster at `address`, HOST:PORT; `local` starts one on this machine.

    With `dry_run`, and where `strict` ends it, nothing is asked of the cluster. Raises `ConversionRefused` where it
    can't be reached or no node has what a part takes, and `Interrupted` at a signal: the same batch goes on.
    """
    if dry_run:
        return convert_batch(jobs, terms, dry_run=True, progress=progress, stop=stop, tell=tell, foretell=foretell)
    if terms.strict:
        planned = convert_batch(jobs, terms, dry_run=True, stop=stop)
        if not all(outcome.is_good for outcome in planned):
            for outcome in planned:
                tell(outcome)
            return planned
    refuse_if_unusable(address)
    report = _Report(jobs, progress, tell)
    placed = [_placed(job) for job in jobs]
    terms = terms if terms.against is None else replace(terms, against=_absolute(terms.against))
    groups = _groups(placed, terms, report)
    if groups:
        with connected(address) as cluster:
            convert_groups(placed, groups, terms, cluster, report, stop)
    return report.in_order()


def convert_groups(
    jobs: Sequence[Job],
    groups: Sequence[tuple[Sequence[int], Prediction]],
    terms: BatchOptions,
    cluster: Cluster,
    report: _Report,
    stop: Callable[[], int | None],
) -> None:
    """Make every part of the groups, each on some node; one whose node is lost is begun again on another."""
    nodes = cluster.nodes()
    gpus = int(on_gpus(terms.device, nodes))
    parts = divide(groups, nodes, threads=terms.resources.threads, gpus=gpus)
    # Ray shows a task its own GPU as the first.
    device = "cuda" if gpus else "cpu" if terms.device == "auto" else terms.device
    resources = replace(terms.resources, threads=parts[0].ask.cpus)
    terms = replace(terms, device=device, resources=resources, strict=False)
    beginnings = [0] * len(parts)

    def begin(number: int) -> None:
        beginnings[number] += 1
        cluster.start(number, parts[number].ask, [jobs[index] for index in parts[number].indices], terms)

    report.expect(parts)
    for number in range(len(parts)):
        begin(number)
    under_way = set(range(len(parts)))
    looked = time.monotonic()
    while under_way:
        if (signum := stop()) is not None:
            count = len(under_way)
            cluster.cancel(sorted(under_way))
            report.hear(cluster.heard())
            raise Interrupted(
                signum,
                f"{signal.Signals(signum).name} while {count} parts were under way; what is done is kept: "
                "the same command goes on with it",
            )
        ended = cluster.finished(_TURN_SECONDS)
        report.hear(cluster.heard())
        for number, told in ended:
            # One that was interrupted, and not by us, tells of none of its jobs.
            result = told or Lost("somebody interrupted it")
            if isinstance(result, Lost) and beginnings[number] < MOST_BEGINNINGS:
                report.note(number, f"begun again, as its worker was lost: {result.why}")
                begin(number)
                continue
            under_way.discard(number)
            if isinstance(result, Lost):
                report.fail(number, f"begun {MOST_BEGINNINGS} times, and its worker was lost each time: {result.why}")
            else:
                report.end(number, result)
        if time.monotonic() - looked >= _LOOK_SECONDS or any(isinstance(result, Lost) for _, result in ended):
            looked = time.monotonic()
            nodes = cluster.nodes()
            for number in sorted(under_way):
                if not any(parts[number].ask.fits(node) for node in nodes):
                    cluster.cancel([number])
                    under_way.discard(number)
                    report.fail(number, f"no node is left that has {parts[number].ask}, which its part takes")


def _groups(jobs: list[Job], terms: BatchOptions, report: _Report) -> list[tuple[list[int], Prediction]]:
    """Jobs that can be made in one pass over one base, by their indices; with what the first that can be planned takes.

    Jobs get their base named; those that are refused have their outcome.
    """
    groups = []
    for named in grouped(jobs, report.refuse, offline=terms.offline):
        indices = list(named)
        for index in indices:
            jobs[index] = named[index]
        for number, index in enumerate(indices):
            try:
                found = predict(jobs[index], terms)
            except ConverterError as exc:
                report.refuse(index, exc)
            else:
                groups.append((indices[number:], found))
                break
    return groups


class _Report:
    """What came of each job, told once as soon as it is known; and how far the whole is."""

    def __init__(
        self, jobs: Sequence[Job], progress: Callable[[Progress], None], tell: Callable[[Outcome], None]
    ) -> None:
        self._jobs, self._progress, self._tell = jobs, progress, tell
        self._outcomes: dict[int, Outcome] = {}
        self._parts: Sequence[Part] = ()
        self._by_out: dict[Path, int] = {}
        self._done: dict[int, tuple[int, int]] = {}
        """Of each part: bytes of the base that it has done, and will have."""
        self._notes: dict[int, tuple[str, ...]] = {}

    def in_order(self) -> list[Outcome]:
        return [self._outcomes[index] for index in sorted(self._outcomes)]

    def expect(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._by_out = {_absolute(self._jobs[index].out): index for part in parts for index in part.indices}
        self._done = {number: (0, part.base_bytes) for number, part in enumerate(parts)}

    def hear(self, told: Sequence[tuple[int, Outcome | Progress]]) -> None:
        latest: Progress | None = None
        for number, item in told:
            if isinstance(item, Outcome):
                self._know(self._by_out[item.job.out], item, self._notes.get(number, ()))
            else:
                latest = item
                self._done[number] = (item.done, item.total)
        if latest is not None:
            self._show(latest.stage, latest.name)

    def note(self, number: int, note: str) -> None:
        """What is to be known of the outputs that a part makes from now on."""
        self._notes[number] = (*self._notes.get(number, ()), note)

    def end(self, number: int, outcomes: Sequence[Outcome]) -> None:
        """A part has ended."""
        for index, outcome in zip(self._parts[number].indices, outcomes, strict=True):
            self._know(index, outcome, self._notes.get(number, ()))
        _, total = self._done[number]
        self._done[number] = (total, total)
        self._show("converting", str(self._jobs[self._parts[number].indices[-1]].out))

    def fail(self, number: int, why: str) -> None:
        """A part is given up; what was known of its jobs stays."""
        for index in self._parts[number].indices:
            if index not in self._outcomes:
                self._know(index, Outcome(self._jobs[index], "failed", str(ConverterError(why))))

    def refuse(self, index: int, error: ConverterError) -> None:
        self._know(index, Outcome(self._jobs[index], "refused", str(error)))

    def _know(self, index: int, outcome: Outcome, notes: tuple[str, ...] = ()) -> None:
        """The first news count, as a part that is begun again finds made what it had made; and good ones count more."""
        known = self._outcomes.get(index)
        if known is not None and (known.is_good or not outcome.is_good):
            return
        self._outcomes[index] = replace(outcome, job=self._jobs[index], notes=outcome.notes + notes)
        self._tell(self._outcomes[index])

    def _show(self, stage: str, name: str) -> None:
        done, total = map(sum, zip(*self._done.values(), strict=True))
        self._progress(Progress(stage, done, total, name))


def _placed(job: Job) -> Job:
    """The job with paths that mean the same on every node."""
    return replace(job, out=_absolute(job.out), adapter=_reference(job.adapter), base=_reference(job.base))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  (links may mean something else elsewhere)


def _reference(reference: str | os.PathLike[str] | None) -> str | None:
    """Absolute, if there is such a folder; else an id on the Hub."""
    if reference is None:
        return None
    text = os.fspath(reference)
    there = Path(text).expanduser()
    return str(_absolute(there)) if not isinstance(reference, str) or is_folder(there) else text

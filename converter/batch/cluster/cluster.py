"""A batch on many machines: jobs of one base in parts, parts on nodes, lost parts started again, one report of all.

Inputs and outputs must lie where every node sees them under the same path. What a lost node had finished is kept,
because a batch makes nothing twice.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from converter.batch.batch import convert_jobs
from converter.batch.cluster.parts import Ask, Node, Prediction, divide, on_gpus, predict
from converter.batch.cluster.ray_cluster import Lost, connected, refuse_if_unusable
from converter.batch.cluster.report import PartsReport
from converter.batch.jobs import grouped
from converter.batch.observer import BatchObserver
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcome, Outcomes
from converter.errors import ConverterError, Interrupted
from converter.job import Adapters, Job
from converter.observer import Progress
from converter.read.folder import is_folder

MOST_STARTS = 4
"""How often a part is started whose node or process is lost each time."""
_TURN_SECONDS = 0.3
_LOOK_SECONDS = 5.0


class Cluster(Protocol):
    """What is asked of a cluster; `ray_cluster.RayCluster` says what each does."""

    def nodes(self) -> list[Node]: ...
    def start(self, number: int, ask: Ask, jobs: Sequence[Job], options: BatchOptions) -> None: ...
    def finished(self, seconds: float) -> list[tuple[int, list[Outcome] | Lost]]: ...
    def heard(self) -> list[tuple[int, Outcome | Progress]]: ...
    def cancel(self, numbers: Sequence[int]) -> None: ...


def convert_on_cluster(
    jobs: Sequence[Job],
    options: BatchOptions = BatchOptions(),
    address: str = "local",
    observer: BatchObserver = BatchObserver(),
    *,
    dry_run: bool = False,
    connect: Callable[[str], AbstractContextManager[Cluster]] | None = None,
) -> list[Outcome]:
    """`convert_jobs` on the nodes of the Ray cluster at `address`, HOST:PORT; `local` starts one on this machine.
    `connect` gives the cluster at an address; by default, Ray's.

    With `dry_run`, and where `strict` ends it, nothing is asked of the cluster. Raises `ConversionRefused` where it
    can't be reached or no node has what a part takes, and `Interrupted` at a signal: the same batch resumes the work.
    """
    if dry_run:
        return convert_jobs(jobs, options, observer, dry_run=True)
    if options.strict:
        planned = convert_jobs(jobs, options, BatchObserver(stop=observer.stop), dry_run=True)
        if not all(outcome.is_good for outcome in planned):
            for outcome in planned:
                observer.ended(outcome)
            return planned
    if connect is None:
        refuse_if_unusable(address)
    outcomes = Outcomes(jobs, observer.ended)
    placed = [_placed(job) for job in jobs]
    options = options if options.against is None else replace(options, against=_absolute(options.against))
    groups = _groups(placed, options, outcomes)
    if groups:
        with (connect or connected)(address) as cluster:
            _Run(placed, options, cluster, observer, outcomes).convert(groups)
    return list(outcomes)


class _Run:
    """Parts of a batch under way on a cluster."""

    def __init__(
        self,
        jobs: Sequence[Job],
        options: BatchOptions,
        cluster: Cluster,
        observer: BatchObserver,
        outcomes: Outcomes,
    ) -> None:
        self._jobs, self._options, self._cluster = jobs, options, cluster
        self._observer, self._outcomes = observer, outcomes
        self._under_way: set[int] = set()

    def convert(self, groups: Sequence[tuple[Sequence[int], Prediction]]) -> None:
        """Make every part of the groups, each on some node; a part whose node is lost is started again on another."""
        nodes, options = self._cluster.nodes(), self._options
        gpus = int(on_gpus(options.device, nodes))
        self._parts = divide(groups, nodes, threads=options.resources.threads, gpus=gpus)
        # Ray shows a task its own GPU as the first.
        device = "cuda" if gpus else "cpu" if options.device == "auto" else options.device
        resources = replace(options.resources, threads=self._parts[0].ask.cpus)
        self._options = replace(options, device=device, resources=resources, strict=False)
        self._starts = [0] * len(self._parts)
        self._report = PartsReport(self._jobs, self._parts, self._outcomes, self._observer)
        for number in range(len(self._parts)):
            self._start(number)
        looked = time.monotonic()
        while self._under_way:
            self._end_at_a_signal()
            ended = self._cluster.finished(_TURN_SECONDS)
            self._report.hear(self._cluster.heard())
            for number, told in ended:
                # A part that somebody else interrupted tells of none of its jobs.
                self._end(number, told or Lost("somebody interrupted it"))
            if time.monotonic() - looked >= _LOOK_SECONDS or any(isinstance(told, Lost) for _, told in ended):
                looked = time.monotonic()
                self._fail_what_no_node_can_make()

    def _start(self, number: int) -> None:
        part = self._parts[number]
        self._starts[number] += 1
        self._under_way.add(number)
        self._cluster.start(number, part.ask, [self._jobs[index] for index in part.indices], self._options)

    def _end(self, number: int, result: list[Outcome] | Lost) -> None:
        """A part has ended: its outcomes, or it is started again, or has failed too often."""
        if isinstance(result, Lost) and self._starts[number] < MOST_STARTS:
            self._report.note(number, f"started again, as its worker was lost: {result.why}")
            self._start(number)
            return
        self._under_way.discard(number)
        if isinstance(result, Lost):
            self._report.fail(number, f"started {MOST_STARTS} times, and its worker was lost each time: {result.why}")
        else:
            self._report.end(number, result)

    def _end_at_a_signal(self) -> None:
        if (signum := self._observer.stop()) is not None:
            count = len(self._under_way)
            self._cluster.cancel(sorted(self._under_way))
            self._report.hear(self._cluster.heard())
            raise Interrupted(
                signum,
                f"{signal.Signals(signum).name} while {count} parts were under way; what is done is kept; "
                "run the same command to resume",
            )

    def _fail_what_no_node_can_make(self) -> None:
        nodes = self._cluster.nodes()
        for number in sorted(self._under_way):
            ask = self._parts[number].ask
            if not any(ask.fits(node) for node in nodes):
                self._cluster.cancel([number])
                self._under_way.discard(number)
                self._report.fail(number, f"no node is left that has {ask}, which its part takes")


def _groups(jobs: list[Job], options: BatchOptions, outcomes: Outcomes) -> list[tuple[list[int], Prediction]]:
    """Jobs of one base and recipe, by their indices, with what the first of them that can be planned takes.

    Their bases get named in `jobs`. Those that are refused have their outcome then.
    """
    groups = []
    for named in grouped(jobs, outcomes.refuse, options):
        indices = list(named)
        for index in indices:
            jobs[index] = named[index]
        for number, index in enumerate(indices):
            try:
                found = predict(jobs[index], options)
            except ConverterError as exc:
                outcomes.refuse(index, exc)
            else:
                groups.append((indices[number:], found))
                break
    return groups


def _placed(job: Job) -> Job:
    """The job with paths that mean the same on every node."""
    adapter: Adapters | None = job.adapter
    if adapter is not None and not isinstance(adapter, str | os.PathLike):
        adapter = [one for one in map(_reference, adapter) if one is not None]
    else:
        adapter = _reference(adapter)
    return replace(job, out=_absolute(job.out), adapter=adapter, base=_reference(job.base))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  (links may mean something else elsewhere)


def _reference(reference: str | os.PathLike[str] | None) -> str | None:
    """Absolute, if there is such a folder; else an id on the Hub."""
    if reference is None:
        return None
    text = os.fspath(reference)
    there = Path(text).expanduser()
    return str(_absolute(there)) if not isinstance(reference, str) or is_folder(there) else text

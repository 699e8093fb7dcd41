"""Many adapters, one pass over the base: each tensor is read once for all, and what no adapter touches is made once.

Every job is planned before the first byte is written; one that is refused, or fails on the way, is dropped, and the
others go on. Tensors in common lie in shards of their own, made in a place of the batch's and linked into each output
when it is sealed: no output depends on another's fate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from converter.batch.forecast import Forecast, forecast
from converter.batch.jobs import grouped
from converter.batch.members import BatchOptions, Group, Member, Outcome, Status
from converter.batch.passes import Pass
from converter.batch.place import Place, place_of, tidy
from converter.batch.sharing import Given, given_by, left_by
from converter.errors import BadOutput, BadRecipe, ConversionRefused, ConverterError, Interrupted, OutputLocked
from converter.job import Job
from converter.observer import Progress
from converter.plan import budget
from converter.plan.inputs import Base, Inputs
from converter.seal.destination import first_that_exists, room
from converter.tensors import torch_device


def convert_batch(
    jobs: Sequence[Job],
    terms: BatchOptions = BatchOptions(),
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
    tell: Callable[[Outcome], None] = lambda _: None,
    foretell: Callable[[Forecast], None] | None = None,
) -> list[Outcome]:
    """Make a checkpoint for each job; what came of each, in their order. `tell` hears of each as soon as it is known,
    `foretell`, of a dry run, what each group of jobs would take.

    Jobs of one base and recipe are made in one pass over the base; in several, if there are so many that what each of
    them needs would not fit the memory together. Raises `Interrupted` at a signal: the same batch goes on.
    """
    batch = Batch(jobs, terms, progress, stop, tell)
    groups = batch.plan()
    if dry_run or (terms.strict and batch.outcomes):
        for group in groups:
            with group:
                batch.end_as_planned(group)
                if dry_run and foretell is not None and (found := forecast(group)) is not None:
                    foretell(found)
        return batch.in_order()
    for group in groups:
        with group:
            batch.convert(group)
    return batch.in_order()


class Batch:
    """The jobs of a batch on their way: what is planned, made and told of each."""

    def __init__(
        self,
        jobs: Sequence[Job],
        terms: BatchOptions,
        progress: Callable[[Progress], None],
        stop: Callable[[], int | None],
        tell: Callable[[Outcome], None],
    ) -> None:
        self.terms, self.show, self.stop = terms, progress, stop
        self._jobs, self._tell = jobs, tell
        self.outcomes: dict[int, Outcome] = {}
        self.unfinished: set[int] = set()
        """Jobs that failed and that the same batch goes on with."""

    def in_order(self) -> list[Outcome]:
        return [self.outcomes[index] for index in sorted(self.outcomes)]

    def end(self, index: int, status: Status, message: str = "", **more: object) -> None:
        outcome = Outcome(self._jobs[index], status, message, **more)  # type: ignore[arg-type]
        self.outcomes[index] = outcome
        self._tell(outcome)

    def refuse(self, index: int, error: ConverterError) -> None:
        self.end(index, "refused", str(error))

    def fail(self, index: int, error: ConverterError) -> None:
        if error.resumable:
            self.unfinished.add(index)
        status: Status = "refused" if isinstance(error, ConversionRefused) else "failed"
        self.end(index, status, str(error), is_locked=isinstance(error, OutputLocked))

    def plan(self) -> list[Group]:
        """Plan every job; those that are refused have their outcome, the others are in groups."""
        groups = []
        for jobs in grouped(self._jobs, self.refuse, offline=self.terms.offline):
            try:
                first = next(iter(jobs.values()))
                assert first.base is not None  # noqa: S101  (`with_base` saw to it)
                group = Group(Base(first.base, first.base_revision, offline=self.terms.offline))
            except ConverterError as exc:
                for index in jobs:
                    self.refuse(index, exc)
                continue
            for index, job in jobs.items():
                try:
                    group.add(index, self._member(group, job))
                except ConverterError as exc:
                    self.refuse(index, exc)
            groups.append(group)
        return groups

    def _member(self, group: Group, job: Job) -> Member:
        offline = self.terms.offline
        inputs = Inputs(None, job.adapter, adapter_revision=job.adapter_revision, offline=offline, opened=group.base)
        try:
            return Member(job, inputs, self.terms)
        except BaseException:
            inputs.close()
            raise

    def end_as_planned(self, group: Group) -> None:
        """What would be done."""
        for index, member in group.members.items():
            status: Status = "planned" if member.known is None else "nothing to do"
            self.end(
                index,
                status,
                fingerprint=member.known or "",
                output_bytes=member.output_bytes,
                shared_bytes=group.common_bytes,
                notes=member.notes,
            )

    def convert(self, group: Group) -> None:
        """Make what is not made already of a group, in as few passes over the base as the memory allows."""
        pending: dict[int, Member] = {}
        for index, member in group.members.items():
            if member.known is None:
                pending[index] = member
            else:
                self.end(index, "nothing to do", fingerprint=member.known, output_bytes=member.output_bytes)
        if not pending:
            tidy(group.members.values())
            return
        try:
            beside = self._with_room(group, pending)
            if beside is None:
                return
            group.base.bring(lambda *how_far: self.show(Progress(*how_far)), self.stop)
            given = self._given(group)
            indices, needs = list(pending), [member.need for member in pending.values()]
            with Place(group, beside, given, self.terms) as place:

                def fitting(numbers: Sequence[int]) -> Pass | None:
                    some = {indices[number]: pending[indices[number]] for number in numbers}
                    one = Pass(self, group, some, given, place)
                    return one if budget.fits(one.memory, len(some), self.terms.resources) else None

                for numbers, one in budget.in_passes(needs, self.terms.resources, fitting):
                    if isinstance(one, BadRecipe):  # the others have their turn
                        self.fail(indices[numbers[0]], one)
                        continue
                    one.run()
                    for number in numbers:
                        pending[indices[number]].forget()
                if not self.unfinished & pending.keys():
                    place.spend()
            if not self.unfinished & pending.keys():
                tidy(group.members.values())
        except Interrupted as exc:
            exc.args = (f"{exc}; what is done is kept: the same command goes on with it",)
            raise
        except ConverterError as exc:
            for index in [index for index in pending if index not in self.outcomes]:
                self.fail(index, exc)

    def _given(self, group: Group) -> list[Given]:
        """Shards in common that an output has already: one of this batch that is made, or that of `--against`."""
        made = [member for member in group.members.values() if member.known is not None]
        folders = [member.destination.out for member in made]
        if self.terms.against is not None:
            folders.insert(0, self.terms.against)
        given: list[Given] = []
        member = next(iter(group.members.values()))
        device = torch_device(member.plan.device).type
        for folder in folders:
            left = left_by(given, group.common or {})
            if not left:
                break
            try:
                given += given_by(folder, member.plan, left, member.inputs, device)
            except ConverterError as exc:
                if folder == self.terms.against:
                    raise
                group.notes.append(f"not linked to: {exc}")
        if self.terms.against is not None and not given:
            raise BadOutput(
                f"--against {self.terms.against}: none of its shards can be linked to: it was made of another base, "
                "by another recipe or version, or each of its shards has something of its adapter"
            )
        return given

    def _with_room(self, group: Group, pending: dict[int, Member]) -> Member | None:
        """Refuse those on a disk that has no room for all of them there; beside whom what is in common is made then."""
        full: set[int] = set()
        while pending:
            # The first, made or not: that is where the next run looks for it.
            beside = next((one for one in group.members.values() if _disk_of(place_of(one)) not in full), None)
            if beside is None:
                for index in list(pending):
                    out = pending.pop(index).destination.out
                    self.refuse(index, BadOutput(f"{out}: no disk has room for what the outputs have in common"))
            elif (disk := self._refuse_if_too_full(group, pending, beside)) is None:
                return beside
            else:
                full.add(disk)
        return None

    def _refuse_if_too_full(self, group: Group, pending: dict[int, Member], beside: Member) -> int | None:
        """Refuse the outputs on the first disk without room: for what is in common, once or as often as it must be
        copied, and for what is each output's own. Its number; None if there is room everywhere."""
        common, home = group.common_bytes, _disk_of(place_of(beside))
        by_disk: dict[int, dict[int, Member]] = {home: {}}
        for index, member in pending.items():
            by_disk.setdefault(_disk_of(member.destination.staging), {})[index] = member
        for disk, members in by_disk.items():
            copies = len(members) if disk != home or self.terms.link == "copy" else 0
            own = sum(member.output_bytes - common for member in members.values())
            needed = own + common * (copies + (disk == home))
            folders = [place_of(beside)] if disk == home else []
            free = room([*folders, *(member.destination.staging for member in members.values())])
            if free < needed:
                what = f"{needed:,} bytes are needed, with all that is made on this disk, which has {free:,} free"
                for index in members:
                    self.refuse(index, BadOutput(f"{pending.pop(index).destination.out}: {what}"))
                return disk
        return None


def _disk_of(path: Path) -> int:
    return first_that_exists(path).stat().st_dev

"""Many adapters, one pass over the base: each tensor is read once for all, and what no adapter touches is made once.

Every job is planned before the first byte is written; one that is refused, or fails on the way, is dropped, and the
others go on. Tensors in common lie in shards of their own, made in a place of the batch's and linked into each output
when it is sealed: no output depends on another's fate.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from converter import budget
from converter.budget import Resources
from converter.decide import make_plan
from converter.digests import remember
from converter.errors import BadOutput, BadRecipe, ConversionRefused, ConverterError, Interrupted
from converter.inputs import Base, Inputs
from converter.jobs import Job, group_key, refuse_clashes, with_base
from converter.journal import job_of
from converter.link import GivenShard, How
from converter.measure import Fidelity
from converter.origin import already_made
from converter.pipeline import Progress, convert_tensors, crew_of, one_thread, seal
from converter.plan import Plan, TensorPlan
from converter.production import UNFINISHED_BUSINESS, Made, Production, Target
from converter.quantize import Quantizer
from converter.seal import Destination, Staging
from converter.sharing import Given, given_by, in_common, laid_out, shards_of, untouched
from converter.tiles import torch_device

Status = Literal["made", "nothing to do", "planned", "refused", "failed"]

_IN_COMMON = -1
"""The number of what is nobody's own, among the numbers of outputs."""
MOST_PLANS = 64
"""Plans that are kept from the planning to the making; those of more jobs are made anew, for they take memory."""


@dataclass(frozen=True)
class Outcome:
    """What came of one job."""

    job: Job
    status: Status
    message: str = ""
    """Why it was refused or failed."""
    fingerprint: str = ""
    output_bytes: int = 0
    shared_bytes: int = 0
    """Of these, in shards that other outputs have, too, or may have."""
    link: str = ""
    """How it has them: hard, reflink, copy."""
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict)
    """Of the tensors that the adapter changed."""
    notes: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return self.status in ("made", "nothing to do", "planned")


@dataclass(frozen=True)
class Terms:
    """How a batch is run; none of it but `device` and `link` changes a byte of an output."""

    resources: Resources = Resources()
    device: str = "auto"
    overwrite: bool = False
    offline: bool = False
    trust_remote_code: bool = False
    resume: bool = True
    strict: bool = False
    """Convert nothing if any job is refused."""
    link: How = "auto"
    against: Path | None = None
    """A finished output whose shards may be linked to."""


def convert_batch(
    jobs: Sequence[Job],
    terms: Terms = Terms(),
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
    tell: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Make a checkpoint for each job; what came of each, in their order. `tell` hears of each as soon as it is known.

    Jobs of one base and recipe are made in one pass over the base; in several, if there are so many that what each of
    them needs would not fit the memory together. Raises `Interrupted` at a signal: the same batch goes on.
    """
    batch = _Batch(jobs, terms, progress, stop, tell)
    groups = batch.plan()
    if dry_run or (terms.strict and batch.outcomes):
        for group in groups:
            with group:
                batch.end_as_planned(group)
        return batch.in_order()
    for group in groups:
        with group:
            batch.convert(group)
    return batch.in_order()


class _Member:
    """A job that is planned. Its plan may be forgotten, and is then made anew when it is wanted."""

    def __init__(self, job: Job, inputs: Inputs, terms: Terms) -> None:
        self.job, self.inputs, self._terms = job, inputs, terms
        self._plan: Plan | None = None
        self.before = inputs.identities()
        """Of the weights files, when it was planned: its turn may come much later."""
        plan = self.plan
        self.destination = Destination(job.out, inputs=inputs.folders, overwrite=terms.overwrite)
        device = torch_device(plan.device).type
        self.known = already_made(self.destination, plan, inputs, device, any_layout=True)
        """Its fingerprint, if it is made already."""
        if self.known is None:
            self.destination.refuse_if_taken()
        tensors = list(plan.tensors())
        self.output_bytes = plan.output_bytes
        self.need = budget.in_flight(tensors, plan.recipe, plan.resources)
        self.need += budget.PER_TENSOR * sum(tensor.is_touched for tensor in tensors)

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            self._plan = make_plan(
                self.inputs.base,
                self.inputs.adapter,
                self.job.recipe,
                self._terms.resources,
                device=self._terms.device,
                trust_remote_code=self._terms.trust_remote_code,
            )
        return self._plan

    def refuse_if_changed(self) -> None:
        """`InputChanged` if base or adapter is not what was planned for."""
        self.inputs.refuse_if_changed(self.before)

    def forget(self) -> None:
        self._plan = None
        if self.inputs.adapter is not None:
            self.inputs.adapter.folder.close()  # opens again when it is read


@dataclass
class _Group:
    """Jobs of one base and recipe."""

    base: Base
    members: dict[int, _Member] = field(default_factory=dict)
    common: dict[str, TensorPlan] | None = None
    """What becomes of the tensors that no adapter touches."""

    def add(self, index: int, member: _Member) -> None:
        own = untouched(member.plan)
        self.common = own if self.common is None else in_common(self.common, own)
        self.members[index] = member
        if len(self.members) > MOST_PLANS:
            member.forget()

    @property
    def common_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.common or {}).values())

    def close(self) -> None:
        for member in self.members.values():
            member.inputs.close()
        self.base.checkpoint.close()

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batch:
    def __init__(
        self,
        jobs: Sequence[Job],
        terms: Terms,
        progress: Callable[[Progress], None],
        stop: Callable[[], int | None],
        tell: Callable[[Outcome], None],
    ) -> None:
        self._jobs, self._terms = jobs, terms
        self._progress, self._stop, self._tell = progress, stop, tell
        self.outcomes: dict[int, Outcome] = {}

    def in_order(self) -> list[Outcome]:
        return [self.outcomes[index] for index in sorted(self.outcomes)]

    def end(self, index: int, status: Status, message: str = "", **more: object) -> None:
        outcome = Outcome(self._jobs[index], status, message, **more)  # type: ignore[arg-type]
        self.outcomes[index] = outcome
        self._tell(outcome)

    def refuse(self, index: int, error: ConverterError) -> None:
        self.end(index, "refused", str(error))

    def fail(self, index: int, error: ConverterError) -> None:
        self.end(index, "refused" if isinstance(error, ConversionRefused) else "failed", str(error))

    def plan(self) -> list[_Group]:
        """Plan every job; those that are refused have their outcome, the others are in groups."""
        clashes = refuse_clashes(self._jobs)
        for index, error in clashes.items():
            self.refuse(index, error)
        by_key: dict[tuple[str, str, str], list[tuple[int, Job]]] = {}
        for index, job in enumerate(self._jobs):
            if index not in clashes:
                try:
                    named = with_base(job, offline=self._terms.offline)
                    by_key.setdefault(group_key(named), []).append((index, named))
                except ConverterError as exc:
                    self.refuse(index, exc)
        groups = []
        for jobs in by_key.values():
            try:
                first = jobs[0][1]
                assert first.base is not None  # noqa: S101  (`with_base` saw to it)
                group = _Group(Base(first.base, first.base_revision, offline=self._terms.offline))
            except ConverterError as exc:
                for index, _ in jobs:
                    self.refuse(index, exc)
                continue
            for index, job in jobs:
                try:
                    group.add(index, self._member(group, job))
                except ConverterError as exc:
                    self.refuse(index, exc)
            groups.append(group)
        return groups

    def _member(self, group: _Group, job: Job) -> _Member:
        offline = self._terms.offline
        inputs = Inputs(None, job.adapter, adapter_revision=job.adapter_revision, offline=offline, opened=group.base)
        try:
            return _Member(job, inputs, self._terms)
        except BaseException:
            inputs.close()
            raise

    def end_as_planned(self, group: _Group) -> None:
        """What would be done."""
        for index, member in group.members.items():
            status: Status = "planned" if member.known is None else "nothing to do"
            self.end(
                index,
                status,
                fingerprint=member.known or "",
                output_bytes=member.output_bytes,
                shared_bytes=group.common_bytes,
                notes=member.plan.notes,
            )

    def convert(self, group: _Group) -> None:
        """Make what is not made already of a group, in as few passes over the base as the memory allows."""
        pending: dict[int, _Member] = {}
        for index, member in group.members.items():
            if member.known is None:
                pending[index] = member
            else:
                self.end(index, "nothing to do", fingerprint=member.known, output_bytes=member.output_bytes)
        if not pending:
            _tidy(group.members.values())
            return
        try:
            given = self._given(group)
            self._refuse_if_too_full(group, pending)
            total = group.base.checkpoint.nbytes
            group.base.fetch(lambda name, done: self.show(Progress("fetching", done, total, name)))
            indices = list(pending)
            with _Place(group, given, self.terms) as place:
                passes = deque(budget.passes([member.need for member in pending.values()], self.terms.resources))
                while passes:
                    numbers = passes.popleft()
                    some = {indices[number]: pending[indices[number]] for number in numbers}
                    if (one := self._fitting(group, some, given, place)) is None:
                        passes.extendleft([numbers[len(numbers) // 2 :], numbers[: len(numbers) // 2]])
                        continue
                    one.run()
                    for member in some.values():
                        member.forget()
        except Interrupted as exc:
            exc.args = (f"{exc}; what is done is kept: the same command goes on with it",)
            raise
        except ConverterError as exc:
            for index in [index for index in pending if index not in self.outcomes]:
                self.fail(index, exc)

    def _fitting(
        self, group: _Group, some: Mapping[int, _Member], given: Sequence[Given], place: _Place
    ) -> _Pass | None:
        """A pass for some outputs; None if they leave too little memory to what can't be cut, and fewer may not."""
        resources = self.terms.resources
        try:
            one = _Pass(self, group, some, given, place)
        except BadRecipe:
            if len(some) == 1:
                raise
            return None
        too_large = resources.memory is None and one.memory > budget.DEFAULT
        return None if too_large and len(some) > 1 else one

    def _given(self, group: _Group) -> list[Given]:
        """Shards in common that an output has already: one of this batch that is made, or that of `--against`."""
        made = [member for member in group.members.values() if member.known is not None]
        folders = [member.destination.out for member in made]
        if self._terms.against is not None:
            folders.insert(0, self._terms.against)
        given: list[Given] = []
        member = next(iter(group.members.values()))
        device = torch_device(member.plan.device).type
        for folder in folders:
            left = {n: t for n, t in (group.common or {}).items() if not any(n in one.names for one in given)}
            if not left:
                break
            try:
                given += given_by(folder, member.plan, left, member.inputs, device)
            except ConverterError:
                if folder == self._terms.against:
                    raise
        if self._terms.against is not None and not given:
            raise BadOutput(
                f"--against {self._terms.against}: none of its shards can be linked to: it was made of another base, "
                "by another recipe or version, or each of its shards has something of its adapter"
            )
        return given

    def _refuse_if_too_full(self, group: _Group, pending: dict[int, _Member]) -> None:
        """Room for what is in common, once or as often as it must be copied, and for what is each output's own."""
        common = group.common_bytes
        by_disk: dict[int, list[_Member]] = {}
        for member in pending.values():
            by_disk.setdefault(_disk_of(member.destination.out), []).append(member)
        home = _disk_of(next(iter(group.members.values())).destination.out)
        for disk, members in by_disk.items():
            copies = len(members) if disk != home or self.terms.link == "copy" else 0
            own = sum(member.output_bytes - common for member in members)
            members[0].destination.refuse_if_too_full(own + common * (copies + (disk == home)))

    @property
    def terms(self) -> Terms:
        return self._terms

    def stopped(self) -> int | None:
        return self._stop()

    def show(self, progress: Progress) -> None:
        self._progress(progress)


class _Place:
    """Where the shards in common are made: a staging folder of the batch's own, which is gone when they are linked.

    What an earlier run left there is gone on with, if it is of the same plan.
    """

    def __init__(self, group: _Group, given: Sequence[Given], terms: Terms) -> None:
        first = next(iter(group.members.values()))
        plan, given_count, count = laid_out(first.plan, given, group.common or {})
        self.count = given_count + count
        """Shards of each output that are not its own: those given, then those made here."""
        self.production: Production | None = None
        self.need = 0
        inputs = Inputs(None, None, opened=group.base)
        destination = Destination(_place_of(first), inputs=inputs.folders, overwrite=False)
        _tidy([member for member in group.members.values() if member is not first])
        if not count and not destination.staging.exists():
            return
        shared = shards_of(plan, given_count, count)
        tensors = [tensor for shard in plan.shards[: self.count] for tensor in shard.tensors]
        self.need = budget.in_flight(tensors, plan.recipe, plan.resources)
        job, files = job_of(shared, inputs), [shard.file for shard in shared.shards]
        try:
            staging = Staging(destination, job, files, resume=terms.resume)
        except BadOutput:
            # What another batch left is of no use to this one; a batch that is running has the lock, and refuses again.
            staging = Staging(destination, job, files, resume=False)
        self.production = Production(shared, None, staging)

    def cut(self, reserved: int) -> None:
        """Cut the tensors as those of the outputs are cut."""
        if self.production is not None:
            self.production.cut(_cut(self.production.plan, reserved))

    @property
    def is_complete(self) -> bool:
        """Whether all of them are made."""
        return self.production is None or len(self.production.made) == sum(1 for _ in self.production.plan.tensors())

    def shards(self) -> list[GivenShard]:
        """The finished shards."""
        if self.production is None:
            return []
        return [self.production.staging.finished(shard.file) for shard in self.production.plan.shards]

    def made(self) -> list[Made]:
        return [] if self.production is None else list(self.production.made.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.production is None:
            return
        if isinstance(value, UNFINISHED_BUSINESS):
            self.production.keep()
        if value is None:
            self.production.staging.spend()
        self.production.close(value)


class _Pass:
    """One pass over a base, for some outputs and, the first time, for what they have in common."""

    def __init__(
        self, batch: _Batch, group: _Group, members: Mapping[int, _Member], given: Sequence[Given], place: _Place
    ) -> None:
        self._batch, self._group, self._given, self._place = batch, group, given, place
        self._members: dict[int, _Member] = {}
        laid: dict[int, Plan] = {}
        for index, member in members.items():
            if index in batch.outcomes:
                continue
            try:
                member.refuse_if_changed()
                laid[index] = laid_out(member.plan, given, group.common or {})[0]
            except ConverterError as exc:
                batch.fail(index, exc)
            else:
                self._members[index] = member
        reserved = budget.FIXED + place.need + sum(member.need for member in self._members.values())
        place.cut(reserved)
        self._plans = {index: _cut(plan, reserved) for index, plan in laid.items()}
        self._cut_alike()
        self.memory = max((plan.memory for plan in self._plans.values()), default=0)
        """Predicted, in bytes."""
        self._productions: dict[int, Production] = {}
        self._links: dict[int, str] = {}
        """How an output has what is not its own."""

    def _cut_alike(self) -> None:
        """A tensor that one adapter changes and others copy has one set of tiles, the smallest: it is read once."""
        smallest: dict[tuple[str, int], tuple[int, ...]] = {}
        shared = [self._place.production.plan] if self._place.production else []
        for plan in (*self._plans.values(), *shared):
            for tensor in plan.tensors():
                if not tensor.indivisible:
                    key = (tensor.name, tensor.rows)
                    smallest[key] = max(smallest.get(key, ()), tensor.tiles, key=len)
        for index, plan in self._plans.items():
            self._plans[index] = _with_tiles(plan, smallest)

    def run(self) -> None:
        """Convert, and seal each output that nothing went wrong with."""
        batch, base = self._batch, self._group.base
        of_base = Inputs(None, None, opened=base)
        failure: BaseException | None = None
        try:
            with of_base.unchanged():
                self._convert()
            digests = self._digests()
            remember(base.checkpoint, {n: d for n, d in digests.items() if n in base.checkpoint.tensors})
            for index in list(self._productions):
                total = base.checkpoint.nbytes
                batch.show(Progress("sealing", total, total, str(self._members[index].job.out)))
                self._seal(index, digests)
        except BaseException as exc:
            failure = exc
            raise
        finally:
            for production in self._productions.values():
                if isinstance(failure, UNFINISHED_BUSINESS):
                    production.keep()
                production.close(failure)

    def _convert(self) -> None:
        batch, base = self._batch, self._group.base.checkpoint
        self._open()
        if not self._productions:
            return
        plan = next(iter(self._plans.values()))
        quantizer = Quantizer(plan.recipe, torch_device(plan.device), kernels=plan.resources.kernels)
        read: dict[str, int] = {}
        with one_thread(), crew_of(plan) as crew:
            for target, made in convert_tensors(self._targets(), base.folder, quantizer, crew, batch.stopped):
                self._take(target, made)
                read[target.tensor.name] = target.tensor.source.nbytes
                batch.show(Progress("converting", sum(read.values()), base.nbytes, target.tensor.name))

    def _open(self) -> None:
        terms = self._batch.terms
        for index, member in self._members.items():
            plan = self._plans[index]
            files = [shard.file for shard in plan.shards]
            try:
                staging = Staging(member.destination, job_of(plan, member.inputs), files, resume=terms.resume)
            except ConverterError as exc:
                self._batch.fail(index, exc)
                continue
            try:
                # At once: the output that has them may be gone when this one is sealed.
                for given, planned in zip(self._given, plan.shards, strict=False):
                    self._links[index] = staging.take(given.shard, planned.file, terms.link)
            except ConverterError as exc:
                staging.__exit__(type(exc), exc, None)
                self._batch.fail(index, exc)
                continue
            adapter = member.inputs.adapter.folder if member.inputs.adapter else None
            self._productions[index] = Production(plan, adapter, staging, index, files[: self._place.count])

    def _targets(self) -> Iterator[list[Target]]:
        """Each tensor of the base in its order on disk, with all that becomes of it."""
        shared = self._place.production
        names = dict.fromkeys(tensor.name for plan in self._plans.values() for tensor in plan.tensors())
        headers = self._group.base.checkpoint.tensors
        last = ("\U0010ffff", 0)
        if not self._productions:
            return
        for name in sorted(names, key=lambda n: (headers[n].file, headers[n].offset) if n in headers else last):
            alike: dict[object, list[Target]] = {}
            if shared is not None and (target := shared.target(name)) is not None:
                alike["in common"] = [replace(target, output=_IN_COMMON)]
            for index in list(self._productions):
                try:
                    target = self._productions[index].target(name)
                except ConverterError as exc:
                    self._drop(index, exc)
                    continue
                if target is not None:
                    whose = index if target.tensor.origin == "adapter" else None
                    alike.setdefault((whose, target.tensor.source, target.tensor.tiles), []).append(target)
            yield from alike.values()
            if not self._productions:
                return

    def _take(self, target: Target, made: Made | ConverterError) -> None:
        if target.output == _IN_COMMON:
            assert self._place.production is not None  # noqa: S101  (where else would it come from)
            if isinstance(made, ConverterError):
                raise made
            self._place.production.note(made)
        elif (production := self._productions.get(target.output)) is not None:
            if isinstance(made, ConverterError):
                self._drop(target.output, made)
                return
            try:
                production.note(made)
            except ConverterError as exc:
                self._drop(target.output, exc)

    def _drop(self, index: int, error: ConverterError) -> None:
        """Do without an output; what is done of it stays, where that is of use to another run."""
        production = self._productions.pop(index)
        if isinstance(error, UNFINISHED_BUSINESS):
            production.keep()
        production.close(error)
        self._batch.fail(index, error)

    def _seal(self, index: int, digests: Mapping[str, str]) -> None:
        production, member, plan = self._productions[index], self._members[index], self._plans[index]
        try:
            member.refuse_if_changed()
            for shard, planned in zip(self._place.shards(), plan.shards[len(self._given) :], strict=False):
                self._links[index] = production.staging.take(shard, planned.file, self._batch.terms.link)
            production.made |= {made.name: made for made in self._shared_made()}
            report = seal(production, member.inputs, digests, member.job.out)
        except ConverterError as exc:
            self._drop(index, exc)
            return
        del self._productions[index]
        production.close(None)
        touched = {tensor.name for tensor in plan.tensors() if tensor.is_touched}
        self._batch.end(
            index,
            "made",
            fingerprint=report.fingerprint,
            output_bytes=plan.output_bytes,
            shared_bytes=sum(shard.layout.size for shard in plan.shards[: self._place.count]),
            link=self._links.get(index, ""),
            fidelity={name: report.fidelity[name] for name in sorted(touched)},
            notes=plan.notes,
        )

    def _shared_made(self) -> list[Made]:
        return [made for given in self._given for made in given.made] + self._place.made()

    def _digests(self) -> dict[str, str]:
        """xxh3-128 of every tensor of the base that was read."""
        found = {made.name: made.digest for made in self._shared_made()}
        for production in self._productions.values():
            replaced = {tensor.name for tensor in production.plan.tensors() if tensor.origin == "adapter"}
            found |= {made.name: made.digest for made in production.made.values() if made.name not in replaced}
        return found


def _place_of(first: _Member) -> Path:
    """Beside the first output, and named by it: slices of one batch may be made at the same time."""
    key = hashlib.sha256(repr((group_key(first.job), first.destination.out.name)).encode()).hexdigest()[:12]
    return first.destination.out.parent / f".shared-{key}"


def _tidy(members: Iterable[_Member]) -> None:
    """Take away what batches left that died, and that began with one of these; not what one makes that is running."""
    for member in members:
        destination = Destination(_place_of(member), inputs=(), overwrite=False)
        if destination.staging.exists():
            with suppress(ConverterError), Staging(destination, {}, (), resume=False) as staging:
                staging.spend()


def _cut(plan: Plan, reserved: int) -> Plan:
    """The plan with tiles that leave `reserved` bytes of the budget: the same for all outputs of a pass."""
    cut, memory, _ = budget.cut_into_tiles(list(plan.tensors()), plan.recipe, plan.resources, reserved)
    return replace(_with_tiles(plan, {(tensor.name, tensor.rows): tensor.tiles for tensor in cut}), memory=memory)


def _with_tiles(plan: Plan, tiles: Mapping[tuple[str, int], tuple[int, ...]]) -> Plan:
    """The plan with some of its tensors, by name and rows, cut otherwise."""
    shards = tuple(
        replace(s, tensors=tuple(replace(t, tiles=tiles.get((t.name, t.rows), t.tiles)) for t in s.tensors))
        for s in plan.shards
    )
    return replace(plan, shards=shards)


def _disk_of(path: Path) -> int:
    return next(folder for folder in (path, *path.parents) if folder.exists()).stat().st_dev

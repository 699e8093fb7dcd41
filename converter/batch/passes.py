"""One pass over a base for several outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from converter.batch.sharing import Given, laid_out
from converter.errors import ConverterError, Interrupted
from converter.observer import Observer, Progress
from converter.pipeline import convert_tensors, crew_of, one_thread, seal
from converter.plan import budget
from converter.plan.budget import recut, with_tiles
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan
from converter.read.digests import remember_digests
from converter.seal.production import Made, Production, Target
from converter.seal.staging import Staging
from converter.tile import Encoding
from converter.write.journal import job_of

if TYPE_CHECKING:
    from converter.batch.batch import Batch
    from converter.batch.members import Group, Member
    from converter.batch.place import Place

MISSED = "shards of an earlier output, gone or changed since they were looked at, were made again"
_IN_COMMON = -1
"""The number of what is nobody's own, among the numbers of outputs."""


class Pass:
    """One pass over a base, for some outputs and, the first time, for what they have in common."""

    def __init__(
        self, batch: Batch, group: Group, members: Mapping[int, Member], given: Sequence[Given], place: Place
    ) -> None:
        self._batch, self._group, self._place = batch, group, place
        # An earlier output may be gone, or written to, since it was looked at: its tensors are made then.
        self._given = [one for one in given if one.shard.is_as_it_was()]
        self._shared = len(self._given) + place.count
        """Shards of each output that are not its own: those given, then those of the place."""
        self._notes = (MISSED,) if len(self._given) < len(given) else ()
        self._members: dict[int, Member] = {}
        laid: dict[int, Plan] = {}
        for index, member in members.items():
            if index in batch.outcomes:
                continue
            try:
                member.refuse_if_changed()
                laid[index] = laid_out(member.plan, self._given, place.names)[0]
            except ConverterError as exc:
                batch.fail(index, exc)
            else:
                self._members[index] = member
        # What is in common needs nothing more: while it is in flight, that much less of the outputs' own is.
        reserved = budget.together([member.need for member in self._members.values()])
        place.cut(reserved)
        self._plans = {index: recut(plan, reserved) for index, plan in laid.items()}
        self._cut_alike()
        self.memory = max((plan.memory for plan in self._plans.values()), default=0)
        """Predicted, in bytes."""
        self._productions: dict[int, Production] = {}
        self._links: dict[int, str] = {}
        """How an output has what is not its own."""

    def _cut_alike(self) -> None:
        """A tensor that one adapter changes and others copy has one set of tiles, the smallest: it is read once."""
        smallest: dict[tuple[str, int], tuple[int, ...]] = {}
        for plan in self._plans.values():
            for tensor in plan.tensors():
                if tensor.whole is None:
                    key = (tensor.name, tensor.rows)
                    smallest[key] = max(smallest.get(key, ()), tensor.tiles, key=len)
        for index, plan in self._plans.items():
            self._plans[index] = with_tiles(plan, smallest)

    def run(self) -> None:
        """Convert, and seal each output that nothing went wrong with."""
        batch, base = self._batch, self._group.base
        of_base = Inputs(None, None, opened=base)
        try:
            with of_base.unchanged():
                self._convert()
            digests = self._digests()
            remember_digests(base.checkpoint, digests)
            for index in list(self._productions):
                total = base.checkpoint.nbytes
                batch.show(Progress("sealing", total, total, str(self._members[index].job.out)))
                self._seal(index, digests)
        except BaseException as exc:
            for production in self._productions.values():
                production.fail(exc)
            raise
        finally:
            for production in self._productions.values():
                production.close()

    def _convert(self) -> None:
        batch, base = self._batch, self._group.base.checkpoint
        self._open()
        if not self._productions:
            return
        plan = next(iter(self._plans.values()))
        encoding = Encoding(plan)
        read: set[str] = set()
        done = 0

        def convert(tensors: Iterator[list[Target]]) -> None:
            nonlocal done
            with one_thread(), crew_of(plan, encoding) as crew:
                for target, made in convert_tensors(tensors, base.folder, encoding, crew, Observer(stop=batch.stop)):
                    self._take(target, made)
                    name, nbytes = target.tensor.name, target.tensor.source.nbytes
                    done += 0 if name in read else nbytes
                    read.add(name)
                    batch.show(Progress("converting", done, base.nbytes, name))

        convert(self._targets())
        for index in list(self._productions):
            try:
                convert(self._targets_of_adapter(index))
            except Interrupted:
                raise
            except ConverterError as exc:
                self._drop(index, exc)

    def _open(self) -> None:
        terms = self._batch.terms
        for index, member in self._members.items():
            plan = self._plans[index]
            files = [shard.file for shard in plan.shards]
            adapter = member.inputs.adapter.folder if member.inputs.adapter else None
            try:
                with ExitStack() as stack:
                    job = job_of(plan, member.inputs)
                    staging = stack.enter_context(Staging(member.destination, job, files, resume=terms.resume))
                    # At once: the output that has them may be gone when this one is sealed.
                    for given, planned in zip(self._given, plan.shards, strict=False):
                        self._links[index] = staging.take(given.shard, planned.file, terms.link)
                    stack.pop_all()  # from here on the production closes it
                    self._productions[index] = Production(plan, adapter, staging, index, files[: self._shared])
            except ConverterError as exc:
                self._batch.fail(index, exc)

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
                if target is not None and target.tensor.origin == "base":
                    alike.setdefault((target.tensor.source, target.tensor.tiles), []).append(target)
            yield from alike.values()
            if not self._productions:
                return

    def _targets_of_adapter(self, index: int) -> Iterator[list[Target]]:
        """What replaces tensors of the base in one output: where it can't be read, no other wants it."""
        for targets in self._productions[index].targets():
            yield targets
            if index not in self._productions:
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
        if (production := self._productions.pop(index, None)) is None:
            return  # it was dropped already
        production.fail(error)
        production.close()
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
        production.close()
        touched = {tensor.name for tensor in plan.tensors() if tensor.is_touched}
        self._batch.end(
            index,
            "made",
            fingerprint=report.fingerprint,
            output_bytes=plan.output_bytes,
            shared_bytes=sum(shard.layout.size for shard in plan.shards[: self._shared]),
            link=self._links.get(index, ""),
            fidelity={name: report.fidelity[name] for name in sorted(touched)},
            notes=plan.notes + production.staging.notes + self._notes + tuple(self._group.notes),
            checked=report.checked,
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

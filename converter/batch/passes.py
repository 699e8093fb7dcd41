"""One pass over a base for several outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from converter.batch.finished import figures_of
from converter.batch.memory import reserved
from converter.batch.observer import PassBegun
from converter.batch.planned import JobGroup, PlannedJob
from converter.batch.run import BatchRun
from converter.batch.shared_shards import SharedShards
from converter.batch.sharing import EarlierShard, Layout, lay_out
from converter.errors import ConverterError, Interrupted
from converter.pipeline import convert_tensors, crew_of, seal
from converter.plan.budget import recut, with_tiles
from converter.plan.inputs import Inputs
from converter.plan.plan import CutAs
from converter.read.digests import remember_digests
from converter.seal.production import Made, Production, Target
from converter.seal.receipt import read_receipt
from converter.threads import one_thread
from converter.tile import Encoding
from converter.write.journal import job_of

MADE_AGAIN = "shards of an earlier output, gone or changed since they were looked at, were made again"


@dataclass(frozen=True)
class _Output:
    """One output of a pass, while it is made."""

    index: int
    job: PlannedJob
    layout: Layout
    production: Production


class Pass:
    """One pass over a base: makes some outputs and, in the first pass, the shards that all outputs share."""

    def __init__(
        self,
        run: BatchRun,
        group: JobGroup,
        jobs: Mapping[int, PlannedJob],
        earlier: Sequence[EarlierShard],
        shared: SharedShards,
    ) -> None:
        self._run, self._group, self._shared = run, group, shared
        # An earlier output may be gone, or written to, since it was looked at: its tensors are made again then.
        self._earlier = [one for one in earlier if one.shard.is_as_it_was()]
        self._notes = (MADE_AGAIN,) if len(self._earlier) < len(earlier) else ()
        self._jobs: dict[int, PlannedJob] = {}
        layouts: dict[int, Layout] = {}
        for index, job in jobs.items():
            if index in run.outcomes:
                continue
            try:
                job.refuse_if_changed()
                layouts[index] = lay_out(job.plan, self._earlier, shared.names)
            except ConverterError as exc:
                run.outcomes.fail(index, exc)
            else:
                self._jobs[index] = job
        # Shared tensors need no memory of their own: while one is in flight, that much less of the others is.
        bytes_reserved = reserved([job.costs.reserve for job in self._jobs.values()])
        shared.cut(bytes_reserved)
        recut_layouts = {i: replace(laid, plan=recut(laid.plan, bytes_reserved)) for i, laid in layouts.items()}
        self._layouts = _cut_alike(recut_layouts)
        self.memory = max((layout.plan.memory for layout in self._layouts.values()), default=0)
        """Predicted, in bytes above the imports."""
        self._outputs: dict[Production, _Output] = {}

    def convert(self) -> None:
        """Convert, and seal each output that nothing went wrong with."""
        base = self._group.base
        self._run.observer.begun(PassBegun(base.checkpoint.folder.label, len(self._jobs), self.memory))
        of_base = Inputs(None, None, opened=base)
        try:
            with of_base.unchanged():
                self._convert()
            digests = self._digests()
            remember_digests(base.checkpoint, digests)
            for output in list(self._outputs.values()):
                total = base.checkpoint.nbytes
                self._run.observer.tell("sealing", total, total, str(output.job.job.out))
                self._seal(output, digests)
        except BaseException as exc:
            for production in self._outputs:
                production.fail(exc)
            raise
        finally:
            for production in self._outputs:
                production.close()

    def _convert(self) -> None:
        for index, layout in self._layouts.items():
            try:
                self._open(index, self._jobs[index], layout)
            except ConverterError as exc:
                self._run.outcomes.fail(index, exc)
        if not self._outputs:
            return
        observer, base = self._run.observer, self._group.base.checkpoint
        plan = next(iter(self._layouts.values())).plan
        encoding = Encoding(plan, self._run.options.open_device(plan.device), self._run.options.check_tiles)
        read: set[str] = set()
        done = 0

        def convert(tensors: Iterator[list[Target]]) -> None:
            nonlocal done
            with one_thread(), crew_of(plan, encoding) as crew:
                for target, made in convert_tensors(tensors, base.folder, encoding, crew, observer):
                    self._take(target, made)
                    name, nbytes = target.tensor.name, target.tensor.source.nbytes
                    done += 0 if name in read else nbytes
                    read.add(name)
                    observer.tell("converting", done, base.nbytes, name)

        convert(self._targets())
        for output in list(self._outputs.values()):
            try:
                convert(self._targets_of_adapter(output))
            except Interrupted:
                raise
            except ConverterError as exc:
                self._drop(output, exc)

    def _open(self, index: int, job: PlannedJob, layout: Layout) -> None:
        options, plan = self._run.options, layout.plan
        files = [shard.file for shard in plan.shards]
        adapter = job.inputs.adapter.folder if job.inputs.adapter else None
        with ExitStack() as stack:
            staging = self._run.access.staging(job.destination, job_of(plan, job.inputs), files, resume=options.resume)
            stack.enter_context(staging)
            # At once: the output that has them may be gone when this one is sealed.
            for file, earlier in layout.reused.items():
                staging.take(earlier.shard, file, options.link)
            stack.pop_all()  # from here on the production closes it
            production = Production(plan, adapter, staging, layout.not_own)
        self._outputs[production] = _Output(index, job, layout, production)

    def _targets(self) -> Iterator[list[Target]]:
        """Each tensor of the base in its order on disk, with all that becomes of it."""
        shared = self._shared.production
        names = dict.fromkeys(tensor.name for layout in self._layouts.values() for tensor in layout.plan.tensors())
        headers = self._group.base.checkpoint.tensors
        last = ("\U0010ffff", 0)
        if not self._outputs:
            return
        for name in sorted(names, key=lambda n: (headers[n].file, headers[n].offset) if n in headers else last):
            alike: dict[object, list[Target]] = {}
            if shared is not None and (target := shared.target(name)) is not None:
                alike["shared"] = [target]
            for output in list(self._outputs.values()):
                try:
                    target = output.production.target(name)
                except ConverterError as exc:
                    self._drop(output, exc)
                    continue
                if target is not None and target.tensor.origin == "base":
                    like = (target.tensor.source, target.tensor.cut_as, target.tensor.tiles)
                    alike.setdefault(like, []).append(target)
            yield from alike.values()
            if not self._outputs:
                return

    def _targets_of_adapter(self, output: _Output) -> Iterator[list[Target]]:
        """What replaces tensors of the base in one output: where it can't be read, no other output wants it."""
        for targets in output.production.targets():
            yield targets
            if output.production not in self._outputs:
                return

    def _take(self, target: Target, made: Made | ConverterError) -> None:
        """Note what became of a tensor. An output that it failed for is dropped; a shared tensor fails the pass."""
        assert target.owner is not None  # noqa: S101  (they come from productions)
        output = self._outputs.get(target.owner)
        try:
            if isinstance(made, ConverterError):
                raise made
            if output is not None or target.owner is self._shared.production:
                target.owner.note(made)
        except ConverterError as exc:
            if target.owner is self._shared.production:
                raise
            if output is not None:  # else it was dropped before
                self._drop(output, exc)

    def _drop(self, output: _Output, error: ConverterError) -> None:
        """Do without an output; what is done of it stays, where another run can resume it."""
        if self._outputs.pop(output.production, None) is None:
            return  # it was dropped already
        output.production.fail(error)
        output.production.close()
        self._run.outcomes.fail(output.index, error)

    def _seal(self, output: _Output, digests: Mapping[str, str]) -> None:
        production, job, layout = output.production, output.job, output.layout
        try:
            job.refuse_if_changed()
            for shard in layout.shared_shards():
                production.staging.take(self._shared.finished(shard), shard.file, self._run.options.link)
            production.made |= {made.name: made for made in self._made_elsewhere()}
            report = seal(production, job.inputs, digests, job.job)
        except ConverterError as exc:
            self._drop(output, exc)
            return
        del self._outputs[production]
        production.close()
        self._run.outcomes.end(
            output.index,
            "made",
            fingerprint=report.fingerprint,
            notes=layout.plan.notes + production.staging.notes + self._notes + tuple(self._group.notes),
            checked=report.checked,
            **figures_of(read_receipt(job.destination.out) or {}),  # nothing of an output that is gone again
        )

    def _made_elsewhere(self) -> list[Made]:
        """The tensors of shards that are no output's own."""
        return [made for earlier in self._earlier for made in earlier.made] + self._shared.made()

    def _digests(self) -> dict[str, str]:
        """xxh3-128 of every tensor of the base that was read."""
        found = {made.name: made.digest for made in self._made_elsewhere()}
        for production in self._outputs:
            replaced = {tensor.name for tensor in production.plan.tensors() if tensor.origin == "adapter"}
            found |= {made.name: made.digest for made in production.made.values() if made.name not in replaced}
        return found


def _cut_alike(layouts: Mapping[int, Layout]) -> dict[int, Layout]:
    """A tensor that one adapter changes and others copy gets one set of tiles, the smallest: it is read once."""
    smallest: dict[CutAs, tuple[int, ...]] = {}
    for layout in layouts.values():
        for tensor in layout.plan.tensors():
            if tensor.whole is None:
                smallest[tensor.cut_as] = max(smallest.get(tensor.cut_as, ()), tensor.tiles, key=len)
    return {index: replace(layout, plan=with_tiles(layout.plan, smallest)) for index, layout in layouts.items()}

"""The shards that the outputs of a batch share, while they are made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Container, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from converter.batch.jobs import group_key
from converter.batch.planned import JobGroup, PlannedJob
from converter.batch.run import BatchRun
from converter.batch.sharing import EarlierShard, lay_out
from converter.errors import BadOutput, ConverterError, WriteFailed
from converter.plan.budget import recut
from converter.plan.inputs import Inputs
from converter.plan.plan import ShardPlan
from converter.read.folder import LocalFolder
from converter.read.strict_json import read_json
from converter.seal.destination import Destination
from converter.seal.link import ReusableShard
from converter.seal.production import Made, Production
from converter.seal.staging import Staging
from converter.write.journal import job_of

_OUTPUTS = ".outputs"
"""Names the outputs that share the shards of a folder, first the one that the folder is named after."""


class SharedShards:
    """The shards that outputs share, made in a staging folder of the batch's own and linked into each output.

    The folder, `.shared-….partial`, lies next to the output of the job `next_to`. It is removed when every output has
    its links. What an earlier run of the same plan left in it is resumed.
    """

    def __init__(self, run: BatchRun, group: JobGroup, next_to: PlannedJob, earlier: Sequence[EarlierShard]) -> None:
        layout = lay_out(next_to.plan, earlier, group.shared or {})
        plan = layout.plan_of_shared()
        self.names = frozenset(tensor.name for tensor in plan.tensors())
        """Tensors that are made here."""
        self.production: Production | None = None
        """None where earlier outputs have all that is shared."""
        inputs = Inputs(None, None, opened=group.base)
        destination = _destination(_name_of(next_to), inputs.folders)
        remove_leftovers(group.jobs.values(), but=destination.staging if plan.shards else None)
        if not plan.shards:
            return
        job, files = job_of(plan, inputs), [shard.file for shard in plan.shards]
        try:
            staging = run.access.staging(destination, job, files, resume=run.options.resume)
        except BadOutput:
            # What another batch left is of no use to this one; a batch that is running has the lock, and refuses again.
            staging = run.access.staging(destination, job, files, resume=False)
        outs = [next_to, *(other for other in group.jobs.values() if other is not next_to)]
        names = [os.path.relpath(other.destination.out, destination.out.parent) for other in outs]
        with suppress(WriteFailed):  # it serves to tidy up later, and nothing else
            staging.put(_OUTPUTS, json.dumps({"outputs": names}).encode())
        self.production = Production(plan, None, staging)

    def cut(self, reserved: int) -> None:
        """Cut the tensors as those of the outputs are cut."""
        if self.production is not None:
            self.production.cut(recut(self.production.plan, reserved))

    def finished(self, shard: ShardPlan) -> ReusableShard:
        """The finished file of a shared shard, whatever its name is in the layout of an output."""
        assert self.production is not None  # noqa: S101  (its tensors are among `names`)
        files = {_names(planned): planned.file for planned in self.production.plan.shards}
        return self.production.staging.finished(files[_names(shard)])

    def made(self) -> list[Made]:
        """The tensors that are made so far."""
        return [] if self.production is None else list(self.production.made.values())

    def spend(self) -> None:
        """Every output has these shards, or will never want them: the folder goes."""
        if self.production is not None:
            self.production.staging.spend()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.production is None:
            return
        if value is None:
            self.production.keep()
        else:
            self.production.fail(value)
        self.production.close()


def _names(shard: ShardPlan) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in shard.tensors)


def folder_of_shared(job: PlannedJob) -> Path:
    """The folder in which shared shards would be made next to the output of a job."""
    return _destination(_name_of(job)).staging


def remove_leftovers(jobs: Collection[PlannedJob], but: Path | None = None) -> None:
    """Remove the folders of shared shards that ended runs left: those named after one of these jobs, and those that one
    of these jobs used and that no unfinished output can use any more. A run that is alive keeps its own."""
    names = {_name_of(job) for job in jobs}
    outs = {job.destination.out for job in jobs}
    for folder in {name.parent for name in names}:
        names |= {left.with_suffix("") for left in folder.glob(".shared-*.partial") if _is_spent(left, outs)}
    for name in names:
        with suppress(ConverterError):
            destination = _destination(name)
            if destination.staging != but and destination.staging.exists():
                with Staging(destination, {}, (), resume=False) as staging:
                    staging.spend()


def _name_of(first: PlannedJob) -> Path:
    """Next to the output of the first job, and named after it: slices of one batch may run at the same time."""
    key = hashlib.sha256(repr((group_key(first.job), first.destination.out.name)).encode()).hexdigest()[:12]
    return first.destination.out.parent / f".shared-{key}"


def _destination(name: Path, inputs: Iterable[Path] = ()) -> Destination:
    """As if it were an OUT. `BadOutput` where something has that name, such as a link, which would be followed."""
    if os.path.lexists(name):
        raise BadOutput(f"{name}: is in the way of the folder for shared shards; move it away")
    return Destination(name, inputs=inputs, overwrite=False)


def _is_spent(folder: Path, outs: Container[Path]) -> bool:
    """Whether a folder of shared shards was used by one of `outs` and has no unfinished output left to serve.

    The output that it is named after doesn't count: its batch would find the folder, and does without it.
    """
    with suppress(ConverterError, OSError, ValueError), closing(LocalFolder(folder)) as local:
        names = read_json(local, _OUTPUTS).get("outputs")
        if isinstance(names, list):
            users = [Path(os.path.realpath(folder.parent / str(name))) for name in names]
            if any(out in outs for out in users):
                others = (Destination(out, inputs=(), overwrite=False) for out in users[1:])
                return not any(other.staging.exists() for other in others)
    return False

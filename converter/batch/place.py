"""Where a batch makes the shards that its outputs have in common."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Container, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from converter.batch.jobs import group_key
from converter.batch.sharing import Given, laid_out, shards_of
from converter.errors import BadOutput, ConverterError, WriteFailed
from converter.plan.budget import recut
from converter.plan.inputs import Inputs
from converter.read.folder import LocalFolder
from converter.read.strict_json import read_json
from converter.seal.destination import Destination
from converter.seal.link import ReusableShard
from converter.seal.production import Made, Production
from converter.seal.staging import Staging
from converter.write.journal import job_of
from converter.write.shard import write_file

if TYPE_CHECKING:
    from converter.batch.members import BatchOptions, Group, Member

_OUTPUTS = ".outputs"
"""Names the outputs that a place is for, first the one that it is named by."""


class Place:
    """Where the shards in common are made: a staging folder of the batch's own, which is gone when they are linked.

    What an earlier run left there is gone on with, if it is of the same plan.
    """

    def __init__(self, group: Group, beside: Member, given: Sequence[Given], terms: BatchOptions) -> None:
        plan, given_count, self.count = laid_out(beside.plan, given, group.common or {})
        """Shards that are made here."""
        self.production: Production | None = None
        inputs = Inputs(None, None, opened=group.base)
        destination = _destination(_name_of(beside), inputs.folders)
        tidy(group.members.values(), but=destination.staging if self.count else None)
        shared = shards_of(plan, given_count, self.count)
        self.names = frozenset(tensor.name for tensor in shared.tensors())
        """Tensors that are made here."""
        if not self.count:
            return
        job, files = job_of(shared, inputs), [shard.file for shard in shared.shards]
        try:
            staging = Staging(destination, job, files, resume=terms.resume)
        except BadOutput:
            # What another batch left is of no use to this one; a batch that is running has the lock, and refuses again.
            staging = Staging(destination, job, files, resume=False)
        outs = [beside, *(member for member in group.members.values() if member is not beside)]
        names = [os.path.relpath(member.destination.out, destination.out.parent) for member in outs]
        with suppress(WriteFailed):  # nobody needs it to go on
            write_file(staging.folder / _OUTPUTS, json.dumps({"outputs": names}).encode())
        self.production = Production(shared, None, staging)

    def cut(self, reserved: int) -> None:
        """Cut the tensors as those of the outputs are cut."""
        if self.production is not None:
            self.production.cut(recut(self.production.plan, reserved))

    def shards(self) -> list[ReusableShard]:
        """The finished shards."""
        if self.production is None:
            return []
        return [self.production.staging.finished(shard.file) for shard in self.production.plan.shards]

    def made(self) -> list[Made]:
        """The tensors that are made here, once they are."""
        return [] if self.production is None else list(self.production.made.values())

    def spend(self) -> None:
        """Every output has what is here, or will never want it: it goes."""
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


def place_of(member: Member) -> Path:
    """The folder in which what it has in common with others would gather."""
    return _destination(_name_of(member)).staging


def tidy(members: Collection[Member], but: Path | None = None) -> None:
    """Take away what batches left that died, and that began with one of these, or had one of these in a list whose
    others are made since; not what one makes that is running, nor what is wanted again."""
    names = {_name_of(member) for member in members}
    outs = {member.destination.out for member in members}
    for folder in {name.parent for name in names}:
        names |= {place.with_suffix("") for place in folder.glob(".shared-*.partial") if _is_left(place, outs)}
    for name in names:
        with suppress(ConverterError):
            destination = _destination(name)
            if destination.staging != but and destination.staging.exists():
                with Staging(destination, {}, (), resume=False) as staging:
                    staging.spend()


def _name_of(first: Member) -> Path:
    """Beside the first output, and named by it: slices of one batch may be made at the same time."""
    key = hashlib.sha256(repr((group_key(first.job), first.destination.out.name)).encode()).hexdigest()[:12]
    return first.destination.out.parent / f".shared-{key}"


def _destination(name: Path, inputs: Iterable[Path] = ()) -> Destination:
    """As if it were an OUT; `BadOutput` where something has that name, such as a link, which would be followed."""
    if os.path.lexists(name):
        raise BadOutput(f"{name}: is in the way: what the outputs have in common is made beside it")
    return Destination(name, inputs=inputs, overwrite=False)


def _is_left(place: Path, outs: Container[Path]) -> bool:
    """Whether nothing is left to be made with what is in a place for some of `outs`, unless it is for the output that
    the place is named by: its batch would find that place, and does without it where it is gone."""
    with suppress(ConverterError, OSError, ValueError), closing(LocalFolder(place)) as folder:
        names = read_json(folder, _OUTPUTS).get("outputs")
        if isinstance(names, list):
            was_for = [Path(os.path.realpath(place.parent / str(name))) for name in names]
            if any(out in outs for out in was_for):
                others = (Destination(out, inputs=(), overwrite=False) for out in was_for[1:])
                return not any(other.staging.exists() for other in others)
    return False

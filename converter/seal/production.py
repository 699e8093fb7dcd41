"""One output in the making: its shards as they fill, and the journal of what is done.

A conversion has one of these. A batch has many at a time, made from the same tiles of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from converter.errors import ConverterError, WriteFailed
from converter.quantize.agreement import Agreement
from converter.quantize.measure import Fidelity
from converter.read.folder import LocalFolder
from converter.threads import pool
from converter.write.durable import UNFINISHED
from converter.write.journal import Entry, Sampled
from converter.write.shard import Writer

if TYPE_CHECKING:
    from converter.plan.plan import Plan, ShardPlan, TensorPlan
    from converter.read.folder import Folder
    from converter.seal.staging import Staging
    from converter.write.shard import ShardWriter


@dataclass(frozen=True)
class Target:
    """A tensor of one output: what becomes of it, and what takes its bytes."""

    tensor: TensorPlan
    adapter: Folder | None
    """Where its factors are read, or the values that replace the base's."""
    writer: Writer
    owner: Production | None = None
    """The output that is to note it; None where nothing is made."""


@dataclass(frozen=True)
class Made:
    """A tensor that is converted and written."""

    name: str
    fidelity: Fidelity
    digest: str
    """xxh3-128 of the bytes that were read."""
    nbytes: int
    """The number of these bytes."""
    agreement: Agreement | None = None
    """Of its tiles that were made again on the CPU; None if none was."""


class Production:
    """The making of one output in its staging folder.

    A shard is opened when the first of its tensors is asked for, and gets its name when the last one is made. Shards
    in `given` come from elsewhere and are not made. `close` closes the staging folder, too; so does a failure to begin.
    After `fail` the folder stays if another run can resume it.
    """

    def __init__(self, plan: Plan, adapter: Folder | None, staging: Staging, given: Iterable[str] = ()) -> None:
        self.staging = staging
        self.made: dict[str, Made] = {}
        self.done = 0
        """Bytes that were read for the tensors that are made."""
        self._adapter, self._given = adapter, frozenset(given)
        self.cut(plan)
        self._writers: dict[str, ShardWriter] = {}
        self._left: dict[str, set[str]] = {}
        self._syncing: Future[None] | None = None
        self._background: ThreadPoolExecutor | None = None
        with ExitStack() as stack:
            stack.enter_context(staging)
            stack.callback(self._close_writers)
            if plan.resources.threads > 1:
                self._background = pool(1, "sync")
                stack.callback(self._background.shutdown)  # waits for a sync, whose failure nobody needs any more
            self._open_things = stack.pop_all()

    def cut(self, plan: Plan) -> None:
        """Take the same plan with other tiles."""
        self.plan = plan
        self._planned = {
            tensor.name: (shard, tensor)
            for shard in plan.shards
            if shard.file not in self._given
            for tensor in shard.tensors
        }

    def targets(self) -> Iterator[list[Target]]:
        """The tensors that are left to be made, in the order of the shards."""
        for name in self._planned:
            if (target := self.target(name)) is not None:
                yield [target]

    def target(self, name: str) -> Target | None:
        """Where a tensor goes. None if there is nothing to do for it."""
        if name not in self._planned:
            return None
        shard, tensor = self._planned[name]
        if shard.file not in self._left:
            self._open(shard)
        if name in self.made:
            return None
        return Target(tensor, self._adapter, self._writers[shard.file], self)

    def left(self) -> list[TensorPlan]:
        """The tensors that are left to be made, in their order, once what an earlier run left is taken in."""
        begun = {entry.shard for entry in self.staging.journal.entries.values()}
        for shard in self.plan.shards:
            if shard.file in begun - self._given and shard.file not in self._left:
                self._open(shard)
        return [tensor for name, (_, tensor) in self._planned.items() if name not in self.made]

    def written(self, tensor: TensorPlan) -> dict[str, bytes]:
        """The bytes of a tensor that is made, by output name. Raises what reading raises."""
        shard, _ = self._planned[tensor.name]
        writer, entries = self._writers.get(shard.file), self.staging.journal.entries
        states = writer.states(tensor.name) if writer is not None else entries[tensor.name].states
        file = shard.file if (self.staging.folder / shard.file).exists() else shard.file + UNFINISHED
        found = {output: raw.encode() for output, raw in states.items()}
        with closing(LocalFolder(self.staging.folder)) as folder:
            for output in tensor.outputs:
                if not output.is_state:
                    raw = bytearray(output.nbytes)
                    folder.read_into(file, shard.layout.offsets[output.name], memoryview(raw))
                    found[output.name] = bytes(raw)
        return found

    @property
    def sampled(self) -> Sampled | None:
        """The text that the model wrote; None: it hasn't yet."""
        return self.staging.journal.sampled

    def note_sampled(self, sampled: Sampled) -> None:
        """Keep that text for another run. `WriteFailed`."""
        self.staging.journal.commit_sampled(sampled)

    def note(self, made: Made) -> None:
        """Take note of a tensor that was written. Every few seconds the notes are made durable.

        `WriteFailed` if this fails now, or has failed for earlier tensors in the background.
        """
        shard, journal = self._planned[made.name][0], self.staging.journal
        if self._syncing is not None and self._syncing.done():
            self._await_sync()
        writer, figures = self._writers[shard.file], made.fidelity
        pieces, states = writer.pieces(made.name), writer.states(made.name)
        found = figures.error, figures.survival, made.digest, made.agreement, figures.output_error
        journal.add(Entry(made.name, shard.file, pieces, states, *found))
        self._count(made)
        self._left[shard.file].discard(made.name)
        if not self._left[shard.file]:
            self._finish(shard.file)
        elif self._syncing is None and journal.is_due(self.plan.resources.journal_seconds):
            self._sync_in_the_background()

    def fail(self, reason: BaseException) -> bool:
        """Say why the output won't be finished. What another run can resume is made durable; what none can resume is
        removed when this is closed. Whether there is something to resume."""
        if isinstance(reason, ConverterError) and reason.resumable:
            return self.keep()
        self.staging.fail(reason)
        return False

    def keep(self) -> bool:
        """Make durable what is there. Whether another run of the same command can resume it."""
        with suppress(Exception):  # what fails here must not hide the first failure
            self.make_durable()
        for file, writer in self._writers.items():
            if writer.is_lost:
                self.staging.journal.forget(file)
        return not self.staging.journal.is_empty and self.staging.is_there()

    def _open(self, shard: ShardPlan) -> None:
        names = {tensor.name for tensor in shard.tensors}
        if shard.file in self.staging.stored and names <= self.staging.journal.entries.keys():
            resumed = names
        else:
            self._writers[shard.file] = self.staging.writer(shard)
            resumed = self._writers[shard.file].resumed
        self._left[shard.file] = names - resumed
        for tensor in shard.tensors:
            if tensor.name in resumed:
                entry = self.staging.journal.entries[tensor.name]
                fidelity = Fidelity(entry.error, entry.survival, entry.output_error)
                self._count(Made(tensor.name, fidelity, entry.digest, tensor.source.nbytes, entry.agreement))
        if not self._left[shard.file] and shard.file in self._writers:
            self._finish(shard.file)

    def _count(self, made: Made) -> None:
        self.made[made.name] = made
        self.done += made.nbytes

    def _finish(self, file: str) -> None:
        self.make_durable()
        with self._writers.pop(file) as writer:
            try:
                writer.finish()
            except WriteFailed:
                if writer.is_lost:
                    self.staging.journal.forget(file)
                raise
        self.staging.finish_soon(file, writer.hashed)

    def make_durable(self) -> None:
        """Make durable what is written, then note it."""
        self._await_sync()
        self._make_durable(list(self._writers.values()), self.staging.journal.take())

    def _sync_in_the_background(self) -> None:
        """The same while more is made, for a disk takes its time."""
        if self._background is None:
            self.make_durable()
            return
        writers, entries = list(self._writers.values()), self.staging.journal.take()
        self._syncing = self._background.submit(self._make_durable, writers, entries)

    def _make_durable(self, writers: Sequence[ShardWriter], entries: Sequence[Entry]) -> None:
        """The journal must not name what isn't durable, whatever shard it lies in."""
        for writer in writers:
            writer.sync()
        self.staging.journal.commit(entries)

    def _await_sync(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def close(self) -> None:
        """Close the shards and the staging folder."""
        self._open_things.close()

    def _close_writers(self) -> None:
        while self._writers:
            self._writers.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if value is not None and self.fail(value):
                by = value.resumed_by if isinstance(value, ConverterError) else ConverterError.resumed_by
                value.args = (f"{value}; what is done is kept in {self.staging.folder}: {by}",)
        finally:
            self.close()

"""One output that is being made: its shards as they fill, the journal of what is done, and its end.

A conversion makes one of these, a batch many at a time, from the same tiles of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from converter.errors import ConverterError, WriteFailed
from converter.quantize.measure import Fidelity
from converter.threads import pool
from converter.write.journal import Entry
from converter.write.shard import ShardWriter, Writer

if TYPE_CHECKING:
    from converter.plan.plan import Plan, ShardPlan, TensorPlan
    from converter.read.folder import Folder
    from converter.seal.staging import Staging


@dataclass(frozen=True)
class Target:
    """A tensor of one output: what happens to it, and who takes its bytes."""

    tensor: TensorPlan
    adapter: Folder | None
    """Where its factors, or the values that replace the base's, are read."""
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
    """How many those were."""


class Production:
    """The making of one output in its staging folder.

    A shard is opened when the first of its tensors is asked for, and gets its name when the last one is made. Shards
    in `given` come from elsewhere and are not made. `close` closes the staging folder, too, and so does a failure to
    begin. After `fail` the folder stays where another run can resume it.
    """

    def __init__(self, plan: Plan, adapter: Folder | None, staging: Staging, given: Iterable[str] = ()) -> None:
        self.staging = staging
        self.made: dict[str, Made] = {}
        self.done = 0
        """Bytes that were read for what is made."""
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
        """Take the same plan with its tensors cut into other tiles."""
        self.plan = plan
        self._planned = {
            tensor.name: (shard, tensor)
            for shard in plan.shards
            if shard.file not in self._given
            for tensor in shard.tensors
        }

    def targets(self) -> Iterator[list[Target]]:
        """What is left to be made, tensor by tensor, in the order of the shards."""
        for name in self._planned:
            if (target := self.target(name)) is not None:
                yield [target]

    def target(self, name: str) -> Target | None:
        """Where a tensor goes; None where there is nothing to do for it."""
        if name not in self._planned:
            return None
        shard, tensor = self._planned[name]
        if shard.file not in self._left:
            self._open(shard)
        if name in self.made:
            return None
        return Target(tensor, self._adapter, self._writers[shard.file], self)

    def note(self, made: Made) -> None:
        """Take note of a tensor that was written: in the journal, durably, every few seconds.

        Raises `WriteFailed`; also what making earlier ones durable met with, behind the caller's back.
        """
        shard, journal = self._planned[made.name][0], self.staging.journal
        if self._syncing is not None and self._syncing.done():
            self._await_sync()
        writer, figures = self._writers[shard.file], made.fidelity
        pieces, states = writer.pieces(made.name), writer.states(made.name)
        journal.add(Entry(made.name, shard.file, pieces, states, figures.error, figures.survival, made.digest))
        self._count(made)
        self._left[shard.file].discard(made.name)
        if not self._left[shard.file]:
            self._finish(shard.file)
        elif journal.is_due() and self._syncing is None:
            self._sync_behind()

    def fail(self, reason: BaseException) -> bool:
        """Say why the output won't be finished: what another run can resume is made durable, what none can is thrown
        away at the end. Whether there is something to resume."""
        if isinstance(reason, ConverterError) and reason.resumable:
            return self.keep()
        self.staging.fail(reason)
        return False

    def keep(self) -> bool:
        """Make durable what is there. Whether another run of the same command can resume it."""
        with suppress(Exception):  # whatever fails here must not hide what went wrong
            self._sync()
        for file, writer in self._writers.items():
            if writer.is_lost:
                self.staging.journal.forget(file)
        return bool(self.staging.journal.entries) and self.staging.is_there()

    def _open(self, shard: ShardPlan) -> None:
        journal = self.staging.journal
        writer = ShardWriter(self.staging.folder, shard, journal.written(shard.file))
        self._writers[shard.file] = writer
        self._left[shard.file] = {tensor.name for tensor in shard.tensors} - writer.resumed
        for tensor in shard.tensors:
            if tensor.name in writer.resumed:
                entry = journal.entries[tensor.name]
                fidelity = Fidelity(entry.error, entry.survival)
                self._count(Made(tensor.name, fidelity, entry.digest, tensor.source.nbytes))
        if not self._left[shard.file]:
            self._finish(shard.file)

    def _count(self, made: Made) -> None:
        self.made[made.name] = made
        self.done += made.nbytes

    def _finish(self, file: str) -> None:
        self._sync()
        with self._writers.pop(file) as writer:
            try:
                writer.finish()
            except WriteFailed:
                if writer.is_lost:
                    self.staging.journal.forget(file)
                raise
        self.staging.digest_soon(file)

    def _sync(self) -> None:
        """Make durable what is there, then note it."""
        self._await_sync()
        self._make_durable(list(self._writers.values()), self.staging.journal.take())

    def _sync_behind(self) -> None:
        """The same while more is made: the disk takes its time, and nobody need wait for it."""
        if self._background is None:
            self._sync()
            return
        writers, entries = list(self._writers.values()), self.staging.journal.take()
        self._syncing = self._background.submit(self._make_durable, writers, entries)

    def _make_durable(self, writers: Sequence[ShardWriter], entries: Sequence[Entry]) -> None:
        """A line of the journal must not speak of what isn't durable, in whatever shard it lies."""
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
                kept = f"what is done is kept in {self.staging.folder}: the same command goes on with it"
                value.args = (f"{value}; {kept}",)
        finally:
            self.close()

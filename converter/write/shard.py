"""A shard: tensors at planned offsets, written in any order. The file gets its name when its bytes are durable."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import xxhash

from converter.plan.layout import header_json
from converter.write.durable import LOCAL_DISK, UNFINISHED, Disk, writing
from converter.write.flusher import Flusher
from converter.write.sha256 import Begun, GrowingSha256

if TYPE_CHECKING:
    from converter.plan.plan import ShardPlan
    from converter.quantize.format import Output

FLUSH_BYTES = 64_000_000
"""After so many new bytes a file is synced while more is written, so that the end need not wait for all of them."""


@dataclass(frozen=True)
class Piece:
    """Bytes of an output tensor that were written at once."""

    output: str
    start: int
    """Bytes from the tensor's start."""
    length: int
    digest: str
    """xxh3-64 of the bytes."""


Written = Mapping[str, tuple[Sequence[Piece], Mapping[str, str]]]
"""Tensor name → its pieces, and its quant states by output name."""


class Writer(Protocol):
    """Takes the bytes of output tensors, a piece at a time, in any order and from several threads."""

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        """Take `raw` as the bytes of a tensor from its byte `start`; the number of bytes."""


class ShardWriter:
    """One output file. `write` puts bytes at a tensor's place; `finish` adds quant states and header, and the name.

    Closed without `finish`, the file stays for another run. That run passes what the journal tells of it as `written`.
    Every piece is read and compared with its digest before it counts; `resumed` names the tensors that are there. A
    file that must be changed but has a second name stays as it is, for it is somebody else's, too; a new one is made.
    """

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        written: Written | None = None,
        *,
        disk: Disk = LOCAL_DISK,
        flush_bytes: int = FLUSH_BYTES,
        read_again: bool = False,
    ) -> None:
        """`read_again`: whether somebody on this machine reads the file soon, so that the file cache should keep it."""
        self._plan, self._disk = plan, disk
        self._owner = {output.name: tensor.name for tensor in plan.tensors for output in tensor.outputs}
        self._state_names = {t.name: [output.name for output in t.outputs if output.is_state] for t in plan.tensors}
        self._outputs = {output.name: output for tensor in plan.tensors for output in tensor.outputs}
        self._path = folder / plan.file
        self._temporary = folder / (plan.file + UNFINISHED)
        self._counting = threading.Condition()
        self._writers = 0
        self._lost = self._finished = False
        self._flusher: Flusher | None = None
        self._growing: GrowingSha256 | None = None
        self._count_nothing()
        with writing(self._temporary, plan.layout.size):
            self._open(written or {})
            if not self.is_finished and plan.layout.size > flush_bytes:
                self._begin_to_flush(flush_bytes, read_again)

    def _begin_to_flush(self, flush_bytes: int, read_again: bool) -> None:
        """Sync the file while it is written, and hash it, if nothing that comes first in it is known last."""
        try:
            if not any(self._state_names.values()):
                header, _ = self._frame()
                self._growing = GrowingSha256(self._disk, header, forget=not read_again)
                for piece in itertools.chain.from_iterable(self._pieces.values()):
                    self._growing.wrote(self._plan.layout.offsets[piece.output] + piece.start, piece.length)
            self._flusher = Flusher(self._sync_and_hash, flush_bytes)
        except BaseException:
            self._discard(lost=not self.resumed)
            raise

    def _sync_and_hash(self) -> None:
        end = 0 if self._growing is None else self._growing.whole
        self._disk.sync_bytes(self._descriptor)
        if self._growing is not None:
            self._growing.follow(self._descriptor, end)

    def _open(self, written: Written) -> None:
        unfinished = self._temporary
        if written and self._path.exists():
            self._temporary = self._path  # an earlier run finished it
        is_new = not (written and self._temporary.exists())
        self._descriptor = (self._disk.create if is_new else self._disk.open_again)(self._temporary)
        try:
            if not is_new:
                self._resume(written)
                if not (self.is_finished and self._is_whole()):
                    if os.fstat(self._descriptor).st_nlink > 1:  # somebody else's, too: not written to
                        is_new = True
                        self._begin_anew(unfinished)
                    elif self.is_finished:
                        self._disk.rename(self._path, unfinished)
                    self._temporary = unfinished
            if not self.is_finished:
                self._disk.reserve(self._descriptor, self._plan.layout.size)
                self._disk.sync_folder(self._path.parent)
        except BaseException:
            self._discard(lost=is_new)
            raise

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run gave the file its name, and all of it is there."""
        return self._temporary == self._path

    @property
    def is_lost(self) -> bool:
        """Whether a sync failed. What the disk has is then unknown, and the file is removed at the end."""
        return self._lost

    @property
    def hashed(self) -> Begun | None:
        """The sha256 of the beginning of the file, once it is finished; None if it is to be taken of the whole file."""
        return None if self._growing is None else self._growing.begun()

    def pieces(self, tensor: str) -> tuple[Piece, ...]:
        """What was written of a tensor, quant states excepted."""
        return tuple(self._pieces[tensor])

    def states(self, tensor: str) -> dict[str, str]:
        """A tensor's quant states."""
        # By their names: other threads add those of other tensors meanwhile.
        return {name: self._states[name].decode() for name in self._state_names[tensor] if name in self._states}

    def sync(self) -> None:
        """Make durable what was written."""
        with writing(self._temporary):
            descriptor, flusher = self._descriptor, self._flusher
            self._synchronize((lambda: self._disk.sync_bytes(descriptor)) if flusher is None else flusher.sync)

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        """Put `raw` at byte `start` of a tensor; the number of bytes. A quant state is kept until the end: its place
        depends on the lengths of those before it."""
        if self._outputs[name].is_state:
            self._states[name] = bytes(raw)
        if start < 0 or start + len(raw) > self._outputs[name].nbytes:
            raise AssertionError(f"{name}: bytes {start} to {start + len(raw)} of {self._outputs[name].nbytes}")
        if name in self._left:
            self._put(raw, self._plan.layout.offsets[name] + start)
            piece = Piece(name, start, len(raw), xxhash.xxh3_64_hexdigest(raw))
            with self._counting:
                self._left[name] -= len(raw)
                self._pieces[self._owner[name]].append(piece)
                if self._growing is not None:
                    self._growing.wrote(self._plan.layout.offsets[name] + start, len(raw))
        return len(raw)

    def finish(self) -> int:
        """Write quant states and header, make the file durable, give it its name. The file's size in bytes."""
        if self.is_finished:
            self._finished = True
            self._close()
            return self._path.stat().st_size
        unwritten = [name for name, left in self._left.items() if left] or self._states_missing()
        if unwritten:
            raise AssertionError(f"{self._plan.file}: {unwritten[0]} was not written")
        header, states = self._frame()
        end = self._plan.layout.states_offset + len(states)
        self._put(states, self._plan.layout.states_offset)
        self._put(header, 0)
        with writing(self._temporary):
            if self._flusher is not None:
                self._synchronize(self._flusher.end)
            self._disk.cut(self._descriptor, end)
            self._synchronize(lambda: self._disk.sync(self._descriptor))
            self._close()
            self._disk.commit(self._temporary, self._path)
        self._finished = True
        return end

    def _states_missing(self) -> list[str]:
        return [output.name for output in self._outputs.values() if output.is_state and output.name not in self._states]

    def _frame(self) -> tuple[bytes, bytes]:
        """What stands before the tensors, and the quant states, which stand behind them."""
        layout = self._plan.layout
        start = 8 + layout.header_bytes
        placed: list[tuple[Output, int, int]] = [
            (self._outputs[name], offset - start, self._outputs[name].nbytes) for name, offset in layout.offsets.items()
        ]
        states = b""
        for output in self._outputs.values():
            if output.is_state:
                raw = self._states[output.name]
                placed.append((output, layout.states_offset + len(states) - start, len(raw)))
                states += raw
        header = header_json(placed).ljust(layout.header_bytes)
        if len(header) > layout.header_bytes:
            raise AssertionError(f"{self._plan.file}: header of {len(header)} bytes, room for {layout.header_bytes}")
        return len(header).to_bytes(8, "little") + header, states

    def _put(self, raw: bytes | memoryview, offset: int) -> None:
        with writing(self._temporary, self._plan.layout.size), self._kept_open() as descriptor:
            self._disk.write(descriptor, raw, offset)
            if (flusher := self._flusher) is not None:
                self._synchronize(lambda: flusher.wrote(len(raw)))

    def _synchronize(self, sync: Callable[[], None]) -> None:
        if self._lost:
            raise OSError(errno.EIO, "a sync failed before")
        try:
            sync()
        except OSError:
            # What the disk has is unknown now, and a second sync would report success: the file is lost.
            self._lost = True
            raise

    def _count_nothing(self) -> None:
        """Count nothing as written."""
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        self._left = {o.name: o.nbytes for o in self._outputs.values() if not o.is_state}
        self._states: dict[str, bytes] = {}
        self.resumed: set[str] = set()

    def _begin_anew(self, unfinished: Path) -> None:
        """Leave a file to others that have it, too, and make another in its place."""
        self._close()
        self._count_nothing()
        self._temporary = unfinished
        self._descriptor = self._disk.create(unfinished)
        self._path.unlink(missing_ok=True)  # so that the next run, too, resumes the new one

    def _resume(self, written: Written) -> None:
        """Count as written what is still there as it was written."""
        for tensor in self._plan.tensors:
            if tensor.name not in written:
                continue
            pieces, states = written[tensor.name]
            left = {output.name: output.nbytes for output in tensor.outputs if not output.is_state}
            if not all(piece.output in left and self._is_there(piece) for piece in pieces):
                continue
            for piece in pieces:
                left[piece.output] -= piece.length
            if any(left.values()) or set(states) != {output.name for output in tensor.outputs if output.is_state}:
                continue
            self._left |= left
            self._states |= {name: raw.encode() for name, raw in states.items()}
            self._pieces[tensor.name] = list(pieces)
            self.resumed.add(tensor.name)

    def _is_there(self, piece: Piece) -> bool:
        digest, at = xxhash.xxh3_64(), self._plan.layout.offsets[piece.output] + piece.start
        end = at + piece.length
        while at < end:
            raw = self._read(min(8 << 20, end - at), at)
            if not raw:
                return False
            digest.update(raw)
            at += len(raw)
        return bool(digest.hexdigest() == piece.digest)

    def _is_whole(self) -> bool:
        """Whether all of a finished file is there, to its last byte."""
        if self.resumed != {tensor.name for tensor in self._plan.tensors}:
            return False
        header, states = self._frame()
        end = self._plan.layout.states_offset
        ends = os.fstat(self._descriptor).st_size == end + len(states)
        return ends and self._read(len(header), 0) == header and self._read(len(states), end) == states

    def _read(self, count: int, offset: int) -> bytes:
        """Bytes that an earlier run wrote. Empty if the disk fails: then the tensor is made again."""
        try:
            return self._disk.read(self._descriptor, count, offset)
        except OSError:
            return b""

    @contextmanager
    def _kept_open(self) -> Iterator[int]:
        """The descriptor, which is not closed meanwhile: a closed one's number may soon be another file's."""
        with self._counting:
            if self._descriptor < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._writers += 1
        try:
            yield self._descriptor
        finally:
            with self._counting:
                self._writers -= 1
                self._counting.notify_all()

    def _close(self) -> None:
        with self._counting:
            self._counting.wait_for(lambda: not self._writers)
            # Only once: a close that fails has closed the descriptor all the same.
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._disk.close(descriptor)

    def _discard(self, *, lost: bool) -> None:
        # What fails here must not hide the first failure.
        if self._growing is not None:
            self._growing.stop()
        if self._flusher is not None:
            try:
                self._flusher.end()
            except OSError:
                lost = True
        with contextlib.suppress(OSError):
            self._close()
        if lost:
            with contextlib.suppress(OSError):
                self._temporary.unlink()

    def close(self) -> None:
        """Close the file. An unfinished one stays, unless a sync failed."""
        if not self._finished:
            self._discard(lost=self._lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

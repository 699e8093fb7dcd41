"""A shard file: tensors at planned offsets, in any order; the file gets its name when its bytes are durable."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import xxhash

from converter.errors import WriteFailed
from converter.plan.layout import header_json
from converter.threads import no_thread

if TYPE_CHECKING:
    from converter.plan.plan import ShardPlan
    from converter.quantize.format import Output

UNFINISHED = ".unfinished"
"""Suffix of a file whose bytes are not all there yet."""


FLUSH_BYTES = 64_000_000
"""Written bytes after which the disk is set to work, so that it doesn't wait for the end."""


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


class _Flusher:
    """Makes a file's bytes durable behind the writers' backs."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting = 0
        self._ended = False
        self._failure: OSError | None = None
        self._syncing = threading.Lock()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            raise no_thread("flush", exc) from exc

    def wrote(self, count: int) -> None:
        """Take note of `count` bytes; raises what an earlier flush met with."""
        if self._failure is not None:
            raise self._failure
        with self._changed:
            self._waiting += count
            if self._waiting >= FLUSH_BYTES:
                self._changed.notify()

    def sync(self) -> None:
        """Make durable what was written. The system tells of a failure only once, to whoever asks first: one asks at a
        time, and all hear of it."""
        with self._syncing:
            if self._failure is not None:
                raise self._failure
            try:
                os.fdatasync(self._descriptor)
            except OSError as exc:
                self._failure = exc
                raise

    def end(self) -> None:
        """Stop; raises what a flush met with, for a failed one can't be repeated: the file is lost."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._waiting >= FLUSH_BYTES)
                if self._ended:
                    return
                self._waiting = 0
            try:
                self.sync()
            except OSError:
                return


class Writer(Protocol):
    """Takes the bytes of output tensors, a piece at a time, in any order and from several threads."""

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        """Take `raw` as the bytes of a tensor from its byte `start`; the number of bytes."""


class ShardWriter:
    """One output file. `write` puts bytes at a tensor's place, `finish` the header.

    Left without `finish`, what was written stays for a run that is told of it by `written` (tensor name → its pieces
    and quant states); that run looks at every piece before it relies on it, and says in `resumed` which tensors are
    there. A file that would have to be written to and has a second name is left as it is, and a new one made.
    """

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        written: Written | None = None,
    ) -> None:
        self._plan = plan
        self._owner = {output.name: tensor.name for tensor in plan.tensors for output in tensor.outputs}
        self._state_names = {t.name: [output.name for output in t.outputs if output.is_state] for t in plan.tensors}
        self._lost = False
        self._path = folder / plan.file
        self._temporary = folder / (plan.file + UNFINISHED)
        self._outputs = {output.name: output for tensor in plan.tensors for output in tensor.outputs}
        self._counting = threading.Condition()
        self._writers = 0
        self._count_nothing()
        self._finished = False
        self._flusher: _Flusher | None = None
        with writing(self._temporary):
            if written and self._path.exists():
                self._temporary = self._path  # an earlier run finished it
            going_on = bool(written) and self._temporary.exists()
            self._descriptor = _open_again(self._temporary) if going_on else create(self._temporary)
            try:
                if going_on and written:
                    self._resume(written)
                if going_on and not (self.is_finished and self._is_whole()):
                    unfinished = folder / (plan.file + UNFINISHED)
                    if _has_second_name(self._descriptor):
                        going_on = False
                        self._begin_anew(unfinished)
                    elif self.is_finished:
                        self._path.rename(unfinished)
                    self._temporary = unfinished
                if self._temporary != self._path:
                    _reserve(self._descriptor, plan.layout.size)
                    sync_folder(folder)
                large = plan.layout.size > FLUSH_BYTES
                self._flusher = _Flusher(self._descriptor) if large else None
            except BaseException:
                self._discard(lost=not going_on)
                raise

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run gave the file its name, and all of it is there."""
        return self._temporary == self._path

    @property
    def is_lost(self) -> bool:
        """Whether a sync failed: what the disk has is unknown, and the file won't stay."""
        return self._lost

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
            flusher = self._flusher
            self._synchronize(os.fdatasync if flusher is None else lambda _: flusher.sync())

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        """Put `raw` at byte `start` of a tensor; the number of bytes. A quant state, whose place depends on the length
        of those before it, is remembered until the end."""
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
        return len(raw)

    def finish(self) -> int:
        """Write quant states and header, make the file durable, give it its name. Its size in bytes."""
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
            if (flusher := self._flusher) is not None:
                self._synchronize(lambda _: flusher.end())
            os.ftruncate(self._descriptor, end)
            self._synchronize(os.fsync)
            self._close()
            commit(self._temporary, self._path)
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
        view = memoryview(raw)
        with writing(self._temporary), self._kept_open() as descriptor:
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
            if (flusher := self._flusher) is not None:
                self._synchronize(lambda _: flusher.wrote(len(raw)))

    def _synchronize(self, by: Callable[[int], None]) -> None:
        if self._lost:
            raise OSError(errno.EIO, "a sync failed before")
        try:
            by(self._descriptor)
        except OSError:
            # What the disk has now is unknown, and asking again would say that all is well: the file is lost.
            self._lost = True
            raise

    def _count_nothing(self) -> None:
        """Count nothing as written."""
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        self._left = {o.name: o.nbytes for o in self._outputs.values() if not o.is_state}
        self._states: dict[str, bytes] = {}
        self.resumed: set[str] = set()

    def _begin_anew(self, unfinished: Path) -> None:
        """Let go of a file that others may have, too, and make another one in its place."""
        self._close()
        self._count_nothing()
        self._temporary = unfinished
        self._descriptor = create(unfinished)
        self._path.unlink(missing_ok=True)  # the next run, too, goes on with the new one

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
        """Of what an earlier run wrote; nothing where the disk can't give it back, for then it is made anew."""
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError:
            return b""

    @contextmanager
    def _kept_open(self) -> Iterator[int]:
        """The descriptor, which stays this file's meanwhile: once it is closed, its number may be another file's."""
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
            # Once only: a close that fails has closed all the same.
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _discard(self, *, lost: bool) -> None:
        # Whatever fails here must not hide what went wrong.
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

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_file(path: Path, raw: bytes) -> None:
    """A small file: its bytes, made durable, then its name."""
    temporary = path.with_name(path.name + UNFINISHED)
    with writing(path):
        with os.fdopen(create(temporary), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        commit(temporary, path)


def create(path: Path) -> int:
    """A descriptor of a new file, whatever stood in its place: what a link or a pipe leads to is not written to."""
    path.unlink(missing_ok=True)
    # The mode is the umask's business: files of mode 0600 break shared machines and containers.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _open_again(path: Path) -> int:
    """A descriptor of a file that an earlier run began."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def _has_second_name(descriptor: int) -> bool:
    """Whether a file may be somebody else's, too: then it is not written to."""
    return os.fstat(descriptor).st_nlink > 1


def commit(temporary: Path, path: Path) -> None:
    """Give a durable file its name, and make the name durable."""
    temporary.rename(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and their names durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk says into one line that names the file."""
    try:
        yield
    except OSError as exc:
        raise WriteFailed(f"{path}: {exc.strerror or exc}") from exc


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is known at the start of a file and not at its end."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)  # a filesystem that can't reserve

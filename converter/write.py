"""A shard file: tensors at planned offsets, in any order; the file gets its name when its bytes are durable."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from converter.errors import WriteFailed
from converter.layout import header_json

if TYPE_CHECKING:
    from converter.layout import Output
    from converter.plan import ShardPlan

UNFINISHED = ".unfinished"
"""Suffix of a file whose bytes are not all there yet."""


FLUSH_BYTES = 64_000_000
"""Written bytes after which the disk is set to work, so that it doesn't wait for the end."""


class _Flusher:
    """Makes a file's bytes durable behind the writers' backs."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting = 0
        self._ended = False
        self._failure: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def wrote(self, count: int) -> None:
        """Take note of `count` bytes; raises what an earlier flush met with."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._waiting += count
            if self._waiting >= FLUSH_BYTES:
                self._changed.notify()

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
                os.fdatasync(self._descriptor)
            except OSError as exc:
                self._failure = exc
                return


class ShardWriter:
    """One output file. `write` puts bytes at a tensor's place, `finish` the header; leaving without it discards."""

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self._plan = plan
        self._path = folder / plan.file
        self._temporary = folder / (plan.file + UNFINISHED)
        self._outputs = {output.name: output for tensor in plan.tensors for output in tensor.outputs}
        self._left = {o.name: o.nbytes for o in self._outputs.values() if not o.is_state}
        self._counting = threading.Lock()
        self._states: dict[str, bytes] = {}
        self._finished = False
        self._flusher: _Flusher | None = None
        with writing(self._temporary):
            # The mode is the umask's business: files of mode 0600 break shared machines and containers.
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _reserve(self._descriptor, plan.layout.size)
                large = plan.layout.size > FLUSH_BYTES
                self._flusher = _Flusher(self._descriptor) if large else None
            except BaseException:
                self._discard()
                raise

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        """Put `raw` at byte `start` of a tensor; the number of bytes. A quant state, whose place depends on the length
        of those before it, is remembered until the end."""
        if self._outputs[name].is_state:
            self._states[name] = bytes(raw)
        if start < 0 or start + len(raw) > self._outputs[name].nbytes:
            raise AssertionError(f"{name}: bytes {start} to {start + len(raw)} of {self._outputs[name].nbytes}")
        if name in self._left:
            self._put(raw, self._plan.layout.offsets[name] + start)
            with self._counting:
                self._left[name] -= len(raw)
        return len(raw)

    def finish(self) -> int:
        """Write quant states and header, make the file durable, give it its name. Its size in bytes."""
        layout = self._plan.layout
        start = 8 + layout.header_bytes
        placed: list[tuple[Output, int, int]] = [
            (self._outputs[name], offset - start, self._outputs[name].nbytes) for name, offset in layout.offsets.items()
        ]
        end = layout.states_offset
        states = [output.name for output in self._outputs.values() if output.is_state]
        unwritten = [name for name, left in self._left.items() if left] + [n for n in states if n not in self._states]
        if unwritten:
            raise AssertionError(f"{self._plan.file}: {unwritten[0]} was not written")
        for name in states:
            raw = self._states[name]
            self._put(raw, end)
            placed.append((self._outputs[name], end - start, len(raw)))
            end += len(raw)
        header = header_json(placed).ljust(layout.header_bytes)
        if len(header) > layout.header_bytes:
            raise AssertionError(f"{self._plan.file}: header of {len(header)} bytes, room for {layout.header_bytes}")
        self._put(len(header).to_bytes(8, "little") + header, 0)
        with writing(self._temporary):
            if self._flusher is not None:
                self._flusher.end()
            os.ftruncate(self._descriptor, end)
            os.fsync(self._descriptor)
            self._close()
            commit(self._temporary, self._path)
        self._finished = True
        return end

    def _put(self, raw: bytes | memoryview, offset: int) -> None:
        view = memoryview(raw)
        with writing(self._temporary):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count
            if self._flusher is not None:
                self._flusher.wrote(len(raw))

    def _close(self) -> None:
        # Once only: a close that fails has closed all the same, and the number may by now be another file's.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _discard(self) -> None:
        # The folder is staging: what stays there harms nobody, and must not hide what went wrong.
        with contextlib.suppress(OSError):
            if self._flusher is not None:
                self._flusher.end()
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._discard()


def write_file(path: Path, raw: bytes) -> None:
    """A small file: its bytes, made durable, then its name."""
    temporary = path.with_name(path.name + UNFINISHED)
    with writing(path):
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        commit(temporary, path)


def commit(temporary: Path, path: Path) -> None:
    """Give a durable file its name, and make the name durable."""
    temporary.rename(path)
    sync_folder(path.parent)


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
        import errno

        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)  # a filesystem that can't reserve

"""Files that last: the calls that change a disk, and the order that leaves each name with all of its bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.errors import WriteFailed

UNFINISHED = ".unfinished"
"""Suffix of a file that has not all of its bytes yet."""


_FICLONE = 0x40049409
"""`linux/fs.h`."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Disk:
    """The local disk. Whatever changes a file of ours, or makes a change last, is called here.

    Every call raises `OSError`. A test passes a disk that is full, fails, waits or records.
    """

    def create(self, path: Path) -> int:
        """A descriptor of a new file. What had its name loses it: a link or a pipe is not written through."""
        path.unlink(missing_ok=True)
        # The umask decides on the mode: files of mode 0600 break shared machines and containers.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_again(self, path: Path) -> int:
        """A descriptor of a file that an earlier run began. No link is followed."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def read(self, descriptor: int, count: int, offset: int) -> bytes:
        """At most `count` bytes from byte `offset`; none at the end of the file."""
        return os.pread(descriptor, count, offset)

    def write(self, descriptor: int, raw: bytes | memoryview, offset: int) -> None:
        """Write all of `raw` at byte `offset`."""
        left = memoryview(raw)
        while left:
            count = os.pwrite(descriptor, left, offset)
            left, offset = left[count:], offset + count

    def append(self, descriptor: int, raw: bytes) -> None:
        """Write all of `raw` at the end of a file that was opened for that."""
        left = memoryview(raw)
        while left:
            left = left[os.write(descriptor, left) :]

    def reserve(self, descriptor: int, size: int) -> None:
        """Take the space of `size` bytes now, so that a full disk is known at a file's start and not at its end."""
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(descriptor, size)  # this filesystem can't reserve

    def forget(self, descriptor: int, start: int, count: int) -> None:
        """Let the file cache forget the pages in which these bytes lie, if they are durable: no more than a hint."""
        first = start // _PAGE * _PAGE  # the system keeps a page of which it is told a part
        os.posix_fadvise(descriptor, first, start + count - first, os.POSIX_FADV_DONTNEED)

    def cut(self, descriptor: int, size: int) -> None:
        """Let the file end after `size` bytes."""
        os.ftruncate(descriptor, size)

    def sync_bytes(self, descriptor: int) -> None:
        """Make the bytes of a file durable, and its size."""
        os.fdatasync(descriptor)

    def sync(self, descriptor: int) -> None:
        """Make a file durable, with all that is known of it."""
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, path: Path, other: Path) -> None:
        path.rename(other)

    def link(self, path: Path, other: Path) -> None:
        """Give a file another name. Both names are one file then."""
        os.link(path, other, follow_symlinks=False)

    def clone(self, source: int, target: int) -> None:
        """Let two files share their space on disk until either is written to; where the filesystem can."""
        fcntl.ioctl(target, _FICLONE, source)

    def copy(self, source: int, target: int) -> None:
        """Append what is left of one file to another."""
        while raw := os.read(source, 8 << 20):
            self.append(target, raw)

    # What is made of these

    def commit(self, temporary: Path, path: Path) -> None:
        """Give a durable file its name, and make the name durable."""
        self.rename(temporary, path)
        self.sync_folder(path.parent)

    def put(self, path: Path, raw: bytes) -> None:
        """A small file: first its bytes, made durable, then its name. `WriteFailed`."""
        temporary = path.with_name(path.name + UNFINISHED)
        with writing(path, len(raw)):
            descriptor = self.create(temporary)
            try:
                self.append(descriptor, raw)
                self.sync(descriptor)
            finally:
                self.close(descriptor)
            self.commit(temporary, path)

    def make_folder(self, folder: Path) -> None:
        """Make a folder, and those above it that are missing, and their names durable."""
        if not folder.is_dir():
            self.make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            self.sync_folder(folder.parent)


LOCAL_DISK = Disk()


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an `OSError` into a `WriteFailed`: one line that names the file.

    Of a full disk it also says what the file needs, if `size` is known, what the disk has, and what to do.
    """
    try:
        yield
    except OSError as exc:
        said = exc.strerror or str(exc)
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            needs = "" if size is None else f"{size:,} bytes are needed for this file, "
            said += f": {needs}{_room_for(path, exc.errno)}; make room there"
        raise WriteFailed(f"{path}: {said}") from exc


def _room_for(path: Path, code: int) -> str:
    if code == errno.EDQUOT:
        return "your quota on its disk is used up"
    try:
        return f"its disk has {shutil.disk_usage(path.parent).free:,} free"
    except OSError:  # a disk that doesn't even answer that
        return "its disk has none left"

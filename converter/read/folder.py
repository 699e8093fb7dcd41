"""A folder of named files that can be read in pieces.

Nothing is mapped into memory: a file that shrinks under a mapping kills the process, and mapped pages count against its
memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from converter.errors import BadCheckpoint, ConversionRefused, InputChanged, ReadFailed
from converter.read.mistaken import instead_of_a_folder

PIECE = 1 << 20
"""Bytes that are read at a time of a file that is read whole: they are still in the processor's cache when used."""

Progress = Callable[[str, int], None]
"""Told a file's name and how many of its bytes are there; the count starts over where a download does."""

DEPTH = 3
"""Folders in a folder that are looked into, one in the other."""
MOST_ENTRIES = 10_000
"""Of a folder, that are looked at."""

READ_AHEAD = 64_000_000
"""Bytes of a file that the disk may be ahead of its reader."""


class Folder(Protocol):
    """Named files that can be read in pieces: a local folder, a repository on the Hub, a prefix of a bucket."""

    @property
    def label(self) -> str:
        """How messages call it."""

    @property
    def path(self) -> Path | None:
        """Where its files lie on this machine; None if they don't."""

    @property
    def repo_id(self) -> str | None:
        """Its name on the Hub; None if it was not opened by one."""

    @property
    def commit(self) -> str | None:
        """The commit that it is of; None if it has none."""

    def names(self) -> frozenset[str]:
        """The names of its plain files."""

    def inner_names(self) -> frozenset[str]:
        """The names, FOLDER/NAME, of the plain files of the folders in it, `DEPTH` folders deep at the most. They are
        read as the others are. Hidden folders are left out."""

    def size(self, name: str) -> int:
        """Bytes of one file; `BadCheckpoint` if it is not a plain file of this folder."""

    def digest(self, name: str) -> str | None:
        """What the folder itself states of a file's contents: `sha256:…` or `git-sha1:…` (a blob's id); or None."""

    def identity(self, name: str) -> list[int]:
        """Size, modification time in ns and inode of the file that has the name now, so that a file that took its place
        is told from it; empty if there is none, or no other file can take its place."""

    def state(self, name: str) -> list[int]:
        """The identity of the file that is being read, and the time of its last change of any kind in ns, which nobody
        can set; empty if nothing about it should be remembered."""

    def fetch(self, names: Iterable[str], progress: Progress | None = None) -> LocalFolder:
        """A folder of this machine in which these files are."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset`; `InputChanged` if the file ends before, `ReadFailed`
        if the disk fails."""

    def expect(self, name: str, offset: int) -> None:
        """What follows byte `offset` of a file is read next, in order: no more than a hint."""

    def close(self) -> None:
        """Let go of open files."""


class LocalFolder:
    """A folder on this machine. Plain files in it and in its own folders are seen, and links that `_follows` takes."""

    def __init__(self, path: Path, *, read_ahead: int = READ_AHEAD) -> None:
        if not is_folder(path):
            raise ConversionRefused(f"{path}: {instead_of_a_folder(path)}")
        self.path = path
        self._read_ahead = read_ahead
        self._descriptors: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        """Of each file: up to where the system was asked to read ahead."""

    @property
    def label(self) -> str:
        return str(self.path)

    def names(self) -> frozenset[str]:
        try:
            return frozenset(entry.name for entry in os.scandir(self.path) if self._is_ours(entry.name))
        except OSError as exc:
            raise BadCheckpoint(f"{self.path}: {exc.strerror}") from exc

    def inner_names(self) -> frozenset[str]:
        found: set[str] = set()
        folders = [("", 0)]
        while folders:
            inside, depth = folders.pop()
            try:
                with os.scandir(self.path / inside) as entries:
                    for entry in itertools.islice(entries, MOST_ENTRIES):
                        name = f"{inside}{entry.name}"
                        if depth and self._is_ours(name):
                            found.add(name)
                        is_open = not entry.name.startswith(".") and depth < DEPTH
                        if is_open and entry.is_dir(follow_symlinks=False) and len(found) < MOST_ENTRIES:
                            folders.append((f"{name}/", depth + 1))
            except OSError:  # may not be read
                continue
        return frozenset(found)

    def size(self, name: str) -> int:
        return os.fstat(self._open(name)).st_size

    @property
    def repo_id(self) -> None:
        return None

    @property
    def commit(self) -> None:
        return None

    def digest(self, name: str) -> None:
        return None

    def identity(self, name: str) -> list[int]:
        try:
            status = (self.path / name).stat()
        except FileNotFoundError:
            return []
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def fetch(self, names: Iterable[str], progress: Progress | None = None) -> LocalFolder:
        return self

    def state(self, name: str) -> list[int]:
        status = os.fstat(self._open(name))
        return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        descriptor = self._open(name)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as exc:
                raise ReadFailed(f"{self.path / name}: reading at byte {offset + done}: {exc.strerror}") from exc
            if count == 0:
                raise InputChanged(f"{self.path / name}: ends at byte {offset + done}, expected {offset + len(buffer)}")
            done += count

    def expect(self, name: str, offset: int) -> None:
        # Of itself the system reads ahead by less than a tile, and the disk idles while tiles are converted.
        asked, until = self._asked.get(name, offset), offset + self._read_ahead
        if not offset <= asked <= until:
            asked = offset
        if until - asked >= self._read_ahead // 2:
            _hint(self._open(name), asked, until - asked, os.POSIX_FADV_WILLNEED)
            self._asked[name] = until

    def let_go(self, name: str) -> None:
        """Close one file. If it was removed, the disk has its room again."""
        if (descriptor := self._descriptors.pop(name, None)) is not None:
            os.close(descriptor)
        self._asked.pop(name, None)

    def close(self) -> None:
        for name in [*self._descriptors]:
            self.let_go(name)

    def _open(self, name: str) -> int:
        if name not in self._descriptors:
            if not self._is_ours(name):
                raise BadCheckpoint(f"{self.path}: {name!r} is not a plain file inside the folder")
            try:
                # O_NONBLOCK: should the file become a pipe after the check, opening it must not hang.
                self._descriptors[name] = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                # A conversion reads its base from end to end: the system may read further ahead than it would.
                _hint(self._descriptors[name], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            except OSError as exc:
                raise BadCheckpoint(f"{self.path / name}: {exc.strerror}") from exc
        return self._descriptors[name]

    def _is_ours(self, name: str) -> bool:
        *inner, last = name.split("/")
        if len(inner) > DEPTH or not all(_is_plain_name(part) for part in (*inner, last)):
            return False
        path = self.path / name
        try:
            around = itertools.islice(path.parents, len(inner))
            if not all(stat.S_ISDIR(folder.lstat().st_mode) for folder in around):
                return False
            mode = path.lstat().st_mode
            return self._follows(path) if stat.S_ISLNK(mode) else stat.S_ISREG(mode)
        except (OSError, RuntimeError, ValueError):  # a loop of links; a name that no file can have
            return False

    def _follows(self, path: Path) -> bool:
        """Whether a link is followed: to a file in the folder, one of the same name anywhere, or into the Hub's cache.

        A link to any other file could bring into an output what is no part of a model.
        """
        real, here = path.resolve(strict=True), self.path.resolve()
        if not real.is_file():
            return False
        if here in real.parents:
            return True
        if here.parent.name != "snapshots":
            # Downloads into a folder were once links into the Hub's cache.
            of_the_hub = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
            return path.name == real.name or of_the_hub
        # The Hub's cache keeps snapshots/<commit>/NAME -> ../../blobs/<digest>, which may itself be a link into
        # blobs/<2 hex>/ that its repositories share. No other link leads out of a snapshot.
        repository = here.parent.parent
        return real.parent == repository / "blobs" or real.parent.parent == repository.parent / "blobs"


def link_left(folder: Folder, name: str) -> str | None:
    """What to say of a file that is a link which is not followed; None if it is none."""
    # `Path.is_symlink` raises for a name that is too long.
    if folder.path is None or name in folder.names() or not os.path.islink(folder.path / name):  # noqa: PTH114
        return None
    return (
        f"{folder.label}: {name} is a link to {(folder.path / name).readlink()}, where no file of this name is; "
        "links are followed to files of the same name: copy the file, or name its folder"
    )


def is_seen(name: str) -> bool:
    """Whether a repository's or a bucket's file is one of its folder: hidden folders are left out, and deep ones."""
    parts = name.split("/")
    is_plain = all(part not in ("", ".", "..") and "\\" not in part for part in parts)
    is_open = not any(part.startswith(".") for part in parts[:-1])
    return len(parts) <= DEPTH + 1 and is_open and is_plain and name.isprintable()


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _hint(descriptor: int, start: int, length: int, advice: int) -> None:
    with contextlib.suppress(OSError):  # a filesystem, or a system, that takes no hints
        os.posix_fadvise(descriptor, start, length, advice)


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; of a name that no file can have, too: `Path.is_dir` raises for a long one."""
    return os.path.isdir(path)  # noqa: PTH112


def pieces(folder: Folder, name: str, start: int, nbytes: int) -> Iterator[memoryview]:
    """A part of a file, at most `PIECE` bytes at a time. Each piece is overwritten by the next one."""
    buffer = memoryview(bytearray(min(PIECE, nbytes)))
    for offset in range(0, nbytes, PIECE):
        piece = buffer[: min(PIECE, nbytes - offset)]
        folder.read_into(name, start + offset, piece)
        yield piece


def read_bytes(folder: Folder, name: str, *, limit: int) -> bytes:
    """A whole small file; `BadCheckpoint` if it is larger than `limit` bytes."""
    size = folder.size(name)
    if size > limit:
        raise BadCheckpoint(f"{folder.label}: {name} has {size:,} bytes, expected at most {limit:,}")
    buffer = bytearray(size)
    folder.read_into(name, 0, memoryview(buffer))
    return bytes(buffer)

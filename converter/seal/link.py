"""A finished shard in another output: one file on disk where the filesystem can, else a copy."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converter.errors import ReadFailed
from converter.write.durable import LOCAL_DISK, UNFINISHED, Disk

How = Literal["auto", "hard", "reflink", "copy"]
"""auto: hard, else reflink, else copy."""

_NOT_HERE = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS}
"""Errors of filesystems that can't link so, or not between these two places."""


@dataclass(frozen=True)
class ReusableShard:
    """A finished shard that other outputs may have, too."""

    path: Path
    sha256: str
    identity: tuple[int, int, int]
    """Of the file when `sha256` was taken, as `identity_of` gives it."""

    def is_as_it_was(self) -> bool:
        """Whether the file is still there, and nobody has written to it."""
        try:
            return identity_of(self.path) == self.identity
        except OSError:
            return False

    def refuse_if_changed(self) -> None:
        """`ReadFailed` if the file is gone or another one."""
        if not self.is_as_it_was():
            raise ReadFailed(f"{self.path}: gone or changed since it was looked at; the same command makes it anew")


def identity_of(path: Path) -> tuple[int, int, int]:
    """Inode, size and modification time of a file. A second name changes none of them."""
    there = path.stat(follow_symlinks=False)
    return there.st_ino, there.st_size, there.st_mtime_ns


def link(source: Path, target: Path, how: How = "auto", disk: Disk = LOCAL_DISK) -> Literal["hard", "reflink", "copy"]:
    """Make `target` the same file as `source`, or one with its bytes, durably, in place of what has that name.

    Returns how. `OSError` if that is impossible. A hard link is one file with two names: to change it in place changes
    both. A reflink or a copy is a file of its own.
    """
    if how in ("auto", "hard"):
        try:
            target.unlink(missing_ok=True)
            disk.link(source, target)
            disk.sync_folder(target.parent)
            return "hard"
        except OSError as exc:
            if how == "hard" or exc.errno not in _NOT_HERE:
                raise
    temporary = target.with_name(target.name + UNFINISHED)
    with source.open("rb", buffering=0) as file:
        descriptor = disk.create(temporary)
        try:
            cloned = how != "copy" and _clone(file.fileno(), descriptor, must=how == "reflink", disk=disk)
            if not cloned:
                disk.copy(file.fileno(), descriptor)
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
    disk.commit(temporary, target)
    return "reflink" if cloned else "copy"


def _clone(source: int, target: int, *, must: bool, disk: Disk) -> bool:
    try:
        disk.clone(source, target)
    except OSError as exc:
        if must or exc.errno not in _NOT_HERE:
            raise
        return False
    return True

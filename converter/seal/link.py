"""A finished file under a second name: the same bytes on disk once, where the filesystem can."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converter.errors import ReadFailed
from converter.write.shard import UNFINISHED, commit, create, sync_folder

How = Literal["auto", "hard", "reflink", "copy"]
"""auto: hard, else reflink, else copy."""

_FICLONE = 0x40049409
"""`linux/fs.h`: share the extents of another file, to be copied when either is written to."""
_NOT_HERE = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS}
"""What filesystems say that have no such links, or not between these two places."""


@dataclass(frozen=True)
class ReusableShard:
    """A finished shard that another output may have, too."""

    path: Path
    sha256: str
    identity: tuple[int, int, int]
    """Of the file whose sha256 that is."""

    def is_as_it_was(self) -> bool:
        """Whether it is still there, and nobody has written to it."""
        try:
            return identity_of(self.path) == self.identity
        except OSError:
            return False

    def refuse_if_changed(self) -> None:
        """`ReadFailed` if it is gone, or is another file."""
        if not self.is_as_it_was():
            raise ReadFailed(f"{self.path}: gone or changed since it was looked at; the same command does without it")


def identity_of(path: Path) -> tuple[int, int, int]:
    """Inode, size and time of change of a file; a new name for it changes none of them."""
    there = path.stat(follow_symlinks=False)
    return there.st_ino, there.st_size, there.st_mtime_ns


def link(source: Path, target: Path, how: How = "auto") -> Literal["hard", "reflink", "copy"]:
    """Give `source` the name `target`, durably, in place of whatever has it; says how. `OSError` where that can't be.

    With a hard link both names are one file: whoever changes it in place changes both. With the others they are two.
    """
    if how in ("auto", "hard"):
        try:
            target.unlink(missing_ok=True)
            os.link(source, target, follow_symlinks=False)
            sync_folder(target.parent)
            return "hard"
        except OSError as exc:
            if how == "hard" or exc.errno not in _NOT_HERE:
                raise
    temporary = target.with_name(target.name + UNFINISHED)
    with source.open("rb") as bytes_in, os.fdopen(create(temporary), "wb") as bytes_out:
        cloned = False
        if how in ("auto", "reflink"):
            try:
                fcntl.ioctl(bytes_out, _FICLONE, bytes_in.fileno())
                cloned = True
            except OSError as exc:
                if how == "reflink" or exc.errno not in _NOT_HERE:
                    raise
        if not cloned:
            shutil.copyfileobj(bytes_in, bytes_out, 8 << 20)
        bytes_out.flush()
        os.fsync(bytes_out.fileno())
    commit(temporary, target)
    return "reflink" if cloned else "copy"

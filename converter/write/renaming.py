"""Whether a folder can be renamed, and how two folders swap their names."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path


def can_be_renamed(folder: Path) -> bool:
    """Whether a folder can get another name beside its own. Not if something is mounted there, if the folder above it
    is not ours to write, or if that one is sticky and the folder somebody else's."""
    above = folder.parent.stat()
    others = os.geteuid() not in (0, above.st_uid, folder.stat().st_uid)
    if (above.st_mode & stat.S_ISVTX and others) or not os.access(folder.parent, os.W_OK):
        return False
    if folder.is_mount():
        return False
    import psutil

    # `is_mount` doesn't see a folder of the same disk that is mounted elsewhere.
    with contextlib.suppress(OSError):
        return str(folder) not in {mount.mountpoint for mount in psutil.disk_partitions(all=True)}
    return True


def exchange(one: Path, other: Path) -> None:
    """Swap two folders' names: in one step, so that neither is ever absent; in two where the system can't."""
    at_fdcwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    aside = other.with_name(other.name + ".replaced")
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)

"""Another name for a folder: whether it can have one, and two folders that swap theirs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from pathlib import Path


def can_be_renamed(folder: Path) -> bool:
    """Whether a folder can have another name beside its own. A mount can't, nor what is in a folder that isn't ours to
    write, nor what is somebody else's in a sticky one."""
    above = folder.parent.stat()
    others = os.geteuid() not in (0, above.st_uid, folder.stat().st_uid)
    if (above.st_mode & stat.S_ISVTX and others) or not os.access(folder.parent, os.W_OK):
        return False
    return not folder.is_mount() and os.fsencode(folder) not in _mounts()


def _mounts() -> set[bytes]:
    """Where something is mounted; `Path.is_mount` doesn't know a folder of the same disk that is mounted elsewhere."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
        # proc_pid_mountinfo(5): the fifth field, with spaces and the like as \\ and three octal digits.
        return {re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4]) for line in lines}
    return set()


def exchange(one: Path, other: Path) -> None:
    """Swap two folders' names in one step, so that neither is ever absent; in two steps where the system can't."""
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

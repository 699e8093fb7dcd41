"""The lock of a staging folder. One living run at a time holds it; the system frees the lock of a dead one."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

LOCK = ".lock"


class Lock:
    """Held from its construction to `release`. `BlockingIOError` if another process holds it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.is_there():  # the run that held it ended just now and removed its folder
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except BaseException:
            self.release()
            raise

    def is_there(self) -> bool:
        """Whether the folder still has this lock. It may be gone, and another run's lock have its name."""
        try:
            return os.path.samestat(self._path.stat(follow_symlinks=False), os.fstat(self._descriptor))
        except OSError:
            return False

    def release(self) -> None:
        os.close(self._descriptor)

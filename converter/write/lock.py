"""The lock of a staging folder: one run at a time has it, and none that is dead."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

LOCK = ".lock"


class Lock:
    """Held from its making to `release`. `BlockingIOError` where another process has it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.is_there():  # the run that had it ended just now, and the lock went with its folder
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except BaseException:
            self.release()
            raise

    def is_there(self) -> bool:
        """Whether the folder has this lock still: it may be gone, and another run's have its name."""
        try:
            return os.path.samestat(self._path.stat(follow_symlinks=False), os.fstat(self._descriptor))
        except OSError:
            return False

    def release(self) -> None:
        os.close(self._descriptor)

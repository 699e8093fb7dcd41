"""Disks that fail, wait or tell what is asked of them, for whatever takes a `Disk`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converter.write.durable import Disk


def raising(code: int) -> Callable[..., Any]:
    """A call that fails with the system's error `code`."""

    def call(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def failing(*calls: str, code: int = errno.EIO) -> Disk:
    """A disk some of whose calls fail."""
    return failing_with(raising(code), *calls)


def failing_with(call: Callable[..., Any], *names: str) -> Disk:
    """A disk that has another call in the place of some of its own."""
    assert all(hasattr(Disk, name) for name in names)
    disk: Disk = type("OtherDisk", (Disk,), {name: staticmethod(call) for name in names})()
    return disk


class FailingOnce(Disk):
    """The first sync of a kind fails, and those after it report success, as the kernel does."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.asked: list[str] = []
        """The names of the files of which that sync was asked for."""

    def sync_bytes(self, descriptor: int) -> None:
        self._sync("sync_bytes", descriptor)

    def sync(self, descriptor: int) -> None:
        self._sync("sync", descriptor)

    def _sync(self, kind: str, descriptor: int) -> None:
        if kind == self._kind and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.asked.append(name_of(descriptor))
            if len(self.asked) == 1:
                raising(errno.EIO)()


def name_of(descriptor: int) -> str:
    """The name of an open file."""
    return Path(f"/proc/self/fd/{descriptor}").readlink().name

"""Failing calls and kills at the n-th change to a folder, whatever makes it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from converter.errors import WriteFailed


class Killed(BaseException):
    """The process is gone."""


class Trouble:
    """Has the n-th change to the folder around OUT fail, and if the process is `killed`, every one after it."""

    def __init__(self, place: Path, number: int, *, killed: bool) -> None:
        self.place, self.number, self.killed = place, number, killed
        self.count = 0
        self.locks: list[int] = []
        self.library: Any = ctypes.CDLL(None, use_errno=True)

    @property
    def happened(self) -> bool:
        return self.count >= self.number

    def strike(self) -> None:
        self.count += 1
        if self.killed and self.count >= self.number:
            raise Killed
        if self.count == self.number:
            raise OSError(errno.EIO, "Input/output error")

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *arguments: Any, **settings: Any) -> Any:
            path = path_of(target) if isinstance(target, int) else Path(target)
            folder = settings.get("dir_fd")
            if folder is not None:
                path = path_of(folder) / path
            if path.is_relative_to(self.place):
                self.strike()
            return function(target, *arguments, **settings)

        return wrapped

    def libc(self, *_: object, **__: object) -> Any:
        """The C library, of which `renameat2` swaps two folders' names."""
        trouble = self

        class Libc:
            def renameat2(self, at: int, one: bytes, *rest: Any) -> int:
                if Path(os.fsdecode(one)).is_relative_to(trouble.place):
                    trouble.strike()
                return int(trouble.library.renameat2(at, one, *rest))

        return Libc()

    def open(self, path: Any, flags: int, *arguments: Any, **settings: Any) -> int:
        descriptor = _open(path, flags, *arguments, **settings)
        if os.fspath(path).endswith(".lock"):
            self.locks.append(descriptor)
        return descriptor

    def bury(self) -> None:
        """What the system does for a dead process: its locks are free."""
        for descriptor in self.locks if self.killed else []:
            with contextlib.suppress(OSError):
                os.close(descriptor)


_open = os.open


def path_of(descriptor: int) -> Path:
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    return Path()


@contextlib.contextmanager
def trouble(place: Path, number: int, *, killed: bool) -> Iterator[Trouble]:
    trouble = Trouble(place, number, killed=killed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("mkdir", "rename", "link", "unlink", "rmdir", "fsync"):
            monkeypatch.setattr(os, name, trouble.around(getattr(os, name)))
        monkeypatch.setattr(os, "open", trouble.open)
        monkeypatch.setattr(ctypes, "CDLL", trouble.libc)
        with contextlib.suppress(Killed, WriteFailed):
            yield trouble
    trouble.bury()

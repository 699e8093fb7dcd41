"""The sha256 of a shard. Where its header is known from the start, most of it is taken while the rest is written."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple

from converter.write.durable import Disk

_AT_A_TIME = 1 << 18
"""Bytes that are hashed at a time: they stay in the processor's cache."""


class Begun(NamedTuple):
    """The sha256 of the beginning of a file."""

    digest: Any
    """Of hashlib; `update` takes the rest."""
    nbytes: int


class GrowingSha256:
    """The sha256 of a file that is being written, from its beginning to where it has no hole yet.

    `wrote` may be called by one thread while another one calls `follow`; neither by two at a time.
    """

    def __init__(self, disk: Disk, header: bytes, *, forget: bool) -> None:
        """`header`: the first bytes of the file. `forget`: whether the file cache is to forget what is hashed."""
        self._disk, self._forget = disk, forget
        self._digest = hashlib.sha256(header)
        self._hashed = self._whole = len(header)
        self._apart: dict[int, int] = {}
        """What lies behind a hole: the first byte → the byte after the last."""
        self._stopped = threading.Event()

    @property
    def whole(self) -> int:
        """The bytes at the beginning of the file that are all written."""
        return self._whole

    def wrote(self, start: int, count: int) -> None:
        """Take note of `count` bytes that were written at byte `start`."""
        if count:
            self._apart[start] = start + count
        while (end := self._apart.pop(self._whole, None)) is not None:
            self._whole = end

    def follow(self, descriptor: int, end: int) -> None:
        """Hash the file up to byte `end`; that much is whole and durable. A read that fails ends it for good."""
        first = self._hashed
        while self._hashed < end and not self._stopped.is_set():
            try:
                raw = self._disk.read(descriptor, min(_AT_A_TIME, end - self._hashed), self._hashed)
            except OSError:
                raw = b""
            if not raw:
                self.stop()
                break
            self._digest.update(raw)
            self._hashed += len(raw)
        if self._forget:
            # Pages that are free at once are used for the next bytes, so that the file doesn't fill the file cache.
            with contextlib.suppress(OSError):  # a filesystem that takes no hints
                self._disk.forget(descriptor, first, self._hashed - first)

    def stop(self) -> None:
        """End `follow` soon. Nobody gets what is hashed so far."""
        self._stopped.set()

    def begun(self) -> Begun | None:
        """What is hashed so far; None if it was stopped or a read failed."""
        return None if self._stopped.is_set() else Begun(self._digest, self._hashed)


def sha256_of(path: Path, ended: threading.Event | None = None, begun: Begun | None = None) -> str:
    """The sha256 of a file, in hex. `begun`: what is hashed of it already.

    `CancelledError` once `ended` is set: a shard takes seconds.
    """
    digest, start = begun or Begun(hashlib.sha256(), 0)
    buffer = memoryview(bytearray(_AT_A_TIME))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            if ended is not None and ended.is_set():
                raise CancelledError
            digest.update(buffer[:count])
    return digest.hexdigest()  # type: ignore[no-any-return]

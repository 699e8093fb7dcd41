"""The beginning of a file that lies elsewhere, read ahead: its header takes one request, not several."""

from __future__ import annotations

from collections.abc import Callable

HEAD_BYTES = 131_072
"""That are read ahead; the header of 1,000 tensors has some 100,000 bytes."""


class Beginning:
    """Keeps the beginning of the file that was read last, not of every file: headers are read one after the other.

    `read` gives so many bytes from the beginning of a file.
    """

    def __init__(self, read: Callable[[str, int], bytes]) -> None:
        self._read = read
        self._name, self._kept = "", b""

    def upto(self, name: str, end: int, size: int) -> bytes:
        """What is kept of the beginning of a file of `size` bytes; read now if all up to byte `end` is within it."""
        if self._name != name:
            length = min(HEAD_BYTES, size)
            if end > length:
                return b""
            self._kept = self._read(name, length)
            self._name = name
        return self._kept

    def forget(self) -> None:
        self._name, self._kept = "", b""

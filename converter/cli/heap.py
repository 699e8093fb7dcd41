"""The C library's heap: memory that was given back is not to stay with the process."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
"""malloc.h of glibc"""
LARGE = 512 << 10
"""Bytes from which a buffer gets pages of its own, which go when it is freed."""


def keep_small() -> None:
    """Fix glibc's idea of what is a large buffer; elsewhere, do nothing.

    Of itself glibc takes the largest that was freed for the measure of the next ones, and keeps whatever is smaller: a
    process grows with the largest tensor that it has seen. mallopt(3)
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)

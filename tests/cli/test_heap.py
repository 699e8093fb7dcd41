"""Memory that is given back leaves the process."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import ctypes, psutil
from converter.cli.heap import keep_small

def resident():
    return psutil.Process().memory_info().rss

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
{first}
c.free(c.malloc(30_000_000))
buffer = c.malloc(20_000_000)
ctypes.memset(buffer, 1, 20_000_000)
above = [c.malloc(1000) for _ in range(1000)]  # a heap can't give back what lies below something
before = resident()
c.free(buffer)
print(before - resident())
"""


def given_back(first: str) -> int:
    """Bytes that a process gives back of a buffer of 20 MB, after a larger one was freed."""
    program = PROGRAM.format(first=first)
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def test_what_a_large_buffer_took_goes_when_it_is_freed_whatever_was_freed_before() -> None:
    assert given_back("keep_small()") > 19_000_000
    assert given_back("") < 1_000_000, "the C library gives it back of itself: keep_small is of no use"

"""One object comes in parts, several at a time, into a file."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait

from converter.threads import pool

PART = 8 << 20
"""Bytes of a part. One that breaks off is asked for anew."""
AT_ONCE = 4
"""Parts that are downloaded at the same time. No more are in memory."""

_TICK = 0.1  # seconds after which somebody is told how far it is, and may end it


def download(
    read: Callable[[int, int], memoryview], size: int, descriptor: int, progress: Callable[[int], None]
) -> None:
    """Write an object of `size` bytes to a file. `read(start, end)` gives a part; `progress` hears the bytes done, also
    again and again while a part is waited for.

    Raises what `read` and `progress` raise, at once: what is on its way then is let go.
    """
    crew = pool(AT_ONCE, "parts")
    try:
        under_way: deque[tuple[int, Future[memoryview]]] = deque()

        def finish_one() -> None:
            start, future = under_way.popleft()
            while not wait([future], _TICK).done:
                progress(start)
            raw, done = future.result(), 0
            while done < len(raw):
                done += os.pwrite(descriptor, raw[done:], start + done)
            progress(start + len(raw))

        for start in range(0, size, PART):
            if len(under_way) == AT_ONCE:
                finish_one()
            under_way.append((start, crew.submit(read, start, min(start + PART, size))))
        while under_way:
            finish_one()
    finally:
        crew.shutdown(wait=False, cancel_futures=True)

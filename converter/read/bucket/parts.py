"""One object comes in parts, several at a time, into a file."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from converter.threads import pool

PART = 8 << 20
"""Bytes of a part. One that breaks off is asked for anew."""
AT_ONCE = 4
"""Parts on their way, which are all that is in memory."""


def download(
    read: Callable[[int, int], memoryview], size: int, descriptor: int, progress: Callable[[int], None]
) -> None:
    """Write an object of `size` bytes to a file. `read(start, end)` gives a part; `progress` hears the bytes done.

    Raises what `read` and `progress` raise, once the parts on their way have ended.
    """
    crew = pool(AT_ONCE, "parts")
    try:
        under_way: deque[tuple[int, Future[None]]] = deque()

        def take(start: int) -> None:
            raw, done = read(start, min(start + PART, size)), 0
            while done < len(raw):
                done += os.pwrite(descriptor, raw[done:], start + done)

        def finish_one() -> None:
            start, future = under_way.popleft()
            future.result()
            progress(min(start + PART, size))

        for start in range(0, size, PART):
            if len(under_way) == AT_ONCE:
                finish_one()
            under_way.append((start, crew.submit(take, start)))
        while under_way:
            finish_one()
    finally:
        crew.shutdown(cancel_futures=True)

"""Threads that run before there is work for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from converter.errors import NoThread

_SECONDS = 60.0
"""How long a thread may take to begin."""


def pool(count: int, name: str, initializer: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """A pool all of whose threads run already; `NoThread` where the system has none.

    By itself a pool begins a thread when work comes, and by then memory may be short: a thread that has none dies
    before it can say that it runs, and who began it waits for ever. https://github.com/python/cpython/issues/140746
    """
    executor = ThreadPoolExecutor(count, name, initializer)
    all_run = threading.Barrier(count, timeout=_SECONDS)  # nobody is idle before, so each gets a thread of its own
    try:
        for running in [executor.submit(all_run.wait) for _ in range(count)]:
            running.result(_SECONDS)
    except (RuntimeError, TimeoutError) as exc:  # the first, too, where an initializer or the barrier failed
        all_run.abort()
        executor.shutdown(wait=False, cancel_futures=True)
        raise no_thread(name, exc) from exc
    return executor


def no_thread(name: str, reason: Exception) -> NoThread:
    return NoThread(f"the system has no thread for us ({name}: {reason}); fewer --threads need fewer and less memory")

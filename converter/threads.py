"""Threads that start before there is work; those that convert tiles; the buffers that bound how many are in flight."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from converter.errors import NoThread

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

_SECONDS = 60.0
"""How long a thread may take to begin."""


def pool(count: int, name: str, initializer: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """A pool whose threads all run already. `NoThread` where the system has none.

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
    return NoThread(f"the system starts no thread ({name}: {reason}); try fewer `threads`, which also need less memory")


class Buffers:
    """The memory of one tile in flight. It is used again: fresh memory costs a page fault every 4 kB."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, purpose: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """An uninitialised tensor, valid until the next `take` for the same purpose."""
        import torch

        nbytes = torch.Size(shape).numel() * dtype.itemsize
        kept = self._kept.get(purpose)
        if kept is None or kept.numel() < nbytes:
            self._kept.pop(purpose, None)
            kept = self._kept[purpose] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        return kept[:nbytes].view(dtype).view(shape)


class Crew:
    """Runs work in threads, in any order; with one thread, at once. There is as much under way as there are buffers."""

    def __init__(self, threads: int, slots: int, *, pinned: bool = False) -> None:
        self._free: queue.SimpleQueue[Buffers] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put(Buffers(pinned=pinned))
        self._pool = pool(threads, "tile", use_one_thread) if threads > 1 else None

    def buffers(self) -> Buffers:
        """Free buffers; waits until there are some."""
        return self._free.get()

    def submit(self, buffers: Buffers, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a job that uses `buffers`, and take them back when it has ended."""

        def run() -> T:
            try:
                return job(*args, **kwargs)
            finally:
                self._free.put(buffers)

        if self._pool is not None:
            return self._pool.submit(run)
        done: Future[Any] = Future()
        try:
            done.set_result(run())
        except Exception as exc:  # kept for whoever asks for the result, as a pool does
            done.set_exception(exc)
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def use_one_thread() -> None:
    """Let torch compute on one thread for whoever calls this: it counts threads by the thread that calls it."""
    import torch

    torch.set_num_threads(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread. The mean of absmax, and so the output's bytes, depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

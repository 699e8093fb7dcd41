"""Syncing a file while more is written to it, so that its end need not wait for all of its bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from converter.threads import no_thread


class Flusher:
    """Calls what syncs a file, in a thread of its own, after every so many new bytes.

    The system reports a failed sync once, to whoever asks first. So one asks at a time, and all hear of the failure.
    """

    def __init__(self, sync: Callable[[], None], every: int) -> None:
        self._sync, self._every = sync, every
        self._waiting = 0
        self._ended = False
        self._failure: OSError | None = None
        self._syncing = threading.Lock()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            raise no_thread("flush", exc) from exc

    def wrote(self, count: int) -> None:
        """Take note of `count` new bytes. `OSError` if an earlier sync failed."""
        if self._failure is not None:
            raise self._failure
        with self._changed:
            self._waiting += count
            if self._waiting >= self._every:
                self._changed.notify()

    def sync(self) -> None:
        """Make durable what was written. `OSError` if this or an earlier sync failed."""
        with self._syncing:
            if self._failure is not None:
                raise self._failure
            try:
                self._sync()
            except OSError as exc:
                self._failure = exc
                raise

    def end(self) -> None:
        """End the thread. `OSError` if a sync failed: the file is lost."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._waiting >= self._every)
                if self._ended:
                    return
                self._waiting = 0
            try:
                self.sync()
            except OSError:
                return

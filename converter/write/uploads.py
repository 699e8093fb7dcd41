"""Shards on their way into a store: uploaded while the next one is made, then noted, then thinned on this disk."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from converter.errors import ConversionRefused, Interrupted
from converter.threads import pool
from converter.write.durable import Disk
from converter.write.journal import Journal, Upload
from converter.write.store import Store, resumable, thin

_POLL = 0.2
"""Seconds between two questions whether to stop."""


class Uploads:
    """The shards of one staging folder that go into a store.

    At most `waiting` finished shards are whole on this disk, beside the one that is being made: `add` waits for earlier
    ones. An upload that fails is raised by the next `add`, or by `finish`.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        journal: Journal,
        disk: Disk,
        *,
        waiting: int = 1,
        stop: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._store, self._folder, self._journal, self._disk = store, folder, journal, disk
        self._waiting, self._stop = waiting, stop
        self._under_way: deque[Future[None]] = deque()
        self._pool = pool(1, "upload")

    def recall(self, shards: Iterable[str]) -> dict[str, str]:
        """Shard → sha256 of those that the store has still, and of which this disk has still the thin file. The journal
        forgets the others: they are made again."""
        found = {}
        for shard in shards:
            upload = self._journal.uploads.get(shard)
            if upload is None:
                continue
            path = self._folder / shard
            if path.is_file() and path.stat().st_size == upload.size and self._store.has(upload):
                thin(path, self._disk)  # a run may have died before it came to that
                found[shard] = upload.sha256
            else:
                self._journal.forget(shard)
                path.unlink(missing_ok=True)
        return found

    def add(self, shard: str, sha256: Future[str]) -> None:
        """Upload a finished shard of which every tensor is in the journal."""
        self._under_way.append(self._pool.submit(self._upload, shard, sha256))
        while len(self._under_way) > self._waiting:
            self._await()

    def finish(self) -> None:
        """Wait for all uploads."""
        while self._under_way:
            self._await()

    def close(self) -> None:
        """Wait for the upload that is under way, and begin no other."""
        self._pool.shutdown(cancel_futures=True)

    def forget(self) -> None:
        """Remove from the store what it has taken. Nobody will publish it."""
        self._store.forget(list(self._journal.uploads.values()))

    def _upload(self, shard: str, sha256: Future[str]) -> None:
        path = self._folder / shard
        upload = Upload(shard, path.stat().st_size, sha256.result())
        try:
            self._store.take(upload, path)
        except ConversionRefused as exc:  # a login that has expired, say: what is made is not lost
            raise resumable(exc) from exc
        self._journal.commit_upload(upload)
        thin(path, self._disk)

    def _await(self) -> None:
        upload = self._under_way[0]
        while True:
            try:
                upload.result(_POLL)
            except TimeoutError:
                if upload.done():
                    raise
                if (signum := self._stop()) is not None:
                    raise Interrupted(signum, f"{signal.Signals(signum).name} during an upload") from None
                continue
            finally:
                if upload.done() and self._under_way and self._under_way[0] is upload:
                    self._under_way.popleft()
            return

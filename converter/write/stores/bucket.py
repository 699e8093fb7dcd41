"""A prefix of a bucket as a store.

Shards wait in PREFIX/.partial/ under their sha256. To publish, the bucket copies them to their names without sending
them again, and config.json comes last: before it there is no checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path

from converter.errors import ConverterError, StoreFailed, StoreRefused
from converter.read.bucket.connection import PATIENCE, Connection
from converter.read.checkpoint import CONFIG
from converter.write.journal import Upload
from converter.write.store import NOTHING, Told

WAITING = ".partial"
"""The folder in which shards wait, below the prefix."""
PART = 8 << 20
"""Bytes that are sent at a time, four at once."""
MOST_PARTS = 9_000
MOST_COPIED = 5 << 30
"""Bytes that S3 copies at once."""


class Bucket:
    """A prefix of a bucket. Keys and endpoint come from the environment, as the provider's own tools have them."""

    note = ""
    is_versioned = False

    def __init__(self, scheme: str, place: str, *, patience: timedelta = PATIENCE) -> None:
        self._there = Connection(scheme, place, patience=patience)
        self.label = self._there.label

    def look_for(self, content: str, adapter: str | None, layout: str) -> None:
        """Nothing: one conversion lies there."""

    def files(self) -> Mapping[str, int]:
        found = self._there.entries().items()
        return {name: entry.size for name, entry in found if not name.startswith(f"{WAITING}/")}

    def read(self, name: str) -> bytes:
        return self._there.read(name)

    def begin(self) -> None:
        """Nothing: a prefix is there as soon as something is in it."""

    def has(self, upload: Upload) -> bool:
        return self._there.size(_key(upload), upload.shard) == upload.size

    def take(self, upload: Upload, path: Path) -> None:
        if self._there.scheme == "s3" and upload.size > MOST_COPIED:
            raise StoreRefused(
                f"{self.label}: {upload.shard}: {upload.size:,} bytes, and S3 copies {MOST_COPIED:,} at most; give a "
                "smaller `max_shard_size`"
            )
        if self.has(upload):
            return
        part = max(PART, -(-upload.size // MOST_PARTS))
        self._there.put(_key(upload), path, part=part, as_what=upload.shard)
        if not self.has(upload):
            raise StoreFailed(f"{self.label}: {upload.shard}: was sent, and the bucket has it not; try again")

    def publish(
        self, uploads: Collection[Upload], small: Mapping[str, Path], gone: Collection[str], told: Told = NOTHING
    ) -> str:
        there = self.files()
        first = [CONFIG] if CONFIG in there else []
        for name in [*first, *sorted(set(gone) & there.keys() - {CONFIG})]:
            self._there.delete(name)
        before, *after = small
        self._there.put(before, small[before], part=PART)
        for upload in uploads:
            self._there.copy(_key(upload), upload.shard)
        for name in after[:-1]:
            self._there.put(name, small[name], part=PART)
        self._refuse_if_not_there(uploads)
        self._there.put(after[-1], small[after[-1]], part=PART)
        self.forget(uploads)
        return self.label

    def forget(self, uploads: Collection[Upload]) -> None:
        for upload in uploads:
            try:
                self._there.delete(_key(upload))
            except ConverterError:  # what is left is seen by nobody, and the next run takes it
                continue

    def _refuse_if_not_there(self, uploads: Collection[Upload]) -> None:
        """`StoreFailed` if a shard has not its size: somebody else writes there, too."""
        there = self.files()
        for upload in uploads:
            if there.get(upload.shard) != upload.size:
                where = f"{self.label}: {upload.shard}"
                raise StoreFailed(f"{where}: is not what was copied; does somebody else write there?")


def _key(upload: Upload) -> str:
    return f"{WAITING}/{upload.sha256}"

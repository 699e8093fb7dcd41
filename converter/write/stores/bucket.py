"""A prefix of a bucket: of S3 and what speaks its protocol, of Google Cloud Storage, of Azure. All obstore is here.

Shards wait in PREFIX/.partial/ under their sha256. To publish, the bucket copies them to their names without sending
them again, and config.json comes last: before it there is no checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from converter.errors import ConverterError, StoreFailed, StoreRefused, WriteFailed
from converter.read.checkpoint import CONFIG
from converter.write.journal import Upload

T = TypeVar("T")

WAITING = ".partial"
"""The folder in which shards wait, below the prefix."""
PART = 8 << 20
"""Bytes that are sent at a time, four at once."""
MOST_PARTS = 9_000
MOST_COPIED = 5 << 30
"""Bytes that S3 copies at once."""
_EXTRA = "pip install 'nf4-converter[stores]'"


class Bucket:
    """A prefix of a bucket. Keys and endpoint come from the environment, as the provider's own tools have them."""

    note = ""

    def __init__(self, scheme: str, place: str, *, patience: timedelta = timedelta(minutes=3)) -> None:
        bucket, _, prefix = place.strip("/").partition("/")
        self.label = f"{scheme}://{bucket}/{prefix}"
        if not bucket or not prefix or any(part in ("", ".", "..") for part in prefix.split("/")):
            raise StoreRefused(f"{scheme}://{place}: give a bucket and a folder in it, such as {scheme}://bucket/model")
        try:
            from obstore.store import from_url
        except ImportError:
            raise StoreRefused(f"{self.label}: obstore is not installed, which writes there: {_EXTRA}") from None
        # What is sent in clear is signed, and has no key; endpoints of one's own are often plain.
        plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
        self._scheme = scheme
        self._store: Any = self._trying(
            "",
            lambda: from_url(
                self.label,
                client_options={"allow_http": plain, "timeout": timedelta(minutes=5)},
                retry_config={"max_retries": 10, "retry_timeout": patience},
            ),
        )

    def files(self) -> Mapping[str, int]:
        import obstore

        found = self._trying("", lambda: [one for batch in obstore.list(self._store) for one in batch])
        return {one["path"]: one["size"] for one in found if not one["path"].startswith(f"{WAITING}/")}

    def read(self, name: str) -> bytes:
        import obstore

        return bytes(self._trying(name, lambda: obstore.get(self._store, name).bytes()))

    def begin(self) -> None:
        """Nothing: a prefix is there as soon as something is in it."""

    def has(self, upload: Upload) -> bool:
        import obstore

        try:
            found = self._trying(upload.shard, lambda: obstore.head(self._store, _key(upload)))
        except _Absent:
            return False
        return bool(found["size"] == upload.size)

    def take(self, upload: Upload, path: Path) -> None:
        import obstore

        if self._scheme == "s3" and upload.size > MOST_COPIED:
            raise StoreRefused(
                f"{self.label}: {upload.shard}: {upload.size:,} bytes, and S3 copies {MOST_COPIED:,} at most; give a "
                "smaller `max_shard_size`"
            )
        if self.has(upload):
            return
        part = max(PART, -(-upload.size // MOST_PARTS))
        # Each part is signed with its sha256, and the bucket refuses one that arrives otherwise.
        self._trying(
            upload.shard,
            lambda: obstore.put(self._store, _key(upload), path, chunk_size=part, max_concurrency=4),
        )
        if not self.has(upload):
            raise StoreFailed(f"{self.label}: {upload.shard}: was sent, and the bucket has it not; try again")

    def publish(self, uploads: Collection[Upload], small: Mapping[str, Path], gone: Collection[str]) -> str:
        import obstore

        there = self.files()
        first = [CONFIG] if CONFIG in there else []
        for name in [*first, *sorted(set(gone) & there.keys() - {CONFIG})]:
            self._trying(name, partial(obstore.delete, self._store, name))
        before, *after = small
        self._put(before, small[before])
        for upload in uploads:
            copy = partial(obstore.copy, self._store, _key(upload), upload.shard, overwrite=True)
            self._trying(upload.shard, copy)
        for name in after[:-1]:
            self._put(name, small[name])
        self._refuse_if_not_there(uploads)
        self._put(after[-1], small[after[-1]])
        self.forget(uploads)
        return self.label

    def forget(self, uploads: Collection[Upload]) -> None:
        import obstore

        for upload in uploads:
            try:
                self._trying(upload.shard, partial(obstore.delete, self._store, _key(upload)))
            except ConverterError:  # what is left is seen by nobody, and the next run takes it
                continue

    def _put(self, name: str, path: Path) -> None:
        import obstore

        self._trying(name, lambda: obstore.put(self._store, name, path))

    def _refuse_if_not_there(self, uploads: Collection[Upload]) -> None:
        """`StoreFailed` if a shard has not its size: somebody else writes there, too."""
        there = self.files()
        for upload in uploads:
            if there.get(upload.shard) != upload.size:
                where = f"{self.label}: {upload.shard}"
                raise StoreFailed(f"{where}: is not what was copied; does somebody else write there?")

    def _trying(self, name: str, action: Callable[[], T]) -> T:
        """The action's result; its errors become ours. The library itself tries again."""
        from obstore import exceptions

        where = f"{self.label}: {name}" if name else self.label
        try:
            return action()
        except (exceptions.BaseError, OSError) as exc:
            said, keys = _said(exc), _KEYS[self._scheme]
            # Of some requests the library tells the status only in its text.
            status = _STATUS.search(said)
            if isinstance(exc, FileNotFoundError) or (status and status[1] == "404"):
                raise _Absent(f"{where}: {said}: check bucket and folder") from None
            is_refused = isinstance(exc, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
            if is_refused or (status and status[1] in ("401", "403")):
                raise StoreRefused(f"{where}: {said}: check keys and rights, {keys}") from None
            if isinstance(exc, OSError) and exc.errno is not None:
                raise WriteFailed(f"{where}: {exc.strerror}") from None
            raise StoreFailed(f"{where}: {said}: check the connection, and {keys}") from None


class _Absent(StoreRefused):
    """There is no such object, or no such bucket."""


_STATUS = re.compile(r"status code: (\d{3})")
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def _key(upload: Upload) -> str:
    return f"{WAITING}/{upload.sha256}"


def _said(exc: Exception) -> str:
    """What the library says, in short, without the queries of links, which may be signatures."""
    text = " ".join(str(exc).partition("Debug source:")[0].split())
    text = re.sub(r"<\?xml.*?<Code>(\w+)</Code>.*", r"\1", text)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", text)[:300]

"""Objects below a prefix of a bucket: of S3 and what speaks its protocol, of Google Cloud Storage, of Azure.

All obstore is here. Keys and endpoint come from the environment, as the provider's own tools have them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from converter.errors import InputChanged, StoreFailed, StoreRefused, WriteFailed
from converter.read.bucket.parts import download

T = TypeVar("T")

PATIENCE = timedelta(minutes=3)
"""How long a failed request is repeated."""

MOST_OBJECTS = 100_000
"""Objects that a prefix may have."""

_EXTRA = "pip install 'nf4-converter[stores]'"


class Entry(NamedTuple):
    """An object, as a listing has it."""

    size: int
    modified: int
    """Time of the last change, in seconds since 1970."""
    etag: str | None
    """It changes whenever the contents change; None if the store has none."""


class Connection:
    """Requests for the objects below a prefix. They raise this project's errors. obstore repeats what failed."""

    def __init__(self, scheme: str, place: str, *, patience: timedelta = PATIENCE) -> None:
        bucket, _, prefix = place.strip("/").partition("/")
        self.label = f"{scheme}://{bucket}/{prefix}"
        self.last_name = prefix.rpartition("/")[2]
        self.scheme = scheme
        if not bucket or not prefix or any(part in ("", ".", "..") for part in prefix.split("/")):
            raise StoreRefused(f"{scheme}://{place}: give a bucket and a folder in it, such as {scheme}://bucket/model")
        try:
            from obstore.store import from_url
        except ImportError:
            raise StoreRefused(
                f"{self.label}: obstore is not installed, which reads and writes there: {_EXTRA}"
            ) from None
        # Private endpoints often have no TLS. Requests are signed, so the secret key is not sent.
        plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
        self._store: Any = self._trying(
            "",
            lambda: from_url(
                self.label,
                client_options={"allow_http": plain, "timeout": timedelta(minutes=5)},
                retry_config={"max_retries": 10, "retry_timeout": patience},
            ),
        )

    def entries(self) -> dict[str, Entry]:
        """All objects, by name below the prefix; empty if there is none. `StoreRefused` if they are too many."""
        import obstore

        def some() -> list[Any]:
            objects = (one for batch in obstore.list(self._store) for one in batch)
            return list(islice(objects, MOST_OBJECTS + 1))

        found = self._trying("", some)
        if len(found) > MOST_OBJECTS:
            raise StoreRefused(f"{self.label}: has more than {MOST_OBJECTS:,} objects: give the folder of one model")
        return {one["path"]: Entry(one["size"], int(one["last_modified"].timestamp()), one["e_tag"]) for one in found}

    def read(self, name: str) -> bytes:
        """A whole small object."""
        import obstore

        return bytes(self._trying(name, lambda: obstore.get(self._store, name).bytes()))

    def read_part(self, name: str, start: int, end: int, etag: str) -> memoryview:
        """Bytes from `start` to before `end` of an object that has this ETag. `InputChanged` if it is another by now,
        or gone."""
        import obstore

        def get() -> tuple[str | None, tuple[int, int], Any]:
            found = obstore.get(self._store, name, options={"range": (start, end), "if_match": etag})
            return found.meta["e_tag"], found.range, found.bytes()

        try:
            stated, part, raw = self._trying(name, get)
        except Absent:
            raise InputChanged(f"{self.label}: {name}: was removed while it was being read") from None
        if stated != etag:
            raise changed(self.label, name)
        if part != (start, end) or len(raw) != end - start:
            raise StoreFailed(
                f"{self.label}: {name}: the server sent bytes {part[0]:,} to {part[1]:,}, asked for {start:,} to "
                f"{end:,}: check the endpoint, and a proxy before it"
            )
        return memoryview(raw)

    def bring(self, name: str, entry: Entry, descriptor: int, progress: Callable[[int], None]) -> None:
        """Write an object of this ETag to a file, as `download` does it."""
        etag = str(entry.etag)
        download(lambda start, end: self.read_part(name, start, end, etag), entry.size, descriptor, progress)

    def size(self, name: str, as_what: str = "") -> int | None:
        """Bytes of an object; None if there is none. `as_what`: how messages call it."""
        import obstore

        try:
            return int(self._trying(as_what or name, lambda: obstore.head(self._store, name))["size"])
        except Absent:
            return None

    def put(self, name: str, path: Path, *, part: int, as_what: str = "") -> None:
        """Send a file, `part` bytes at a time, four at once. `as_what`: how messages call it."""
        import obstore

        # Each part is signed with its sha256, and the bucket refuses one that arrives otherwise.
        self._trying(as_what or name, lambda: obstore.put(self._store, name, path, chunk_size=part, max_concurrency=4))

    def copy(self, name: str, to: str) -> None:
        import obstore

        self._trying(to, lambda: obstore.copy(self._store, name, to, overwrite=True))

    def delete(self, name: str) -> None:
        import obstore

        self._trying(name, lambda: obstore.delete(self._store, name))

    def _trying(self, name: str, action: Callable[[], T]) -> T:
        """The action's result; its errors become ours."""
        from obstore import exceptions

        where = f"{self.label}: {name}" if name else self.label
        try:
            return action()
        except (exceptions.BaseError, OSError) as exc:
            said, keys = _said(exc), _KEYS[self.scheme]
            # For some requests the library states the status only in its message.
            status = _STATUS.search(said)
            if isinstance(exc, exceptions.PreconditionError):
                raise changed(self.label, name) from None
            if isinstance(exc, FileNotFoundError) or (status and status[1] == "404"):
                raise Absent(f"{where}: {said}: check bucket and folder") from None
            is_refused = isinstance(exc, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
            if is_refused or (status and status[1] in ("401", "403")):
                raise StoreRefused(f"{where}: {said}: check keys and rights, {keys}") from None
            if isinstance(exc, OSError) and exc.errno is not None:
                raise WriteFailed(f"{where}: {exc.strerror}") from None
            raise StoreFailed(f"{where}: {said}: check the connection, and {keys}") from None


class Absent(StoreRefused):
    """There is no such object, or no such bucket."""


def changed(label: str, name: str) -> InputChanged:
    return InputChanged(
        f"{label}: {name}: was replaced while it was being read; run the same command again, once it stays as it is"
    )


_STATUS = re.compile(r"status code: (\d{3})")
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def _said(exc: Exception) -> str:
    """What the library says, in short, without the queries of links, which may be signatures."""
    text = " ".join(str(exc).partition("Debug source:")[0].split())
    text = re.sub(r"<\?xml.*?<Code>(\w+)</Code>.*", r"\1", text)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", text)[:300]

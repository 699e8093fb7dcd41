"""A prefix of a bucket as a folder: listed once, read by range, fetched file by file.

A listing states an ETag of each object. Every request asks for the object of that ETag, so that what is read is what
was listed, whoever writes there meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Protocol

from converter.errors import HubOffline, InputChanged, StoreRefused, WriteFailed
from converter.lock import Lock
from converter.read.addresses import parts_of
from converter.read.beginning import Beginning
from converter.read.bucket.connection import PATIENCE, Connection, Entry
from converter.read.cache import cache_folder
from converter.read.checksums import SUMS, Stated, read_sums
from converter.read.folder import LocalFolder, Progress, is_seen

RECORDS = ".arrived"
"""A folder inside a folder of downloads. It has a note for each whole file, which says what object it is, and the files
that are not whole yet."""
MOST_READERS = 100
"""Processes that may read the same address at one time."""


class Objects(Protocol):
    """Files that lie elsewhere, and the requests for them."""

    @property
    def label(self) -> str:
        """How messages call the place."""

    @property
    def last_name(self) -> str:
        """What the place is called in one word: a folder here gets the name."""

    def entries(self) -> Mapping[str, Entry]:
        """All files, by name."""

    def read_part(self, name: str, start: int, end: int, etag: str) -> memoryview:
        """Bytes from `start` to before `end` of a file that has this ETag."""

    def bring(self, name: str, entry: Entry, descriptor: int, progress: Callable[[int], None]) -> None:
        """Write all of a file to a descriptor. `progress` hears the bytes done, also while they are waited for, and
        may end it by what it raises."""


class ObjectsFolder:
    """Files that lie elsewhere, as they were when they were listed.

    Every method raises `StoreRefused` for what is not there or not for us, `StoreFailed` when the connection or the
    server failed, after some tries, and `InputChanged` if an object was replaced since.
    """

    repo_id = None
    commit = None
    path = None
    is_offline = False
    is_kept = False
    is_pinned = True

    def __init__(self, there: Objects) -> None:
        self._there = there
        self._files = files_among(self._there.entries(), self.label)
        if not self._files:
            raise StoreRefused(f"{self.label}: nothing lies there: check the name, and whether the key may list it")
        self._beginning = Beginning(lambda name, length: bytes(self._part(name, 0, length)))
        self._sums: dict[str, str] | None = None
        self._around: Path | None = None
        self._lock: Lock | None = None

    @property
    def label(self) -> str:
        return self._there.label

    @property
    def last_name(self) -> str:
        return self._there.last_name

    def names(self) -> frozenset[str]:
        return frozenset(name for name in self._files if "/" not in name)

    def inner_names(self) -> frozenset[str]:
        return frozenset(name for name in self._files if "/" in name)

    def size(self, name: str) -> int:
        return self._entry(name).size

    def digest(self, name: str) -> None:
        return None

    def stated(self, name: str) -> Stated | None:
        """What SHA256SUMS beside the file says, if there is one that names it."""
        if self._sums is None:
            self._sums = read_sums(self) if SUMS in self._files else {}
        return Stated(self._sums[name], SUMS) if name in self._sums else None

    def identity(self, name: str) -> list[int]:
        """Size and a hash of the ETag; empty if there is no such file."""
        if name not in self._files:
            return []
        return [self._files[name].size, int(hashlib.sha256(self._etag(name).encode()).hexdigest()[:13], 16)]

    def state(self, name: str) -> list[int]:
        return self.identity(name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        size, end = self.size(name), offset + len(buffer)
        if end > size:
            raise InputChanged(f"{self.label}: {name}: ends at byte {size}, expected {end}")
        if not len(buffer):
            return
        head = self._beginning.upto(name, end, size)[offset:end]
        buffer[: len(head)] = head
        if len(head) < len(buffer):
            buffer[len(head) :] = self._part(name, offset + len(head), end)

    def expect(self, name: str, offset: int) -> None:
        """Nothing: requests are not sent before somebody waits for them."""

    @property
    def snapshot(self) -> Path:
        """A folder of the user's cache that is ours until `close` removes it. It has the address's last name, and what
        a killed run left there of the same address."""
        if self._around is None:
            self._around, self._lock = _reserved(self.label)
        return self._around / self.last_name

    def fetch(self, names: Iterable[str], progress: Progress | None = None, place: Path | None = None) -> LocalFolder:
        """Download those of these files that are not in `place` already, by default in `snapshot`, and open it."""
        where = self.snapshot if place is None else place
        try:
            (where / RECORDS).mkdir(parents=True, exist_ok=True)
            if place is None:
                self._remove_others(where)
            for name in names:
                self._bring(name, progress, where)
        except OSError as exc:
            raise WriteFailed(f"{exc.filename or where}: {exc.strerror}") from exc
        return LocalFolder(where)

    def refuse_if_too_full(self, names: Iterable[str]) -> None:
        """`StoreRefused` if `snapshot` has no room for those of these files that are not there."""
        where = self.snapshot
        left = [name for name in names if not _is_whole(where / name, _record(where, name), self.identity(name))]
        needed, free = sum(map(self.size, left)), shutil.disk_usage(where.parent).free
        if needed > free:
            raise StoreRefused(
                f"{self.label}: {needed:,} bytes of it are to come into {where}, and its disk has {free:,} free; make "
                "room there, or name another place with XDG_CACHE_HOME"
            )

    def cached(self, name: str) -> None:
        """None: nothing of a bucket is kept for later runs."""

    def close(self) -> None:
        """Remove what was fetched into `snapshot`."""
        self._beginning.forget()
        if self._around is not None and self._lock is not None:
            shutil.rmtree(self._around, ignore_errors=True)
            self._lock.release()
            self._around = self._lock = None

    def _entry(self, name: str) -> Entry:
        if name not in self._files:
            raise StoreRefused(f"{self.label}: there is no file {name[:120]!r}")
        return self._files[name]

    def _etag(self, name: str) -> str:
        etag = self._entry(name).etag
        if etag is None:
            raise StoreRefused(
                f"{self.label}: {name}: the store states no ETag, so nothing would tell if the file were replaced "
                "while it is read; copy the files here, and give that folder"
            )
        return etag

    def _part(self, name: str, start: int, end: int) -> memoryview:
        return self._there.read_part(name, start, end, self._etag(name))

    def _bring(self, name: str, progress: Progress | None, where: Path) -> None:
        size, path, record = self.size(name), where / name, _record(where, name)
        if not _is_whole(path, record, self.identity(name)):
            unfinished = record.with_suffix(".incomplete")
            for old in (record, path):
                old.parent.mkdir(parents=True, exist_ok=True)
                old.unlink(missing_ok=True)
            self._etag(name)  # refuses a file without one
            with unfinished.open("wb") as file:
                told = (lambda done: progress(name, done)) if progress is not None else (lambda _: None)
                self._there.bring(name, self._files[name], file.fileno(), told)
                # No checksum covers these bytes. So they are durable before the note says that the file is whole.
                os.fsync(file.fileno())
            # A run that fetches it anew resumes the work of one that had it before, which knows it by its time.
            os.utime(unfinished, (self._files[name].modified,) * 2)
            unfinished.rename(path)
            record.write_text(json.dumps(self.identity(name)))
        if progress is not None:
            progress(name, size)

    def _remove_others(self, where: Path) -> None:
        """Remove what a killed run left of files that are no longer below the prefix."""
        for path in where.iterdir():
            if path.name != RECORDS and path.is_file() and path.name not in self._files:
                path.unlink()


class BucketFolder(ObjectsFolder):
    """The files below a prefix."""

    def __init__(self, address: str, *, patience: timedelta = PATIENCE) -> None:
        super().__init__(Connection(*parts_of(address), patience=patience))


def open_bucket(address: str, *, offline: bool = False) -> BucketFolder:
    """The folder at an address. `HubOffline` if nothing may be reached."""
    if offline:
        raise HubOffline(f"{parts_of(address)[0]}://…: `offline` reaches no bucket; give a folder")
    return BucketFolder(address)


def files_among(entries: Mapping[str, Entry], label: str) -> dict[str, Entry]:
    """The objects that can be files of one folder.

    An object without bytes and without a dot in its name is taken for what providers' tools make to show a folder: its
    slash at the end is lost in the listing.
    """
    seen = {name: entry for name, entry in entries.items() if is_seen(name) and name != RECORDS}
    seen = {name: entry for name, entry in seen.items() if entry.size or "." in name.rpartition("/")[2]}
    folders = {str(folder) for name in seen for folder in PurePosixPath(name).parents}
    for name in sorted(seen.keys() & folders):
        raise StoreRefused(f"{label}: {name[:120]} is a file and a folder of others; move one of them away")
    return seen


def _record(where: Path, name: str) -> Path:
    return where / RECORDS / f"{name}.json"


def _is_whole(path: Path, record: Path, identity: list[int]) -> bool:
    with suppress(OSError, ValueError):
        return bool(path.stat().st_size == identity[0] and json.loads(record.read_text()) == identity)
    return False


def _reserved(label: str) -> tuple[Path, Lock]:
    """A folder for an address that no other process uses, and its lock."""
    key = hashlib.sha256(label.encode()).hexdigest()[:12]
    for number in range(MOST_READERS):
        folder = cache_folder() / "reading" / (f"{key}-{number}" if number else key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return folder, Lock(folder)
        except BlockingIOError:  # another process reads the same
            continue
        except OSError as exc:
            raise WriteFailed(f"{folder}: {exc.strerror}; XDG_CACHE_HOME names another place for it") from exc
    raise WriteFailed(f"{cache_folder() / 'reading'}: {MOST_READERS} processes read {label} at the same time")

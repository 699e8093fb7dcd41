"""What lies at an address, for commands that read: as a folder here, or only a small file of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.errors import OutputLocked, StoreRefused
from converter.lock import Lock
from converter.read.addresses import BUCKETS, KNOWN, MODELS, parts_of, path_of
from converter.read.arrivals import Remote
from converter.read.bucket.folder import BucketFolder, ObjectsFolder
from converter.read.cache import cache_folder
from converter.read.folder import Folder, LocalFolder, read_bytes
from converter.read.hub.folder import HubFolder
from converter.read.registry.folder import open_version
from converter.write.durable import writing
from converter.write.store import MAX_READ_BYTES
from converter.write.stores.addresses import open_store


def small_file(address: str, name: str) -> bytes:
    """A small file of what lies at an address. `StoreRefused` if it has none of this name."""
    scheme, rest = parts_of(address)
    if scheme in ("hf", MODELS):
        folder: Folder = _repository(rest) if scheme == "hf" else open_version(address)
        if name in folder.names():
            return read_bytes(folder, name, limit=MAX_READ_BYTES)
    else:
        store = open_store(address)
        if name in store.files():
            return store.read(name)
    raise StoreRefused(f"{address}: has no {name}, so nothing tells that this tool made it")


@contextmanager
def as_folder(
    place: str, *, offline: bool = False, tell: Callable[[int, int, str], None] = lambda *_: None
) -> Iterator[Path]:
    """The folder that a place means. What lies elsewhere is downloaded into a folder of the user's
    cache, which is removed at the end; what a killed run left there is not downloaded again. `tell` hears bytes done,
    in all, what.

    `StoreRefused` for other addresses, and if the disk has no room.
    """
    path = path_of(place)
    if path is not None:
        yield path
        return
    scheme, rest = parts_of(place)
    if offline:
        raise StoreRefused(f"{place}: `offline` reaches no store; give a folder")
    remote: HubFolder | ObjectsFolder
    if scheme == "hf":
        remote = _repository(rest)
        name, what = remote.repo_id.rpartition("/")[2], f"{rest}@{remote.commit}"
    elif scheme in BUCKETS:
        remote = BucketFolder(place)
        name, what = remote.last_name, f"{remote.label}?verify"
    elif scheme == MODELS:
        opened = open_version(place)
        if isinstance(opened, LocalFolder):
            yield opened.path
            return
        remote, name, what = opened, opened.last_name, f"{opened.label}?verify"
    else:
        raise StoreRefused(f"{place[:120]}: not a store that is known; give a folder, or {KNOWN}")
    key = hashlib.sha256(what.encode()).hexdigest()[:12]
    around = cache_folder() / "reading" / key
    with writing(around):
        around.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(around)
    except BlockingIOError:
        raise OutputLocked(f"{place}: another process is reading it, in {around}") from None
    try:
        yield _downloaded(remote, around / name, place, tell)
    finally:
        shutil.rmtree(around, ignore_errors=True)
        lock.release()


def _repository(rest: str) -> HubFolder:
    repo_id, _, revision = rest.rstrip("/").partition("@")
    return HubFolder(repo_id, revision or None)


def _downloaded(remote: Remote, folder: Path, place: str, tell: Callable[[int, int, str], None]) -> Path:
    names = sorted(remote.names() | remote.inner_names())
    total = sum(map(remote.size, names))
    with writing(folder):
        folder.mkdir(exist_ok=True)
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if (free := shutil.disk_usage(folder).free + here) < total:
        raise StoreRefused(f"{place}: has {total:,} bytes, and {folder} has room for {free:,}; make room there")
    before = 0
    for name in names:
        remote.fetch([name], lambda of, done, before=before: tell(before + done, total, of), folder)  # type: ignore[misc]
        before += remote.size(name)
    return folder

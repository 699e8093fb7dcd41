"""What lies at an address, for commands that read: a repository on the Hub as a folder here, a small file of any."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.errors import OutputLocked, StoreRefused
from converter.read.cache import cache_folder
from converter.read.folder import read_bytes
from converter.read.hub.folder import HubFolder
from converter.write.durable import writing
from converter.write.lock import Lock
from converter.write.stores.addresses import open_store, parts_of, path_of, refuse_to_read

MAX_SMALL_BYTES = 100_000_000


def small_file(address: str, name: str) -> bytes:
    """A small file of what lies at an address. `StoreRefused` if it has none of this name."""
    scheme, rest = parts_of(address)
    if scheme == "hf":
        folder = _repository(rest)
        if name in folder.names():
            return read_bytes(folder, name, limit=MAX_SMALL_BYTES)
    else:
        store = open_store(address)
        if name in store.files():
            return store.read(name)
    raise StoreRefused(f"{address}: has no {name}, so nothing tells that this tool made it")


@contextmanager
def as_folder(
    place: str, *, offline: bool = False, tell: Callable[[int, int, str], None] = lambda *_: None
) -> Iterator[Path]:
    """The folder that a place means. A repository on the Hub is downloaded into a folder of the user's cache, which is
    removed at the end; what a killed run left there is not downloaded again. `tell` hears bytes done, in all, what.

    `StoreRefused` for other stores, and if the disk has no room.
    """
    path = path_of(place)
    if path is not None:
        yield path
        return
    scheme, rest = parts_of(place)
    if scheme != "hf":
        refuse_to_read(place)
    if offline:
        raise StoreRefused(f"{place}: `offline` reaches no store; give a folder")
    hub = _repository(rest)
    key = hashlib.sha256(f"{rest}@{hub.commit}".encode()).hexdigest()[:12]
    around = cache_folder() / "reading" / key
    with writing(around):
        around.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(around)
    except BlockingIOError:
        raise OutputLocked(f"{place}: another process is reading it, in {around}") from None
    try:
        yield _downloaded(hub, around / hub.repo_id.rpartition("/")[2], place, tell)
    finally:
        shutil.rmtree(around, ignore_errors=True)
        lock.release()


def _repository(rest: str) -> HubFolder:
    repo_id, _, revision = rest.rstrip("/").partition("@")
    return HubFolder(repo_id, revision or None)


def _downloaded(hub: HubFolder, folder: Path, place: str, tell: Callable[[int, int, str], None]) -> Path:
    names = sorted(hub.names() | hub.inner_names())
    total = sum(map(hub.size, names))
    with writing(folder):
        folder.mkdir(exist_ok=True)
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if (free := shutil.disk_usage(folder).free + here) < total:
        raise StoreRefused(f"{place}: has {total:,} bytes, and {folder} has room for {free:,}; make room there")
    before = 0
    for name in names:
        hub.fetch([name], lambda of, done, before=before: tell(before + done, total, of), folder)  # type: ignore[misc]
        before += hub.size(name)
    return folder

"""The sha256 of weights files, held against what somebody states: the Hub, what came from it, or SHA256SUMS.

safetensors has no checksums, so without this a flipped bit in a base is a slightly other model. A file is read for it
once: its sha256 is remembered per user, under all by which the file would be told from another in its place.
"""

from __future__ import annotations

import hashlib
import re
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Self

from converter.errors import BadCheckpoint, InputChanged, Interrupted
from converter.read import cache
from converter.read.folder import Folder, LocalFolder, pieces, read_bytes
from converter.read.hub.record import digest_at_download, digest_in_cache

HUB, CACHE, DOWNLOAD = "the Hub", "the Hub's cache", "the record of hf download"
SUMS = "SHA256SUMS"
"""As `sha256sum` writes it, and checks it with -c."""
MAX_SUMS_BYTES = 1_000_000
"""Of a SHA256SUMS; that of a base of 1,000 shards has 110,000."""

READERS = 2
"""Files that are read at a time: while one waits for the disk, the other is hashed."""

_KIND = "sha256"
_TICK = 0.1  # seconds after which somebody is told how far it is, and asked whether to go on
_PREFIX = "sha256:"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# https://www.gnu.org/software/coreutils/manual/html_node/cksum-output-modes.html: a backslash at the beginning says
# that the name is escaped; the second form is that of --tag.
_UNTAGGED = re.compile(r"(?P<escaped>\\?)(?P<sha256>[0-9a-fA-F]{64}) [ *](?P<name>[^\0]+)")
_TAGGED = re.compile(r"(?P<escaped>\\?)SHA256 \((?P<name>[^\0]+)\) = (?P<sha256>[0-9a-fA-F]{64})")


class Stated(NamedTuple):
    """What a file's sha256 is said to be."""

    sha256: str
    by: str
    """HUB, CACHE, DOWNLOAD or SUMS"""


def stated(folder: Folder, names: Iterable[str], hub: Mapping[str, str] = {}) -> dict[str, Stated]:
    """Of some files of a folder of this machine: name → its sha256, where it is known. Of other folders, nothing.

    `hub` has what the Hub says: name → `sha256:…`. Next the folder is asked whether it is one of the Hub's cache, whose
    files are called by their sha256; whether it was downloaded from the Hub; then its SHA256SUMS. Raises
    `BadCheckpoint` if that is none.
    """
    found: dict[str, Stated] = {}
    if folder.path is None:
        return found
    left = []
    for name in names:
        by_source = {
            HUB: hub.get(name),
            CACHE: digest_in_cache(folder.path / name),
            DOWNLOAD: digest_at_download(folder.path, name),
        }
        known = [(by, digest) for by, digest in by_source.items() if digest is not None and digest.startswith(_PREFIX)]
        if known:
            by, digest = known[0]
            found[name] = Stated(digest.removeprefix(_PREFIX), by)
        else:
            left.append(name)
    if left and SUMS in folder.names():
        sums = read_sums(folder)
        found |= {name: Stated(sums[name], SUMS) for name in left if name in sums}
    return found


def read_sums(folder: Folder) -> dict[str, str]:
    """What SHA256SUMS says of files of its folder: name → sha256. Rows about files elsewhere are nobody's business.

    Raises `BadCheckpoint` for a row that `sha256sum` does not write, and for two sums of one file.
    """
    where = f"{folder.label}: {SUMS}"
    text = read_bytes(folder, SUMS, limit=MAX_SUMS_BYTES).decode("utf-8", "surrogateescape")
    sums: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        row = line.removesuffix("\r")
        if not row or row.startswith("#"):
            continue
        match = _UNTAGGED.fullmatch(row) or _TAGGED.fullmatch(row)
        if match is None:
            raise BadCheckpoint(f"{where}: line {number} is {row[:80]!r}, expected a sha256, two spaces and a name")
        name, sha256 = match["name"].removeprefix("./"), match["sha256"].lower()
        # Names are looked up, never opened; an escaped one has a backslash or a line break, as no shard's has.
        if match["escaped"] or "/" in name:
            continue
        if sums.setdefault(name, sha256) != sha256:
            raise BadCheckpoint(f"{where}: line {number} states another sha256 of {name[:80]!r} than a line before")
    return sums


class _Hashed(NamedTuple):
    state: list[int]
    sha256: str
    remembered: bool


class Hashing:
    """Takes the sha256 of files in threads of its own. Leaving it ends the threads at their next piece."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(READERS, "sha256")
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._files: dict[Path, Future[_Hashed]] = {}
        self._done = self._total = 0

    def begin(self, folder: LocalFolder, name: str) -> None:
        """Let a file be read, unless its sha256 is remembered."""
        path = folder.path / name
        if path not in self._files:
            self._files[path] = self._pool.submit(self._hash, path)

    def check(
        self,
        folder: LocalFolder,
        files: Mapping[str, Stated],
        progress: Callable[[int, int, str], None] = lambda *_: None,
        stop: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Hold files against what is stated of them: `BadCheckpoint` names one whose sha256 is another.

        `progress` is told how many bytes of how many are read, and of which file. Once `stop` gives the number of a
        signal, it ends with `Interrupted`. `InputChanged` if a file is not the one that the folder has open.
        """
        for name in files:
            self.begin(folder, name)
        for name, expected in files.items():
            hashed = self._wait(folder.path / name, progress, stop)
            if hashed.sha256 != expected.sha256:
                raise BadCheckpoint(_is_another(folder, name, hashed.sha256, expected))
        # At the end of all: the first may have been written to while the last was read.
        for name in files:
            if folder.state(name) != self._files[folder.path / name].result().state:
                raise InputChanged(f"{folder.path / name}: changed while it was being read")

    def _wait(self, path: Path, progress: Callable[[int, int, str], None], stop: Callable[[], int | None]) -> _Hashed:
        future = self._files[path]
        while True:
            is_done = bool(wait([future], _TICK).done)
            if is_done and (hashed := future.result()).remembered:
                return hashed
            progress(self._done, self._total, path.name)
            if (signum := stop()) is not None:
                raise Interrupted(signum, f"{signal.Signals(signum).name} while the sha256 of {path.name} was checked")
            if is_done:
                return hashed

    def _hash(self, path: Path) -> _Hashed:
        # A folder of its own, whose descriptor no other thread closes.
        with closing(LocalFolder(path.parent)) as folder:
            state, size = folder.state(path.name), folder.size(path.name)
            if (known := remembered_sha256(folder, path.name)) is not None:
                return _Hashed(state, known, remembered=True)
            with self._lock:
                self._total += size
            digest = hashlib.sha256()
            for piece in pieces(folder, path.name, 0, size):
                if self._ended.is_set():
                    raise _Ended
                digest.update(piece)
                with self._lock:
                    self._done += len(piece)
            if folder.state(path.name) != state:
                raise InputChanged(f"{path}: changed while it was being read")
            with self._lock:
                _remember(folder, path.name, digest.hexdigest())
            return _Hashed(state, digest.hexdigest(), remembered=False)

    def close(self) -> None:
        """End the threads at their next piece."""
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Ended(Exception):
    """Nobody waits for the sha256 any more."""


def remembered_sha256(folder: Folder, name: str) -> str | None:
    """The sha256 of a file that was read before, and is the very same."""
    files = None if folder.path is None else cache.load(_KIND, cache.key_of(folder.path))
    entry = files.get(name) if isinstance(files, dict) else None
    if not isinstance(entry, dict) or entry.get("file") != folder.state(name):
        return None
    sha256 = entry.get("sha256")
    return sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None


def _remember(folder: LocalFolder, name: str, sha256: str) -> None:
    """Keep what was found, right or wrong, for later runs."""
    files = cache.load(_KIND, cache.key_of(folder.path))
    entry = {"file": folder.state(name), "sha256": sha256}
    cache.store(_KIND, cache.key_of(folder.path), (files if isinstance(files, dict) else {}) | {name: entry})


def _is_another(folder: LocalFolder, name: str, found: str, expected: Stated) -> str:
    what = f"{folder.path / name}: its sha256 is {found[:12]}…, expected {expected.sha256[:12]}… by {expected.by}: "
    if expected.by in (SUMS, DOWNLOAD):
        return f"{what}the file is damaged, or another than was meant there; get it anew"
    return f"{what}the file is damaged; remove {(folder.path / name).resolve()}, and it is fetched anew, if online"

"""The Hugging Face Hub: one repository at one commit, read in pieces or fetched into the Hub's own cache.

This module and `errors` beside it import huggingface_hub once a repository is opened: that takes longer than
`convert --help` may.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from converter.errors import HubFailed, HubNotFound, HubOffline, HubRefused, InputChanged
from converter.read.beginning import Beginning
from converter.read.checkpoint import INDEX
from converter.read.checksums import HUB, Stated
from converter.read.folder import LocalFolder, Progress
from converter.read.hub.answers import COMMIT, checking
from converter.read.hub.errors import Subject, brief, endpoint, not_a_hub, retrying
from converter.read.hub.listing import HubFile, cached_files, listed_files
from converter.read.strict_json import read_json

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

DEFAULT_REVISION = "main"
MAX_REPO_ID = 96

_REPO_ID = re.compile(r"(\w|\w[\w.-]*\w)(/(\w|\w[\w.-]*\w))?", re.ASCII)


def is_hub_id(reference: str) -> bool:
    """Whether `reference` names a repository ("org/name" or "name") and not a path; an existing path wins."""
    return not os.path.lexists(reference) and is_repo_id(reference)


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a repository's name: "org/name" or "name"."""
    # https://huggingface.co/docs/huggingface_hub/package_reference/utilities, validate_repo_id
    fits = _REPO_ID.fullmatch(text) is not None and len(text) <= MAX_REPO_ID
    return fits and "--" not in text and ".." not in text and not text.endswith(".git")


class HubFolder:
    """The files at the root of one repository at one commit, and in the folders there.

    The revision (a branch, a tag or a commit; None for "main") is resolved once, on opening. Reading is by
    range requests, and nothing is downloaded until `fetch`. Offline, which HF_HUB_OFFLINE asks for as well,
    there is no request at all: revision and files are those of the Hub's cache.

    Every method raises `HubNotFound`, `HubGated` or `HubOffline` for what the Hub or its cache does not have
    for us, and `HubFailed` when the connection or the server failed, after some tries.
    """

    is_kept = True
    is_pinned = False  # the Hub's library downloads by commit, but nothing it sends is held against that

    def __init__(self, repo_id: str, revision: str | None = None, *, offline: bool = False) -> None:
        if not is_repo_id(repo_id):
            raise HubNotFound(f"{repo_id[:120]!r} is not the name of a repository, such as org/name")
        self.repo_id = repo_id
        self.revision = DEFAULT_REVISION if revision is None else revision
        # git allows no "..", and the revision becomes part of a path in the cache.
        if ".." in self.revision or self.revision.startswith("/") or not self.revision:
            raise HubNotFound(f"{repo_id}: {self.revision[:120]!r} is not a revision")
        prepare_library()
        self._beginning = Beginning(self._first_bytes)
        self._cached: LocalFolder | None = None
        if offline or offline_by_environment():
            self.commit = self._cached_commit()
            self._cached = LocalFolder(self.snapshot)
            self._files = cached_files(self._cached)
        else:
            self.commit, self._files = self._look_up()

    @property
    def label(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}" + (" (offline, from the cache)" if self._cached else "")

    @property
    def path(self) -> None:
        """None: `fetch` gives a folder that has one."""
        return None

    @property
    def snapshot(self) -> Path:
        """Where the Hub's cache keeps the files of this commit; there once something has been fetched."""
        return self._storage / "snapshots" / self.commit

    def names(self) -> frozenset[str]:
        """The names of its root files; offline, of cached ones and of shards that the cached index names."""
        return frozenset(name for name in self._files if "/" not in name) | self._named_by_cached_index()

    def inner_names(self) -> frozenset[str]:
        """The names, FOLDER/NAME, of the files of the folders in it; offline, of cached ones."""
        return frozenset(name for name in self._files if "/" in name)

    def size(self, name: str) -> int:
        """Bytes of one file."""
        return self._file(name).size

    def digest(self, name: str) -> str | None:
        """`sha256:…` of a file in large-file storage, `git-sha1:…` (a blob id) of others; None if unknown."""
        return self._file(name).digest

    def stated(self, name: str) -> Stated | None:
        """The sha256 of a file in large-file storage."""
        kind, _, digest = (self.digest(name) or "").partition(":")
        return Stated(digest, HUB) if kind == "sha256" else None

    def identity(self, name: str) -> list[int]:
        """Empty: what a commit holds never changes."""
        return []

    def state(self, name: str) -> list[int]:
        """Empty: what the Hub states need not be remembered."""
        return []

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset`; `InputChanged` if the file ends before.

        `HubFailed` if a server answers a range request with the whole file.
        """
        size = self._file(name).size
        end = offset + len(buffer)
        if end > size:
            raise InputChanged(f"{self.label}: {name}: ends at byte {size}, expected {end}")
        if self._cached is not None:
            self._cached.read_into(name, offset, buffer)
            return
        head = self._beginning.upto(name, end, size)[offset:end]
        buffer[: len(head)] = head
        if len(head) < len(buffer):
            self._request(name, offset + len(head), buffer[len(head) :])

    def expect(self, name: str, offset: int) -> None:
        """What follows byte `offset` is read next; of use where the file was fetched."""
        if self._cached is not None:
            self._cached.expect(name, offset)

    @property
    def is_offline(self) -> bool:
        """Whether its files are those of the Hub's cache, and no other can come."""
        return self._cached is not None

    def fetch(self, names: Iterable[str], progress: Progress | None = None, place: Path | None = None) -> LocalFolder:
        """Download those of these files that the Hub's cache lacks, and open its snapshot of this commit; with `place`,
        download into that folder those that are not there, and open it.

        `HubFailed` if a file's size is not what the Hub said; `WriteFailed` if the files cannot be written.
        """
        where = self.snapshot if place is None else place
        for name in names:
            size = self._file(name).size
            if self._cached is None:
                self._download(name, progress, place)
            try:
                found = (where / name).stat().st_size
            except FileNotFoundError:  # of another commit than was asked for
                raise not_a_hub(self.repo_id) from None
            if found != size:
                raise HubFailed(
                    f"{self.label}: {name} has {found:,} bytes in the cache, expected {size:,}: "
                    f"remove {where / name} and what it links to, and try again"
                )
            if progress is not None:
                progress(name, size)
        if self._cached is None and place is None:
            self._remember_revision()
        return LocalFolder(where)

    def refuse_if_too_full(self, names: Iterable[str]) -> None:
        """Nothing: other programs share the Hub's cache, and its library says what it can't store."""

    def cached(self, name: str) -> Path | None:
        """Where the Hub's cache has a file whole; None if it has it not."""
        path = self.snapshot / name
        try:
            real = path.resolve(strict=True)
            # A link to it is followed then.
            is_whole = real.stat().st_size == self._file(name).size and real.parent.name == "blobs"
        except OSError:
            return None
        return real if is_whole else None

    def close(self) -> None:
        """Let go of open files and of what was read ahead."""
        self._beginning.forget()
        if self._cached is not None:
            self._cached.close()

    @property
    def _storage(self) -> Path:
        # https://huggingface.co/docs/huggingface_hub/guides/manage-cache
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
        return cache / f"models--{self.repo_id.replace('/', '--')}"

    @property
    def _reference(self) -> Path:
        return self._storage / "refs" / self.revision

    def _subject(self, name: str = "") -> Subject:
        return Subject(self.repo_id, self.revision, name)

    def _file(self, name: str) -> HubFile:
        if name in self._files:
            return self._files[name]
        if self._cached is None:
            raise HubNotFound(f"{self.label}: the repository has no file {name[:120]!r} at its root")
        raise HubOffline(
            f"{self.label}: {name[:120]!r} is not in the cache: go online, or get it there first with "
            f"`hf download {self.repo_id} --revision {self.commit}`"
        )

    def _look_up(self) -> tuple[str, dict[str, HubFile]]:
        """The commit, and the files at its root and in the folders there."""
        from huggingface_hub import HfApi, constants

        def listing() -> ModelInfo:
            # One request for commit and files together, so they belong to each other.
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            return HfApi().model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=timeout)

        try:
            found = retrying(listing, self._subject())
            commit = str(found.sha or "")
            files = listed_files(found.siblings or ())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise not_a_hub(self.repo_id) from None
        asked = self.revision if COMMIT.fullmatch(self.revision) else commit
        if not COMMIT.fullmatch(commit) or commit != asked:
            raise not_a_hub(self.repo_id)
        return commit, files

    def _cached_commit(self) -> str:
        commit = self.revision if COMMIT.fullmatch(self.revision) else self._read_reference()
        if commit and (self._storage / "snapshots" / commit).is_dir():
            return commit
        raise HubOffline(
            f"{self.repo_id}: revision {self.revision!r} is not in the cache ({self._storage}): go online, "
            f"or get it there first with `hf download {self.repo_id} --revision {self.revision}`"
        )

    def _read_reference(self) -> str:
        """The commit that the cache knows the revision by; empty if it knows none."""
        try:
            text = self._reference.read_text("ascii", errors="replace").strip()
        except OSError:
            return ""
        return text if COMMIT.fullmatch(text) else ""

    def _remember_revision(self) -> None:
        # A download by commit leaves no trace of the branch's name, by which it is looked for offline.
        if self.revision == self.commit or self._read_reference() == self.commit:
            return
        temporary = self._reference.with_name(f"{self._reference.name}.{os.getpid()}.tmp")
        # Best effort, as in the Hub's library: whoever may only read the cache can convert all the same.
        with contextlib.suppress(OSError):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.commit, "ascii")
            temporary.replace(self._reference)

    def _named_by_cached_index(self) -> frozenset[str]:
        # A cache may hold a part of a repository. With these names, opening a shard tells that the cache
        # lacks it; without, it would seem that the repository does.
        if self._cached is None or INDEX not in self._files:
            return frozenset()
        weight_map = read_json(self._cached, INDEX).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        return frozenset(shard for shard in shards if isinstance(shard, str) and "/" not in shard)

    def _first_bytes(self, name: str, length: int) -> bytes:
        fresh = bytearray(length)
        self._request(name, 0, memoryview(fresh))
        return bytes(fresh)

    def _request(self, name: str, offset: int, buffer: memoryview) -> None:
        if len(buffer):
            retrying(lambda: self._request_once(name, offset, buffer), self._subject(name))

    def _request_once(self, name: str, offset: int, buffer: memoryview) -> None:
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        # Compressed, a file would be sent whole whatever the range.
        headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
        part = len(buffer) < self._files[name].size
        if part:
            headers["Range"] = f"bytes={offset}-{offset + len(buffer) - 1}"
        with get_session().stream(
            "GET",
            hf_hub_url(self.repo_id, name, revision=self.commit),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            if part:
                stated = response.headers.get("Content-Range", "")
                self._check_range(name, headers["Range"], response.status_code, stated)
            done = 0
            for chunk in response.iter_bytes():
                if done + len(chunk) > len(buffer):
                    raise HubFailed(f"{self.label}: {name}: the server sent more than {len(buffer):,} bytes")
                buffer[done : done + len(chunk)] = chunk
                done += len(chunk)
        if done < len(buffer):
            raise HubFailed(f"{self.label}: {name}: the server sent {done:,} bytes, expected {len(buffer):,}")

    def _check_range(self, name: str, asked: str, status: int, stated: str) -> None:
        if status != 206:
            raise HubFailed(
                f"{self.label}: {name}: asked for a range, the server would send the whole file (status "
                f"{status}, expected 206): check HF_ENDPOINT and proxy, or use `hf download` and work offline"
            )
        if not stated.startswith(asked.replace("=", " ") + "/"):
            raise HubFailed(f"{self.label}: {name}: the server sent {brief(stated)!r}, asked for {asked!r}")

    def _download(self, name: str, progress: Progress | None, place: Path | None) -> None:
        from huggingface_hub import hf_hub_download

        size = self._files[name].size

        def count(done: int) -> None:
            if done > size:
                raise HubFailed(f"{self.label}: {name}: the server sent more than {size:,} bytes")
            if progress is not None:
                progress(name, done)

        try:
            retrying(
                lambda: hf_hub_download(
                    self.repo_id, name, revision=self.commit, tqdm_class=_counter_class(count), local_dir=place
                ),
                self._subject(name),
            )
        except ValueError:  # what the library says of headers that it can't use
            raise not_a_hub(self.repo_id) from None


def prepare_library() -> None:
    """Import huggingface_hub and have it send no telemetry, print no warnings and take no odd answers."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http, logging

    if not hasattr(_http._GLOBAL_CLIENT_FACTORY, "checks"):
        set_client_factory(checking(_http._GLOBAL_CLIENT_FACTORY))
    # Unlike the environment variable, this works after the import as well. Without it, requests carry what is
    # installed here, and the first one is preceded by another that is not about the repository.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    if "HF_HUB_VERBOSITY" not in os.environ and not constants.HF_DEBUG:
        # What it warns of passes on the next try or comes back as an error of ours; it quotes signed links.
        logging.set_verbosity_error()
    try:
        parts = urlsplit(constants.ENDPOINT)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise HubRefused(f"HF_ENDPOINT is {endpoint()!r}, expected a URL such as https://huggingface.co")


def offline_by_environment() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _counter_class(report: Callable[[int], None]) -> type[Any]:
    """A progress bar for the Hub's library that shows nothing and reports how many bytes there are."""
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that watches the bars

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})
            self.done = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            report(self.done)

        # Having these two, it is spared a second bar, which would count hf_xet's bytes before decompression.
        def update_transfer(self, n: float) -> None:
            pass

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Counter

"""The files of a repository, as the Hub lists them or as its cache holds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from converter.read.folder import is_seen
from converter.read.hub.record import digest_in_cache, prefixed

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

    from converter.read.folder import LocalFolder


class HubFile(NamedTuple):
    size: int
    digest: str | None
    """`sha256:…` of a file in large-file storage, `git-sha1:…` (a blob id) of others; None if unknown."""


def listed_files(files: Iterable[RepoSibling]) -> dict[str, HubFile]:
    """Those at the root, and in the folders there, by name. `TypeError` if the Hub did not tell a size."""
    return {file.rfilename: _listed(file) for file in files if is_seen(file.rfilename)}


def cached_files(snapshot: LocalFolder) -> dict[str, HubFile]:
    """The same of a commit that the Hub's cache holds, in part or whole."""
    paths = {name: snapshot.path / name for name in sorted(snapshot.names() | snapshot.inner_names())}
    return {name: HubFile(path.stat().st_size, digest_in_cache(path)) for name, path in paths.items()}


def _listed(file: RepoSibling) -> HubFile:
    if type(file.size) is not int or file.size < 0:
        raise TypeError("size")
    lfs = file.lfs
    return HubFile(file.size, prefixed(lfs.sha256 if lfs is not None else file.blob_id))

"""Which digests of files the Hub's library leaves on this machine: in names of its cache, in records of downloads."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from converter.errors import BadCheckpoint
from converter.read.folder import LocalFolder, is_folder, read_bytes

MAX_RECORD_BYTES = 10_000  # of one download; the library's have about 130

_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def digest_in_cache(path: Path) -> str | None:
    """Of a file in a snapshot of the Hub's cache: `sha256:…` or `git-sha1:…`; None of any other file."""
    # The cache calls its blobs by the digests of their files, and a snapshot links to them.
    return prefixed(path.readlink().name if path.is_symlink() else None)


def digest_at_download(folder: Path, name: str) -> str | None:
    """Of a file that `hf download --local-dir` brought: what the Hub stated; None if it was written to since.

    None, too, where the library's record of the download is missing or not as the library writes it.
    """
    # Commit, ETag and time in a line each, as in huggingface_hub._local_folder, which allows a second likewise.
    notes = folder / ".cache" / "huggingface" / "download"
    if not is_folder(notes) or notes.resolve() != folder.resolve() / notes.relative_to(folder):
        return None  # links out of the folder are not followed
    with contextlib.closing(LocalFolder(notes)) as records, contextlib.suppress(BadCheckpoint, ValueError):
        raw = read_bytes(records, f"{name}.metadata", limit=MAX_RECORD_BYTES)
        _, digest, written = raw.decode("ascii").splitlines()
        if (folder / name).stat().st_mtime - 1 <= float(written):
            return prefixed(digest)
    return None


def prefixed(digest: str | None) -> str | None:
    """`sha256:…` or `git-sha1:…`, whichever it is; None if neither."""
    if digest is None:
        return None
    if _SHA256.fullmatch(digest):
        return f"sha256:{digest}"
    return f"git-sha1:{digest}" if _SHA1.fullmatch(digest) else None

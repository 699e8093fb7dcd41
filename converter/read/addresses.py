"""Addresses: file:///DIR, s3://BUCKET/PREFIX, hf://ORG/NAME and others."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from converter.errors import StoreRefused

BUCKETS = ("s3", "gs", "az")
KNOWN = "hf://ORG/NAME, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX"

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def is_address(place: str) -> bool:
    """Whether this is an address and not a path. The store need not be a known one."""
    return _ADDRESS.match(place) is not None


def is_bucket(place: str) -> bool:
    """Whether this is the address of a bucket."""
    found = _ADDRESS.match(place)
    return found is not None and found[1].lower() in BUCKETS


def path_of(place: str) -> Path | None:
    """The path of a folder or file, also of file:///DIR; None for the address of a store."""
    if place.lower().startswith("file://"):
        parts = urlsplit(place)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise StoreRefused(f"{place[:120]}: not a file of this machine: give file:///FOLDER, or just the folder")
        return Path(unquote(parts.path))
    return None if is_address(place) else Path(place)


def parts_of(address: str) -> tuple[str, str]:
    """The scheme of an address, in lower case, and the rest. `StoreRefused` if the rest may hold a key; the message
    doesn't repeat it."""
    found = _ADDRESS.match(address)
    scheme, rest = (found[1].lower(), address[found.end() :]) if found else ("", address)
    # A key in an address would come into the shell's history, logs and messages.
    if any(mark in rest for mark in "?#") or (scheme in BUCKETS and "@" in rest) or not rest.isprintable():
        raise StoreRefused(
            f"{scheme}://…: has '@', '?' or '#': an address holds no key and no settings; give them in the environment"
        )
    return scheme, rest

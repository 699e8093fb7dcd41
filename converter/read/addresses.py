"""Addresses: file:///DIR, s3://BUCKET/PREFIX, hf://ORG/NAME, models:/NAME/VERSION and others."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from converter.errors import StoreRefused

BUCKETS = ("s3", "gs", "az")
MODELS = "models"
"""Of an MLflow registry. Its addresses have one slash: models:/NAME."""
KNOWN = "hf://ORG/NAME, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, models:/NAME"

_ADDRESS = re.compile(rf"(?:({MODELS}):/{{1,2}}|([a-z][a-z0-9+.-]*)://)", re.IGNORECASE)


def is_address(place: str) -> bool:
    """Whether this is an address and not a path. The store need not be a known one."""
    return _ADDRESS.match(place) is not None


def is_bucket(place: str) -> bool:
    """Whether this is the address of a bucket."""
    return _scheme(place) in BUCKETS


def is_registered(place: str) -> bool:
    """Whether this is the address of a model in an MLflow registry."""
    return _scheme(place) == MODELS


def name_in(label: str) -> str:
    """What lies at an address or in a folder is called so, whatever its revision or version."""
    plain = re.sub(r"/\d+/*$", "", label) if is_registered(label) else label
    return plain.partition("@")[0].rstrip("/").rpartition("/")[2]


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
    scheme, rest = _scheme(address), address[found.end() :] if found else address
    # A key in an address would come into the shell's history, logs and messages.
    if any(mark in rest for mark in "?#") or (scheme in BUCKETS and "@" in rest) or not rest.isprintable():
        raise StoreRefused(
            f"{scheme}://…: has '@', '?' or '#': an address holds no key and no settings; give them in the environment"
        )
    return scheme, rest


def _scheme(place: str) -> str:
    found = _ADDRESS.match(place)
    return (found[1] or found[2]).lower() if found else ""

"""Which store an address means: hf://ORG/NAME, s3://BUCKET/PREFIX …"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from converter.errors import StoreRefused
from converter.write.store import Store

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
BUCKETS = ("s3", "gs", "az")
NO_STORE = "several outputs of one pass go to folders; convert each into its store by itself, or upload the folder"
"""Why a batch has no store."""
KNOWN = "hf://ORG/NAME, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX"


def is_address(place: str) -> bool:
    """Whether this is the address of a store, known or not, and no path."""
    return ADDRESS.match(place) is not None


def path_of(place: str) -> Path | None:
    """The folder or file that a place means; None of the address of a store. file:///DIR is a folder."""
    if place.lower().startswith("file://"):
        parts = urlsplit(place)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise StoreRefused(f"{place[:120]}: not a file of this machine: give file:///FOLDER, or just the folder")
        return Path(unquote(parts.path))
    return None if is_address(place) else Path(place)


def refuse_to_read(place: str) -> None:
    """`StoreRefused` for an address, where only a folder can be read: it says how to get one."""
    found = ADDRESS.match(place)
    if found is None or path_of(place) is not None:
        return
    raise StoreRefused(
        f"{place[:120]}: only a folder or a repository on the Hub can be read here: get it first with your provider's "
        "tool, such as `aws s3 sync ADDRESS FOLDER`"
    )


def parts_of(address: str) -> tuple[str, str]:
    """The scheme of an address, in small letters, and the rest. `StoreRefused`, without the rest, if that has a key."""
    found = ADDRESS.match(address)
    scheme, rest = (found[1].lower(), address[found.end() :]) if found else ("", address)
    # A key in an address would come into the shell's history, logs and messages.
    if any(mark in rest for mark in "?#") or (scheme in BUCKETS and "@" in rest) or not rest.isprintable():
        raise StoreRefused(
            f"{scheme}://…: has '@', '?' or '#': an address holds no key and no settings; give them in the environment"
        )
    return scheme, rest


def open_store(address: str, *, create_pr: bool = False) -> Store:
    """The store at an address. `StoreRefused` if there can be none."""
    scheme, rest = parts_of(address)
    if scheme == "hf":
        from converter.write.stores.hub import HubStore

        repo_id, _, branch = rest.rstrip("/").partition("@")
        return HubStore(repo_id, branch or None, create_pr=create_pr)
    if create_pr:
        raise StoreRefused(f"{address}: `create_pr` goes with hf://ORG/NAME only")
    if scheme in BUCKETS:
        from converter.write.stores.bucket import Bucket

        return Bucket(scheme, rest)
    raise StoreRefused(f"{address[:120]}: not a store that is known; give a folder, or {KNOWN}")

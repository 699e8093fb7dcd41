"""Which store an address means: hf://ORG/NAME, s3://BUCKET/PREFIX, models:/NAME …"""

from __future__ import annotations

from converter.errors import StoreRefused
from converter.read.addresses import BUCKETS, KNOWN, MODELS, parts_of
from converter.write.store import Store

NO_STORE = "several outputs of one pass go to folders; convert each into its store by itself, or upload the folder"
"""Why a batch has no store."""


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
    if scheme == MODELS:
        from converter.write.stores.registry import RegisteredModel

        return RegisteredModel(address)
    raise StoreRefused(f"{address[:120]}: not a store that is known; give a folder, or {KNOWN}")

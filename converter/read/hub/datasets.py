"""A file of a dataset on the Hub, by its address, fetched into the Hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from converter.errors import BadRecipe
from converter.read.hub.errors import Subject, retrying
from converter.read.hub.folder import DEFAULT_REVISION, is_repo_id, offline_by_environment, prepare_library

SCHEME = "hf://datasets/"
_ADDRESS = re.compile(r"(?P<id>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def is_dataset_file(reference: str) -> bool:
    """Whether this is the address of a file in a dataset, and not a path."""
    return reference.startswith(SCHEME)


def dataset_file(address: str, *, offline: bool = False) -> Path:
    """A file at hf://datasets/ORG/NAME[@REVISION]/FILE: where it lies on this machine, once it is there.

    `BadRecipe` for an address of another form; `HubNotFound`, `HubGated`, `HubOffline`, `HubFailed`.
    """
    found = _ADDRESS.fullmatch(address.removeprefix(SCHEME))
    if found is None or not is_repo_id(found["id"]) or ".." in address:
        raise BadRecipe(f"{address[:200]}: not the address of a dataset's file: {SCHEME}ORG/NAME/FILE")
    prepare_library()
    from huggingface_hub import hf_hub_download

    name, file, revision = found["id"], found["file"], found["revision"] or DEFAULT_REVISION
    offline = offline or offline_by_environment()

    def fetch() -> Path:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=revision, local_files_only=offline))

    return retrying(fetch, Subject(f"datasets/{name}", revision, file))

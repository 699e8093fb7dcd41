"""An adapter as the user named it, opened: a local folder, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from converter.combination import Combination
from converter.errors import BadAdapter, BadCheckpoint, BadRecipe, ConversionRefused, HubFailed, HubRefused
from converter.job import Adapters, Reference
from converter.merge import mlx, torchtune
from converter.merge.adapter import Adapter
from converter.merge.combine import combined
from converter.merge.files import (
    CONFIG,
    OF_MLX,
    PICKLED,
    TRAINED_BESIDE,
    WEIGHTS,
    is_of_mlx,
    of_torchtune,
    refuse_other_formats,
    refuse_weights_beside,
)
from converter.merge.pickled import unpickled
from converter.read.addresses import is_bucket, is_registered, path_of
from converter.read.bucket.folder import open_bucket
from converter.read.checksums import SUMS, Hashing, Stated, stated
from converter.read.folder import Folder, LocalFolder
from converter.read.hub.folder import HubFolder, is_hub_id
from converter.read.mistaken import similar_folders
from converter.read.registry.folder import open_version
from converter.read.side_files import wanted_from_adapter

_ADDRESS = re.compile(r"[a-z][a-z0-9]+:/{1,2}(?:(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+))?")
"""An address on the web, and the id on the Hub that it names."""


class OpenedAdapter(NamedTuple):
    """An adapter; of one on the Hub, its commit and its id there."""

    adapter: Adapter
    commit: str | None
    id: str | None
    checked: dict[str, str]
    """Its weights file → who stated the sha256 that it was found to have; empty if nobody did."""
    sources: tuple[Folder, ...]
    """The folders as the user named them. They are closed last: closing a bucket's folder removes what was fetched."""

    def close(self) -> None:
        for folder in (self.adapter.folder, *self.sources):
            folder.close()


def open_adapter(
    reference: Reference, revision: str | None = None, *, offline: bool = False, allow_pickle: bool = False
) -> OpenedAdapter:
    """Open an adapter, downloaded if it is on the Hub. `BadAdapter` if its sha256 is not the known one.

    That costs little, for planning reads its values, too. With `allow_pickle` its weights may be pickled: they are
    read as weights only.
    """
    opened = open_folder(reference, revision, offline=offline)
    names = opened.names()
    of_mlx, own = is_of_mlx(names), of_torchtune(names) if allow_pickle else []
    pickled = [PICKLED, TRAINED_BESIDE] if allow_pickle else []
    whole = [OF_MLX] * of_mlx + own
    refuse_other_formats(opened, taken=[*pickled[:1], *whole])
    saved_by_mlx = [name for name in names if of_mlx and name.endswith(OF_MLX)]
    refuse_weights_beside(names, opened.label, taken=[*pickled[1:], *saved_by_mlx, *own])
    if not (weights := whole):
        weights = [name for name in ([WEIGHTS] if WEIGHTS in names else [PICKLED]) if name in names]
        weights += [name for name in pickled[1:] if name in names]
    configs = [name for name in (CONFIG, torchtune.OF_BASE) if name in names]
    sums = [SUMS] if opened.repo_id is None and SUMS in names else []  # the Hub itself states them
    try:
        folder = opened.fetch([*configs, *weights, *wanted_from_adapter(opened), *sums])
        known = _checked(folder, {name: opened.digest(name) for name in weights})
        read = torchtune.in_pefts_form(unpickled(folder)) if allow_pickle else folder
        torchtune.refuse_wrongly_turned(read)
        adapter = Adapter(mlx.in_pefts_form(read))
        adapter.notes += [mlx.NOTE] * of_mlx + [torchtune.NOTE] * bool(own)
    except BaseException:
        opened.close()
        raise
    checked = {file: of.by for file, of in known.items()}
    return OpenedAdapter(adapter, opened.commit, opened.repo_id, checked, (opened,))


class Several(NamedTuple):
    """Adapters, and how they become the one that is merged; without that they are refused."""

    adapters: Sequence[Reference]
    combine: Combination | None


def wanted(adapter: Adapters | None, combine: Combination | None) -> Reference | Several | None:
    """What a job says of its adapter, as one value."""
    if adapter is None or isinstance(adapter, str | os.PathLike):
        return adapter if combine is None else Several([] if adapter is None else [adapter], combine)
    return Several(adapter, combine)


def open_adapters(
    adapter: Reference | Several, revision: str | None = None, *, offline: bool = False, allow_pickle: bool = False
) -> OpenedAdapter:
    """Open one adapter, or make one of several."""
    if not isinstance(adapter, Several):
        return open_adapter(adapter, revision, offline=offline, allow_pickle=allow_pickle)
    if adapter.combine is None:
        raise BadRecipe("several adapters become one output only by `combine`; jobs of a batch take one each")
    if revision is not None:
        raise BadRecipe("`adapter_revision` goes with one adapter")
    opened: list[OpenedAdapter] = []
    try:
        opened += (open_adapter(one, offline=offline, allow_pickle=allow_pickle) for one in adapter.adapters)
        made = combined([one.adapter for one in opened], adapter.combine)
    except BaseException:
        for one in opened:
            one.close()
        raise
    for one in opened:
        one.adapter.folder.close()
    return OpenedAdapter(made, None, None, {}, tuple(folder for one in opened for folder in one.sources))


def _checked(folder: LocalFolder, digests: dict[str, str | None]) -> dict[str, Stated]:
    """What is known of the sha256 of some files; `BadAdapter` names one that has another. `digests`: the Hub's."""
    try:
        known = stated(folder, digests, {name: digest for name, digest in digests.items() if digest is not None})
        with Hashing() as hashing:
            hashing.check(folder, known)
    except BadCheckpoint as exc:
        raise BadAdapter(str(exc)) from exc
    return known


def open_folder(reference: Reference, revision: str | None, *, offline: bool) -> Folder:
    """A folder of this machine, a repository on the Hub, a prefix of a bucket, or a version in a registry. Raises a
    `ConversionRefused` if there is none."""
    text = os.fspath(reference)
    if is_registered(text):
        if revision is not None:
            raise ConversionRefused(f"{text[:120]}: the address has the version: leave the revision out")
        return open_version(text, offline=offline)
    if is_bucket(text):
        if revision is not None:
            raise ConversionRefused(f"{text[:120]}: a bucket has no revisions: leave the revision out")
        return open_bucket(text, offline=offline)
    if text.lower().startswith("file://"):
        return LocalFolder(path_of(text) or Path(text))
    if (address := _ADDRESS.match(text)) is not None:
        raise ConversionRefused(f"{text}: an address; give the id, {address[1] or 'as ORG/NAME'}, or a folder")
    if isinstance(reference, str) and is_hub_id(text):
        try:
            return HubFolder(text, revision, offline=offline)
        except (HubRefused, HubFailed) as exc:
            here = f"no such folder here{similar_folders(Path(text))}"
            raise type(exc)(f"{text}: {here}{'' if here.endswith('?') else ','} and on the Hub: {exc}") from exc
    try:
        return LocalFolder(Path(text).expanduser())
    except RuntimeError as exc:  # a home folder of nobody
        raise ConversionRefused(f"{text}: {exc}") from exc

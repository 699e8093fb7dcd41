"""OUT in a store: its files gather in a folder of this machine, its shards leave it one by one, and one step at the end
makes the whole visible."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from converter.errors import BadOutput, ConversionRefused, Interrupted
from converter.job import Job, RunOptions
from converter.read.cache import cache_folder
from converter.read.checkpoint import CONFIG
from converter.read.checksums import SUMS
from converter.seal.destination import BASE, OURS, Destination, Place, arrival, remove, room, sizes_in
from converter.seal.receipt import CARD, RECEIPT, parse_receipt
from converter.write.durable import Disk
from converter.write.journal import Journal, Upload
from converter.write.store import NOTHING, Store, Told, resumable
from converter.write.stores.addresses import open_store
from converter.write.uploads import Uploads

if TYPE_CHECKING:
    from converter.plan.plan import Plan

Tell = Callable[[Mapping[str, Any], Mapping[str, Any]], Told]
"""What to tell of an output, from its receipt, and from what was measured besides."""

SMALL_FILES = 100_000_000
"""Bytes that side files, index and receipt are taken to have at most, on this machine's disk."""
NEUTRAL = frozenset({".gitattributes", ".gitignore", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"})
"""What a repository may have that holds no model yet."""


class Published:
    """OUT in a store. `work` is the folder that has a staging folder for each address."""

    def __init__(
        self,
        store: Store,
        *,
        overwrite: bool,
        work: Path | None = None,
        stop: Callable[[], int | None] = lambda: None,
        tell: Tell = lambda *_: NOTHING,
    ) -> None:
        self._store, self._overwrite, self._stop, self._tell = store, overwrite, stop, tell
        name = re.sub(r"[^\w.-]+", "-", store.label)[:80]
        key = hashlib.sha256(store.label.encode()).hexdigest()[:12]
        self._staging = (work or cache_folder() / "outputs").expanduser().absolute() / f"{name}-{key}.partial"
        self.accepted = False
        self.seen_at = store.label
        """Where to look at what was published: an address on the web, if there is one."""
        self._files: dict[str, int] = {}
        self.receipt: dict[str, Any] | None = None
        self._look()
        self._waiting = 1

    @property
    def label(self) -> str:
        return self._store.label

    @property
    def note(self) -> str:
        """What a user should know before anything is written; empty if there is nothing."""
        return self._store.note

    @property
    def staging(self) -> Path:
        return self._staging

    def receipt_for(self, plan: Plan) -> dict[str, Any] | None:
        if self._store.is_versioned:
            self._store.look_for(plan.content, plan.adapter_digest, plan.digest)
            self._look()
        return self.receipt

    def holds(self, fingerprint: str) -> bool:
        if self.receipt is None or self.receipt["fingerprint"] != fingerprint:
            return False
        return self._is_whole(self.receipt)

    def refuse_if_taken(self) -> None:
        others = set(self._files) - NEUTRAL
        if self._store.is_versioned or not others:
            return
        if self.receipt is None:
            raise BadOutput(
                f"{self.label}: holds {min(others)!r}, and nothing says that this tool made it; choose another place"
            )
        if CONFIG not in self._files and others <= self._names(self.receipt):
            return  # what a run left that died while it published
        if not self._overwrite:
            what = (
                "another conversion" if self._is_whole(self.receipt) else "a conversion with missing or changed files"
            )
            raise BadOutput(f"{self.label}: holds {what}; `overwrite` replaces it")

    def room_for(self, plan: Plan, disk: int | None = None) -> int:
        """What all shards take that are whole on this disk at one time: the one that is made, and those before it that
        are uploaded."""
        sizes = [shard.layout.size for shard in plan.shards]
        self._waiting = 1 if disk is None else (disk - SMALL_FILES) // max(sizes) - 1
        return min(sum(sizes), (1 + self._waiting) * max(sizes)) + SMALL_FILES

    def least_room_for(self, plan: Plan) -> int:
        return max(shard.layout.size for shard in plan.shards) + SMALL_FILES

    def refuse_if_too_full(self, nbytes: int) -> None:
        if (free := room([self._staging, self._staging / BASE])) < nbytes:
            raise BadOutput(
                f"{self._staging}: {nbytes:,} bytes are needed on this machine, the disk has {free:,} free; make room "
                "for them, or choose another disk with `work`, or smaller shards with `max_shard_size`"
            )

    def uploads(self, journal: Journal, disk: Disk) -> Uploads:
        self._store.begin()
        return Uploads(self._store, self._staging, journal, disk, waiting=self._waiting, stop=self._stop)

    def accept(self) -> None:
        self._show(self._staging, _shards_of(self._staging))
        remove(self._staging)

    def publish(self, folder: Path, measured: Mapping[str, Any] = MappingProxyType({})) -> None:
        shards = _shards_of(folder)
        try:
            self._store.begin()
            for upload in shards:
                if (signum := self._stop()) is not None:
                    raise Interrupted(signum, f"{signal.Signals(signum).name} before {upload.shard} was uploaded")
                self._store.take(upload, folder / upload.shard)
        except ConversionRefused as exc:
            raise resumable(exc) from exc
        self._show(folder, shards, measured)

    def _look(self) -> None:
        self._files = dict(self._store.files())
        self.receipt = parse_receipt(self._store.read(RECEIPT)) if RECEIPT in self._files else None

    def _show(self, folder: Path, shards: list[Upload], measured: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Make OUT of shards that the store has, and of the small files in a folder."""
        taken = {upload.shard for upload in shards}
        beside = sorted(sizes_in(folder).keys() - taken - OURS, key=arrival)
        small = {name: folder / name for name in beside}
        earlier = None if self._store.is_versioned else self.receipt
        before = self._names(earlier) & self._files.keys() if earlier is not None else set()
        receipt = parse_receipt((folder / RECEIPT).read_bytes())
        told = NOTHING if receipt is None else self._tell(receipt, measured)
        try:
            self.seen_at = self._store.publish(shards, small, before - taken - small.keys(), told)
        except ConversionRefused as exc:
            raise resumable(exc) from exc
        self.accepted = True
        self.receipt = receipt

    def _is_whole(self, receipt: Mapping[str, Any]) -> bool:
        return all(self._files.get(name) == file.get("bytes") for name, file in receipt["files"].items())

    @staticmethod
    def _names(receipt: Mapping[str, Any]) -> set[str]:
        return {RECEIPT, SUMS, CARD, *receipt["files"]}


def _shards_of(folder: Path) -> list[Upload]:
    """Those of a finished output, as its receipt lists them."""
    receipt = parse_receipt((folder / RECEIPT).read_bytes())
    assert receipt is not None  # noqa: S101  (it was written a moment ago)
    return [
        Upload(name, file["bytes"], file["sha256"])
        for name, file in receipt["files"].items()
        if name.endswith(".safetensors")
    ]


def place_of(
    job: Job,
    options: RunOptions,
    inputs: Iterable[Path],
    stop: Callable[[], int | None] = lambda: None,
    tell: Tell = lambda *_: NOTHING,
) -> Place:
    """OUT of a job: a folder, or a place in a store, which hears by `tell` what is known of the output."""
    if job.store is None:
        if options.create_pr or options.work is not None:
            raise BadOutput(f"{job.out}: `create_pr` and `work` go with an OUT in a store, such as hf://ORG/NAME")
        return Destination(job.out, inputs=inputs, overwrite=options.overwrite)
    if options.offline:
        raise BadOutput(f"{job.store}: `offline` reaches no store; write to a folder")
    store = open_store(job.store, create_pr=options.create_pr)
    return Published(store, overwrite=options.overwrite, work=options.work, stop=stop, tell=tell)

"""The seam to places that are no folder of this machine: repositories on the Hub, buckets.

A store takes finished shards one by one, and keeps them by their digest where no reader finds them. `publish` makes the
whole visible. Until then what lies at OUT is what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from converter.errors import ConversionFailed, ConversionRefused, StoreFailed
from converter.read.folder import LocalFolder
from converter.read.header import read_header
from converter.write.durable import LOCAL_DISK, UNFINISHED, Disk, writing
from converter.write.journal import Upload

MAX_READ_BYTES = 100_000_000
"""The longest file that is read from a store as a whole."""
SMALL = 65_536
"""Bytes of the largest tensor that `thin` leaves in a shard: the quant states are smaller."""


@dataclass(frozen=True)
class Told:
    """What is known of an output beside its files. A store with room for it shows it; no reader of models needs it."""

    tags: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    pages: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    """Name → what makes the page's HTML: only a store that shows it pays for it."""


NOTHING = Told()


class Store(Protocol):
    """Where OUT is. Every method raises a `ConversionRefused` for what is not allowed, or a `ConversionFailed` when the
    connection or the server failed, after some tries; no message has a token or a key."""

    is_versioned: bool
    """Whether each conversion is a version of its own, and replaces none."""

    @property
    def label(self) -> str:
        """How messages call it: the address that the user gave."""

    @property
    def note(self) -> str:
        """What a user should know before anything is written; empty if there is nothing."""

    def look_for(self, content: str, adapter: str | None, layout: str) -> None:
        """Where a store keeps versions: let OUT be the newest one of a plan of this content with this adapter, if there
        is one. `layout`: the digest of the plan, by which the work of a killed run is found. Comes before `begin`."""

    def files(self) -> Mapping[str, int]:
        """Name → bytes of what lies at OUT now."""

    def read(self, name: str) -> bytes:
        """The contents of a small file at OUT."""

    def begin(self) -> None:
        """Make what must be there before `take`."""

    def has(self, upload: Upload) -> bool:
        """Whether `take` took these contents, in this run or another, and they are still there."""

    def take(self, upload: Upload, path: Path) -> None:
        """Upload a finished shard, so that no reader sees it. What is there already is not sent again."""

    def publish(self, uploads: Collection[Upload], small: Mapping[str, Path], gone: Collection[str], told: Told) -> str:
        """Make OUT of the shards that were taken and of small files, and remove the files in `gone`; where it is to be
        seen. A reader sees the whole, or no checkpoint. If it fails, it may be called again.

        Where it takes several steps, the first small file comes before the shards, for it tells what an interrupted
        run left; the last one comes last, for it makes a checkpoint of the rest."""

    def forget(self, uploads: Collection[Upload]) -> None:
        """Remove what was taken and won't be published, as far as that can be done."""


def thin(path: Path, disk: Disk = LOCAL_DISK) -> None:
    """Put a file in the place of a shard that has its size, header, quant states and small tensors; the rest is a hole,
    which takes no room on the disk. So what reads names, shapes and settings reads on."""
    folder = LocalFolder(path.parent)
    try:
        tensors = sorted(read_header(folder, path.name).values(), key=lambda tensor: tensor.offset)
        size = folder.size(path.name)
        spans = [(0, tensors[0].offset if tensors else size)]
        spans += [(tensor.offset, tensor.nbytes) for tensor in tensors if tensor.nbytes <= SMALL]
        temporary = path.with_name(path.name + UNFINISHED)
        with writing(path):
            descriptor = disk.create(temporary)
            try:
                disk.cut(descriptor, size)
                for offset, length in spans:
                    raw = bytearray(length)
                    folder.read_into(path.name, offset, memoryview(raw))
                    disk.write(descriptor, memoryview(raw), offset)
                disk.sync(descriptor)
            finally:
                disk.close(descriptor)
            disk.commit(temporary, path)
    finally:
        folder.close()


def resumable(refused: ConversionRefused) -> ConversionFailed:
    """What a store refuses in the middle of a conversion, as a failure after which the work is kept."""
    return StoreFailed(str(refused))

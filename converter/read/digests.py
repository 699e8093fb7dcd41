"""Digests of a base's tensors, remembered between runs: an unchanged base is recognised without reading it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping

import xxhash

from converter.read import cache
from converter.read.checkpoint import Checkpoint
from converter.read.stored.stored import Source

_KIND = "digests"
_SAMPLES, _SAMPLE_BYTES = 1000, 64


def tensor_digest(base: Checkpoint, tensor: Source) -> str:
    """xxh3-128 of a tensor's bytes, in hex."""
    digest = xxhash.xxh3_128()
    for piece in tensor.pieces(base.folder):
        digest.update(piece)
    return digest.hexdigest()


def sample(base: Checkpoint) -> str:
    """xxh3-128 of a few bytes of each tensor, or of so many: another model of the same shapes has another one, though
    its files have the same size and time, as those of an image or an archive may."""
    digest, tensors = xxhash.xxh3_128(), list(base)
    for tensor in tensors[:: len(tensors) // _SAMPLES + 1]:
        piece = memoryview(bytearray(min(_SAMPLE_BYTES, tensor.nbytes)))
        base.folder.read_into(tensor.file, tensor.offset + (tensor.nbytes - len(piece)) // 2, piece)
        digest.update(piece)
    return digest.hexdigest()


def remembered_digests(base: Checkpoint) -> dict[str, str]:
    """Digests from an earlier reading of the very same files: tensor name → xxh3-128."""
    if (key := _key_of(base)) is None:
        return {}
    with contextlib.suppress(OSError, TypeError, AttributeError):
        remembered = cache.load(_KIND, key)
        known: dict[str, str] = {}
        for shard in base.shards:
            if remembered.get(shard, {}).get("file") == base.folder.state(shard):
                known |= remembered[shard]["tensors"]
        return {name: str(digest) for name, digest in known.items() if name in base.tensors}
    return {}


def digests_of(base: Checkpoint, tensors: Iterable[Source]) -> dict[str, str]:
    """Digests of tensors of a base, whatever they are called; those that are not remembered are read."""
    known, new = remembered_digests(base), False
    for tensor in tensors:
        if tensor.name not in known:
            known[tensor.name] = tensor_digest(base, tensor)
            new = True
    if new:
        remember_digests(base, known)
    return known


def remember_digests(base: Checkpoint, digests: Mapping[str, str]) -> None:
    """Keep digests for later runs, beside those that are known already."""
    if (key := _key_of(base)) is None:
        return
    digests = remembered_digests(base) | dict(digests)
    shards = {
        shard: {
            "file": base.folder.state(shard),
            "tensors": {n: d for n, d in digests.items() if n in base.tensors and base.tensors[n].file == shard},
        }
        for shard in base.shards
    }
    cache.store(_KIND, key, shards)


def _key_of(base: Checkpoint) -> str | None:
    """The key under which facts about a base are remembered; None for a base on the Hub, where nothing need be."""
    folder = base.folder
    if folder.path is not None:
        return cache.key_of(folder.path)
    if not all(folder.state(shard) for shard in base.shards):
        return None
    return hashlib.sha256(folder.label.encode()).hexdigest()[:32]

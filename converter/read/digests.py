"""Digests of a base's tensors, remembered between runs, so that an unchanged base needn't be read to be recognised.

The memory is a convenience: where it can't be read or written, the base is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from converter.read.checkpoint import Checkpoint, LocalFolder, TensorHeader

_PIECE = 8 << 20
_SAMPLES, _SAMPLE_BYTES = 1000, 64


def tensor_digest(base: Checkpoint, tensor: TensorHeader) -> str:
    """xxh3-128 of a tensor's bytes, in hex."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(min(_PIECE, tensor.nbytes))
    for start in range(0, tensor.nbytes, _PIECE):
        piece = memoryview(buffer)[: min(_PIECE, tensor.nbytes - start)]
        base.folder.read_into(tensor.file, tensor.offset + start, piece)
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


def recall(base: Checkpoint) -> dict[str, str]:
    """Digests known from an earlier reading of the very same files; tensor name → xxh3-128."""
    if not isinstance(base.folder, LocalFolder):
        return {}
    with contextlib.suppress(OSError, TypeError, AttributeError):
        remembered = kept(_path(base.folder))
        known: dict[str, str] = {}
        for shard in base.shards:
            if remembered.get(shard, {}).get("file") == base.folder.state(shard):
                known |= remembered[shard]["tensors"]
        return {name: str(digest) for name, digest in known.items() if name in base.tensors}
    return {}


def digests_of(base: Checkpoint, tensors: Iterable[TensorHeader]) -> dict[str, str]:
    """Digests of tensors of a base, whatever they are called; those that are not remembered are read."""
    known, new = recall(base), False
    for tensor in tensors:
        if tensor.name not in known:
            known[tensor.name] = tensor_digest(base, tensor)
            new = True
    if new:
        remember(base, known)
    return known


def remember(base: Checkpoint, digests: Mapping[str, str]) -> None:
    """Keep what a conversion learnt while it read, beside what is known already."""
    if not isinstance(base.folder, LocalFolder):
        return
    digests = recall(base) | dict(digests)
    shards = {
        shard: {
            "file": base.folder.state(shard),
            "tensors": {n: d for n, d in digests.items() if n in base.tensors and base.tensors[n].file == shard},
        }
        for shard in base.shards
    }
    keep(_path(base.folder), shards)


def cache_folder() -> Path:
    """Where this user's runs keep what they need not find out again."""
    stated = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(stated or Path.home() / ".cache") / "nf4-converter"
    except RuntimeError:  # a user of a container, who is in no list and has no home: nothing is kept
        return Path(os.devnull) / "nf4-converter"


def keep(path: Path, value: Any) -> None:
    """Write what later runs may want, as JSON; where there is no place for it, they find it out again."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value))
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):  # a full disk has room for empty files, one a run
            temporary.unlink()


def kept(path: Path) -> Any:
    """What an earlier run wrote; None if there is nothing, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text())
    return None


def _path(folder: LocalFolder) -> Path:
    name = hashlib.sha256(os.fsencode(folder.path.resolve())).hexdigest()[:32]
    return cache_folder() / "digests" / f"{name}.json"

"""The header of a safetensors file: which tensors it holds, and where. https://github.com/huggingface/safetensors#format

A header is not trusted: it is parsed here, within limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from converter.errors import BadCheckpoint
from converter.read.folder import Folder, pieces
from converter.read.strict_json import parse_json_object

MAX_HEADER_BYTES = 25_000_000  # the Hub's own limit
MAX_TENSORS = 200_000  # in one checkpoint; the largest public ones have about 100,000
MAX_NAME_LENGTH = 512
MAX_RANK = 8

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Bytes per element, by safetensors dtype."""


@dataclass(frozen=True)
class TensorHeader:
    """What a shard's header says of one tensor."""

    name: str
    dtype: str
    """As safetensors spells it: BF16, F16, F32, …"""
    shape: tuple[int, ...]
    file: str
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    def pieces(self, folder: Folder) -> Iterator[memoryview]:
        """Its bytes, piece by piece, as `folder.pieces` gives them."""
        return pieces(folder, self.file, self.offset, self.nbytes)


def read_header(folder: Folder, name: str, *, most: int = MAX_TENSORS) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, in the order of their offsets.

    `BadCheckpoint` unless the header is well formed, of at most `most` tensors, and the tensors cover the file without
    overlap, hole or rest.
    """
    where = f"{folder.label}: {name}"
    size = folder.size(name)
    if size < 8:
        raise BadCheckpoint(f"{where}: {size} bytes, too short for a safetensors file")
    prefix = bytearray(8)
    folder.read_into(name, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise BadCheckpoint(f"{where}: header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise BadCheckpoint(f"{where}: header of {length:,} bytes in a file of {size:,}: truncated?")
    raw = bytearray(length)
    folder.read_into(name, 8, memoryview(raw))
    if raw[:1] != b"{":
        raise BadCheckpoint(f"{where}: the header does not begin with '{{'")
    entries = parse_json_object(bytes(raw), where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadCheckpoint(f"{where}: __metadata__ is not a mapping of strings")
    if len(entries) > most:
        raise BadCheckpoint(f"{where}: {len(entries):,} tensors, expected at most {most:,}")
    tensors = [_tensor_header(where, name, key, entry, 8 + length) for key, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise BadCheckpoint(f"{where}: {tensor.name!r} begins at byte {tensor.offset}, expected {end}: it {kind}")
        end += tensor.nbytes
    if end != size:
        raise BadCheckpoint(f"{where}: the tensors end at byte {end:,}, the file at {size:,}: truncated or padded?")
    return {tensor.name: tensor for tensor in tensors}


def _tensor_header(where: str, file: str, name: str, entry: object, data_start: int) -> TensorHeader:
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise BadCheckpoint(f"{where}: tensor name {name[:60]!r} is empty, too long or not printable")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise BadCheckpoint(f"{where}: {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadCheckpoint(f"{where}: {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not are_sizes(shape) or len(shape) > MAX_RANK:
        raise BadCheckpoint(f"{where}: {name!r} has the shape {str(shape)[:60]}, expected at most {MAX_RANK} sizes")
    if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadCheckpoint(f"{where}: {name!r} has the offsets {str(offsets)[:60]}, expected [begin, end]")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise BadCheckpoint(
            f"{where}: {name!r} spans {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} takes {nbytes:,}"
        )
    return TensorHeader(name, dtype, tuple(shape), file, data_start + offsets[0], nbytes)


def are_sizes(value: object) -> bool:
    """Whether it is a list of numbers that sizes can be."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

"""Where every byte of an output goes. Names, shapes and dtypes alone decide it.

A shard holds its tensors by width of dtype, so that each is aligned and no gaps remain. The JSON quant states come
last, because their length depends on the weights. The header needs those lengths. It is written when they are known,
into room reserved for its longest form, and padded with spaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from converter.quantize.format import Output
from converter.read.header import DTYPE_BYTES, MAX_HEADER_BYTES, MAX_TENSORS
from converter.read.strict_json import MAX_JSON_BYTES


@dataclass(frozen=True)
class Limits:
    """The most that an output may have: readers refuse more."""

    tensors: int = MAX_TENSORS
    json_bytes: int = MAX_JSON_BYTES
    """Bytes of an index."""
    header_bytes: int = MAX_HEADER_BYTES - 1_000
    """Bytes of all entries in one shard's header."""


LIMITS = Limits()


@dataclass(frozen=True)
class ShardLayout:
    """Offsets of one output file, in bytes from its start."""

    header_bytes: int
    """Bytes reserved for the header's JSON: the length that the first eight bytes of the file give."""
    offsets: dict[str, int]
    """Tensor name → offset, without the quant states."""
    states_offset: int
    """Where the quant states begin: after everything else."""
    size: int
    """Bytes of the file, if every quant state is as long as it can be."""


def pack_shards(
    sizes: Sequence[int], limit: int, headers: Sequence[int] | None = None, most: int = LIMITS.header_bytes
) -> list[list[int]]:
    """Indices of consecutive units in shards of at most `limit` bytes; a larger unit has one for itself.

    `headers` are the bytes that each takes of a header, which has at most `most`.
    """
    shards: list[list[int]] = [[]]
    room, header_room = limit, most
    for index, (size, header) in enumerate(zip(sizes, headers or [0] * len(sizes), strict=True)):
        if shards[-1] and (size > room or header > header_room):
            shards.append([])
            room, header_room = limit, most
        shards[-1].append(index)
        room -= size
        header_room -= header
    return shards


def shard_names(count: int) -> list[str]:
    """File names, as transformers gives them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def lay_out(outputs: Iterable[Output]) -> ShardLayout:
    """Offsets for the tensors of one shard, which keep their order within each width."""
    ordered = sorted(outputs, key=lambda output: (output.is_state, -DTYPE_BYTES[output.dtype]))
    relative: dict[str, int] = {}
    end = 0
    states_at = None
    for output in ordered:
        if output.is_state and states_at is None:
            states_at = end
        relative[output.name] = end
        end += output.nbytes
    header = header_json([(output, relative[output.name], output.nbytes) for output in ordered])
    header_bytes = len(header) + -len(header) % 8
    start = 8 + header_bytes
    offsets = {output.name: start + relative[output.name] for output in ordered if not output.is_state}
    return ShardLayout(header_bytes, offsets, start + (end if states_at is None else states_at), start + end)


def header_json(placed: Iterable[tuple[Output, int, int]]) -> bytes:
    """A safetensors header for (tensor, offset from the start of the data, bytes).

    https://github.com/huggingface/safetensors#format
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for output, offset, nbytes in placed:
        shape = [nbytes] if output.is_state else list(output.shape)
        entries[output.name] = {"dtype": output.dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
    return json.dumps(entries, separators=(",", ":")).encode()

"""Where every byte of an output goes, decided from names, shapes and dtypes alone.

A shard holds regions by width of dtype, so that every tensor is aligned and nothing lies between them. The JSON quant
states, whose length depends on the weights, come last; the header, which must know those lengths, is written when they
are known, into room reserved for its longest form and padded with spaces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from converter.read.checkpoint import DTYPE_BYTES, MAX_HEADER_BYTES
from converter.recipe import Recipe

NESTED_BLOCK = 256
"""Absmax values that share one nested absmax; fixed in `bitsandbytes.functional.quantize_4bit`."""
LONGEST_FLOAT = -2.2250738585072014e-308
"""A float with the longest `repr` there is, 24 characters."""
MAX_SHARD_HEADER = MAX_HEADER_BYTES - 1_000
"""Bytes of all tensors' entries in one header."""
MIN_MERGE_ROWS = 64
"""Rows of a product B·A that BLAS computes to the same bits as the whole product; short tiles were seen to differ."""


@dataclass(frozen=True)
class Output:
    """One tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of a quant state: (its longest length,)."""
    is_state: bool = False
    """A JSON quant state: its length is known only when its weight is quantized."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def header_bytes(self) -> int:
        """What it takes of a shard's header, at the most."""
        return len(json.dumps(self.name)) + 100 + 20 * len(self.shape)


@dataclass(frozen=True)
class ShardLayout:
    """Offsets of one output file, in bytes from its start."""

    header_bytes: int
    """Room for the header's JSON, the length that the file's first eight bytes give."""
    offsets: dict[str, int]
    """Tensor name → offset, quant states excepted."""
    states_offset: int
    """Where the quant states begin: after everything else."""
    size: int
    """Bytes of the file if every quant state had its longest length."""


def outputs_of(name: str, shape: tuple[int, ...], dtype: str, recipe: Recipe, *, quantize: bool) -> tuple[Output, ...]:
    """What becomes of one weight of `shape` (out_features, in_features): itself, or packed codes and quant state.

    `dtype` is that of a weight that stays, as safetensors spells it. Names and shapes are those of
    `bitsandbytes.nn.Params4bit` and `Int8Params` in a state dict.
    """
    if not quantize:
        return (Output(name, dtype, shape),)
    if recipe.quant_type == "int8":
        module = name.removesuffix(".weight")
        return (
            Output(name, "I8", shape),
            Output(f"{module}.SCB", "F32", shape[:1]),
            Output(f"{module}.weight_format", "U8", ()),
        )
    count = math.prod(shape)
    blocks = -(count // -recipe.block_size)
    state = quant_state_json(recipe, shape, LONGEST_FLOAT if recipe.double_quant else None)
    outputs = [
        Output(name, "U8", (-(count // -2), 1)),
        Output(f"{name}.absmax", "U8" if recipe.double_quant else "F32", (blocks,)),
        Output(f"{name}.quant_map", "F32", (16,)),
    ]
    if recipe.double_quant:
        outputs += [
            Output(f"{name}.nested_absmax", "F32", (-(blocks // -NESTED_BLOCK),)),
            Output(f"{name}.nested_quant_map", "F32", (256,)),
        ]
    outputs.append(Output(f"{name}.quant_state.bitsandbytes__{recipe.quant_type}", "U8", (len(state),), is_state=True))
    return tuple(outputs)


def quant_state_json(recipe: Recipe, shape: tuple[int, ...], offset: float | None) -> bytes:
    """The part of a quant state that isn't tensors, as `bitsandbytes.utils.pack_dict_to_tensor` spells it.

    `offset` is the mean that double quant subtracts from absmax; None: single quant.
    """
    state: dict[str, Any] = {
        "quant_type": recipe.quant_type,
        "blocksize": recipe.block_size,
        "dtype": recipe.dtype,
        "shape": list(shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def pack_shards(sizes: Sequence[int], limit: int, headers: Sequence[int] | None = None) -> list[list[int]]:
    """Indices of consecutive units in shards of at most `limit` bytes; a larger unit has one for itself.

    `headers` are the bytes that each takes of a header, which has a limit, too.
    """
    shards: list[list[int]] = [[]]
    room, header_room = limit, MAX_SHARD_HEADER
    for index, (size, header) in enumerate(zip(sizes, headers or [0] * len(sizes), strict=True)):
        if shards[-1] and (size > room or header > header_room):
            shards.append([])
            room, header_room = limit, MAX_SHARD_HEADER
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


def tile_bounds(rows: int, columns: int, *, block: int, most: int) -> tuple[int, ...]:
    """Row numbers that cut a matrix into tiles of about `most` elements: (0, …, rows).

    Tiles hold whole blocks (of `block` consecutive elements, across rows) and whole bytes of packed codes; none but the
    only one has fewer than `MIN_MERGE_ROWS` rows.
    """
    unit = block // math.gcd(columns, block) if columns else 1
    # Equal parts of at least so many rows stay that long when each begins at a multiple of `unit`.
    least = -(MIN_MERGE_ROWS // -unit) * unit
    count = max(1, min(-(rows * columns // -most), rows // least))
    return (*(rows * number // count // unit * unit for number in range(count)), rows)

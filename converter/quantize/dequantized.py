"""A weight in 16 or 32 bits, read as what its 4-bit codes stand for: the base that QLoRA trains an adapter on.

https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from converter.merge.change import Rounding
from converter.quantize.cut import tile_bounds
from converter.quantize.format import Rows
from converter.quantize.four_bit import FourBit
from converter.read.header import DTYPE_BYTES
from converter.read.stored.bnb_4bit import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_MAP,
    STATE,
    FourBitState,
    FourBitWeight,
    OpenedFourBit,
    restored_absmax,
)
from converter.read.stored.stored import Parts, as_uint8, read_codes
from converter.tensors import torch_device, torch_dtype
from converter.threads import Buffers

if TYPE_CHECKING:
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader
    from converter.recipe import Recipe

_AT_A_TIME = 1 << 20
"""Weights that are read at a time to find the absmax of all."""
_STORED = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Dequantized(Parts):
    """A weight that is quantized and dequantized as it is read. Its part: the weight as it lies on disk."""

    codes: Recipe
    """Quant type, block size, double quant and dtype of the codes."""
    turned: bool = False
    """Whether it lies on disk as (in_features, out_features): a Conv1D, which bitsandbytes quantizes the other way
    round. It is read as a whole."""

    @classmethod
    def of(cls, header: TensorHeader, recipe: Recipe, *, turned: bool = False) -> Dequantized:
        """As QLoRA has it: NF4, in a recipe's block size and double quant."""
        codes = replace(
            recipe, quant_type="nf4", rounding="nearest", merge_precision="float32", merge_onto="base", combine=None
        )
        return cls(header.name, header.shape[::-1] if turned else header.shape, (header,), codes, turned)

    @property
    def scheme(self) -> str:
        return f"dequantized {self.codes.quant_type}"

    @property
    def dtype(self) -> str:
        return _STORED[self.codes.dtype]

    @property
    def block(self) -> int:
        return self.codes.block_size

    @property
    def blocks(self) -> int:
        return -(self.rows * self.columns // -self.block)

    @property
    def opened_bytes(self) -> int:
        # absmax in float32, once more while it is quantized, and what is read at a time.
        most = max(self.largest_tile, self.columns)
        return 10 * self.blocks + int(most * self.tile_bytes)

    @property
    def tile_bytes(self) -> float:
        stored = self.parts[0].dtype
        copied = DTYPE_BYTES[self.dtype] if self.turned else 0
        return DTYPE_BYTES[stored] + copied + FourBit(self.codes).tile_bytes(stored, kernels=True)

    @property
    def largest_tile(self) -> int:
        """The most weights that are quantized at a time to find the absmax of all."""
        return self.rows * self.columns if self.turned else _AT_A_TIME

    def open(self, folder: Folder) -> OpenedDequantized:
        """Reads the whole weight, for double quant needs the absmax of all its blocks."""
        return OpenedDequantized(self, folder)


class OpenedDequantized:
    """Rows as their codes give them, in the codes' dtype."""

    raw: Sequence[memoryview] = ()

    def __init__(self, weight: Dequantized, folder: Folder) -> None:
        self._weight, self._folder = weight, folder
        self._encoder = FourBit(weight.codes).encoder(torch_device("cpu"), kernels=True)
        self._encoder.load({weight.parts[0].dtype})
        self._restored = self._restore()

    def _restore(self) -> OpenedFourBit:
        """The same weight of 4-bit codes, with absmax as a loader restores it: (blocks,) in float32."""
        import torch

        weight, buffers, scales = self._weight, Buffers(pinned=False), []
        bounds = tile_bounds(weight.rows, weight.columns, block=weight.block, most=weight.largest_tile)
        for start, end in pairwise(bounds):
            _, found = self._encoded(start, end, self.read(start, end, buffers), buffers)
            scales.append(found)
        codes, offset = weight.codes, None
        if codes.double_quant:
            made = self._encoder.finish(weight.name, weight.shape, scales)
            parts = {name.removeprefix(weight.name): tensor for name, tensor in made.items()}
            offset = json.loads(bytes(parts[f"{STATE}{codes.quant_type}"].numpy()))["nested_offset"]
            absmax = restored_absmax(parts[ABSMAX], parts[NESTED_ABSMAX], parts[NESTED_MAP], offset)
        else:
            absmax = torch.cat(scales)
        state = FourBitState(codes.quant_type, codes.block_size, codes.dtype, weight.shape, offset)
        return OpenedFourBit(FourBitWeight(weight.name, weight.shape, weight.parts, state), self._folder, absmax, ())

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        part = self._weight.parts[0]
        row_bytes = part.nbytes // self._weight.rows
        return read_codes(part, self._folder, (start * row_bytes, end * row_bytes), buffers)

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """`bitsandbytes.functional.dequantize_4bit` of `quantize_4bit`, bit for bit."""
        packed, _ = self._encoded(start, end, raw, buffers)
        return self._restored.decode(start, end, memoryview(packed.flatten().numpy()), buffers)

    def _encoded(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> tuple[Tensor, Tensor]:
        """Codes and absmax of some rows, which are rounded to the codes' dtype first, as a loader does it."""
        weight = self._weight
        stored = as_uint8(raw).view(torch_dtype(weight.parts[0].dtype))
        if weight.turned:
            assert (start, end) == (0, weight.rows)  # noqa: S101  (its rows are not together on disk)
            stored = stored.view(weight.columns, -1).T
        stored = stored.reshape(end - start, weight.columns).to(torch_dtype(weight.dtype))
        rows = Rows(weight.name, start, stored, None, Rounding.of(weight.codes), weight.dtype)
        encoded = self._encoder.encode(rows, buffers)
        [(_, _, packed)] = encoded.pieces
        assert encoded.scales is not None  # noqa: S101  (4-bit codes have some)
        return packed, encoded.scales

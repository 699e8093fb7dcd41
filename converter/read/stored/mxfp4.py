"""Experts in MXFP4 as GPT-OSS has them (quant_method mxfp4): all of a layer's in one tensor, turned on disk.

`transformers.integrations.mxfp4.convert_moe_packed_tensors`
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint
from converter.read.stored.scaled import E2M1, power_of_two
from converter.read.stored.stored import LUT_BYTES, Parts, as_uint8, part_of, read_codes, read_whole
from converter.read.stored.unpack import in_groups, looked_up, unpacked
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from converter.read.checkpoint import Checkpoint
    from converter.read.folder import Folder
    from converter.threads import Buffers

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16
"""Of the 32 codes that share a scale."""
_TOGETHER = 32
"""Outputs that are turned at a time, at least: those of a row then fill what memory is written by."""
_NO_NUMBER = 255
"""The exponent that stands for no number."""


@dataclass(frozen=True)
class ExpertsWeight(Parts):
    """The matrices of all experts of a layer, (experts, in, out). Its parts: codes (experts, out, blocks, 16),
    exponents (experts, out, blocks)."""

    scheme: str = "mxfp4"

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def block(self) -> int:
        # On disk an expert's rows are columns, so it is read as a whole.
        return math.prod(self.shape[1:])

    @property
    def opened_bytes(self) -> int:
        return self.parts[1].nbytes

    @property
    def tile_bytes(self) -> float:
        return 0.5

    def open(self, folder: Folder) -> OpenedExperts:
        exponents, raw = read_whole(self.parts[1], folder)
        if bool((exponents == _NO_NUMBER).any()):
            raise BadCheckpoint(f"{self.parts[1].name}: holds a NaN")
        return OpenedExperts(self, folder, exponents, (raw,))


@dataclass(frozen=True)
class OpenedExperts:
    weight: ExpertsWeight
    folder: Folder
    exponents: Tensor
    """uint8 (experts, out, blocks)"""
    raw: Sequence[memoryview]

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        half_row = self.weight.shape[2] // 2
        return read_codes(self.weight.parts[0], self.folder, (start * half_row, end * half_row), buffers)

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """What a code stands for, times a power of two, rounded once."""
        import torch

        _, inputs, outputs = self.weight.shape
        assert start % inputs == end % inputs == 0  # noqa: S101  (tiles hold whole experts)
        codes = as_uint8(raw).view(-1, outputs, inputs // 2)
        decoded = buffers.take("decoded", torch_dtype(self.weight.dtype), end - start, outputs)
        values_of, step = torch.tensor(E2M1), max(_TOGETHER, LUT_BYTES // inputs)
        for number, expert in enumerate(codes):
            turned = decoded[number * inputs : (number + 1) * inputs].T
            exponents = self.exponents[start // inputs + number]
            for first in range(0, outputs, step):
                values = looked_up(unpacked(expert[first : first + step], 4, buffers), values_of, buffers)
                in_groups(values, torch.Tensor.mul_, power_of_two(exponents[first : first + step]), 2 * _BYTES)
                rounded = buffers.take("rounded", decoded.dtype, *values.shape).copy_(values)
                turned[first : first + step].copy_(rounded)
        return decoded


def expert_weights(base: Checkpoint, _: Mapping[str, Any]) -> dict[str, ExpertsWeight]:
    """The MXFP4 weights of a base, by name. `BadCheckpoint` where parts don't fit each other."""
    found: dict[str, ExpertsWeight] = {}
    for name, blocks in base.tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        weight = name.removesuffix(_BLOCKS)
        exponents = part_of(base, weight + _SCALES)
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != _BYTES or 0 in blocks.shape:
            raise BadCheckpoint(f"{name}: {blocks.dtype} {list(blocks.shape)}, expected U8 [experts, out, blocks, 16]")
        if exponents.dtype != "U8" or exponents.shape != blocks.shape[:3]:
            raise BadCheckpoint(
                f"{exponents.name}: {exponents.dtype} {list(exponents.shape)}, expected U8 {list(blocks.shape[:3])}"
            )
        experts, outputs, count, _size = blocks.shape
        found[weight] = ExpertsWeight(weight, (experts, count * 2 * _BYTES, outputs), (blocks, exponents))
    return found

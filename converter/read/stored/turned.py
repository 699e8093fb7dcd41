"""Weights whose rows are columns on disk, in whole numbers packed into I32: GPTQ and AWQ.

Rows of the weight don't lie together in the file, so all codes of a weight are in memory while it is open. Its values
are made tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.errors import BadCheckpoint
from converter.read.stored.stored import LUT_BYTES, Parts, read_whole
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.threads import Buffers

WORD = 32
"""Bits of a word that codes are packed into."""
_CACHE_LINE = 16
"""Words that lie together: as many columns of codes are decoded at a time, at least."""


@dataclass(frozen=True)
class TurnedWeight(Parts):
    """A weight (out_features, in_features) of codes, zero points and scales that lie the other way round.

    Its parts: codes, scales (groups, out_features), zero points (groups, words of out_features), and the group of each
    input if it is said.
    """

    scheme: str
    bits: int
    group: int
    """Inputs that share a scale, in turn, where a part doesn't say the group of each."""
    along_inputs: bool
    """Whether a word holds codes of inputs, in GPTQ's way; else of outputs, in AWQ's."""
    order: tuple[int, ...]
    """Where in a word each of its codes lies, counted from the lowest bits."""
    zero_offset: int = 0
    """What each zero point on disk is too low by, as GPTQ's first version has it."""
    block: int = 1

    @property
    def dtype(self) -> str:
        return self.parts[1].dtype

    @property
    def opened_bytes(self) -> int:
        groups, outputs = self.parts[1].shape
        return self.nbytes + 8 * groups * outputs + 8 * self.columns

    @property
    def tile_bytes(self) -> float:
        return 0.0  # the codes are there already

    def open(self, folder: Folder) -> OpenedTurned:
        import torch

        (scales, _), (packed, _), *rest = read = [read_whole(part, folder) for part in self.parts[1:]]
        codes, raw = read_whole(self.parts[0], folder)
        if not bool(scales.isfinite().all()):
            raise BadCheckpoint(f"{self.parts[1].name}: holds a NaN or an infinity")
        offset = sum(self.zero_offset << first for first in range(0, WORD, self.bits))
        # Added to whole words, with carries, as it was subtracted from them.
        zeros = _unpacked_across(packed + offset, self.bits, self.order)[:, : scales.shape[1]]
        groups = rest[0][0].long() if rest else torch.arange(self.columns) // self.group
        if rest and not bool(((groups >= 0) & (groups < len(scales))).all()):
            raise BadCheckpoint(f"{self.parts[3].name}: names a group that has no scale; there are {len(scales)}")
        read_bytes = (*(raw for _, raw in read), raw)
        return OpenedTurned(self, codes, scales.float(), zeros, groups, read_bytes)


@dataclass(frozen=True)
class OpenedTurned:
    """`codes` are packed; `scales` and `zeros` are float32 (groups, out_features); `groups` has one of each input."""

    weight: TurnedWeight
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    raw: Sequence[memoryview]

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        return memoryview(b"")  # all was read to open it

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """(code − zero) · scale in float32, rounded once.

        `gptqmodel.nn_modules.qlinear.PackableQuantLinear.dequantize_weight`, bit for bit: the difference is exact in
        the scales' dtype.
        """
        decoded = buffers.take("decoded", torch_dtype(self.weight.dtype), end - start, self.weight.columns)
        step = -(max(_CACHE_LINE, LUT_BYTES // self.weight.columns) // -_CACHE_LINE) * _CACHE_LINE
        for first in range(start, end, step):
            last = min(first + step, end)
            values = self._codes(first, last)
            values -= self.zeros[:, first:last].index_select(0, self.groups)
            values *= self.scales[:, first:last].index_select(0, self.groups)
            decoded[first - start : last - start].copy_(values.T)
        return decoded

    def _codes(self, start: int, end: int) -> Tensor:
        """Codes of some outputs: float32 (in_features, outputs)."""
        weight = self.weight
        if weight.along_inputs:
            return _unpacked_across(self.codes[:, start:end].T, weight.bits, weight.order)[:, : weight.columns].T
        in_word = WORD // weight.bits
        first = start // in_word
        unpacked = _unpacked_across(self.codes[:, first : -(end // -in_word)], weight.bits, weight.order)
        return unpacked[:, start - first * in_word : end - first * in_word]


def _unpacked_across(packed: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Codes of words: I32 (rows, words) → float32 (rows, codes)."""
    import torch

    shifts = torch.tensor([bits * place for place in order], dtype=torch.int32)
    return (packed[..., None] >> shifts).bitwise_and_((1 << bits) - 1).flatten(1).float()

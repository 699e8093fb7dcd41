"""Weights whose rows are columns on disk, in whole numbers packed into I32: GPTQ and AWQ.

Rows of the weight don't lie together in the file, so all codes of a weight are in memory while it is open. Its values
are made tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.errors import BadCheckpoint
from converter.read.stored.stored import LUT_BYTES, Parts, read_whole
from converter.read.stored.unpack import as_float32, in_groups, spread, unpacked
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
        zeros = _zeros(packed + offset, self.bits, self.order)[:, : scales.shape[1]]
        groups = rest[0][0].long() if rest else torch.arange(self.columns) // self.group
        if rest and not bool(((groups >= 0) & (groups < len(scales))).all()):
            raise BadCheckpoint(f"{self.parts[3].name}: names a group that has no scale; there are {len(scales)}")
        width = -(self.columns // -len(scales))
        if torch.equal(groups, torch.arange(self.columns) // width):
            groups = None
        scales, zeros = (part.float().T.contiguous() for part in (scales, zeros))
        return OpenedTurned(self, codes, scales, zeros, groups, (*(raw for _, raw in read), raw))


@dataclass(frozen=True)
class OpenedTurned:
    """`codes` are packed; `scales` and `zeros` are float32 (out_features, groups); `groups` has the group of
    each input, or is None where as many inputs in turn make each."""

    weight: TurnedWeight
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor | None
    raw: Sequence[memoryview]

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        return memoryview(b"")  # all was read to open it

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """(code − zero) · scale in float32, rounded once.

        `gptqmodel.nn_modules.qlinear.PackableQuantLinear.dequantize_weight`, bit for bit: the difference is exact in
        the scales' dtype.
        """
        import torch

        decoded = buffers.take("decoded", torch_dtype(self.weight.dtype), end - start, self.weight.columns)
        step = -(max(_CACHE_LINE, LUT_BYTES // self.weight.columns) // -_CACHE_LINE) * _CACHE_LINE
        for first in range(start, end, step):
            last = min(first + step, end)
            values = self._codes(first, last, buffers)
            self._apply(torch.Tensor.sub_, self.zeros[first:last], values, buffers)
            self._apply(torch.Tensor.mul_, self.scales[first:last], values, buffers)
            decoded[first - start : last - start].copy_(values)
        return decoded

    def _apply(
        self, how: Callable[[Tensor, Tensor], Tensor], by_group: Tensor, values: Tensor, buffers: Buffers
    ) -> None:
        """Change values (outputs, in_features) in place by what inputs of a group share."""
        if self.groups is None:
            in_groups(values, how, by_group, -(self.weight.columns // -by_group.shape[1]))
        else:
            how(values, spread(by_group, self.groups, buffers))

    def _codes(self, start: int, end: int, buffers: Buffers) -> Tensor:
        """Codes of some outputs: float32 (outputs, in_features)."""
        import torch

        weight, in_word = self.weight, WORD // self.weight.bits
        if weight.along_inputs:
            some = self.codes[:, start:end].T
            words = buffers.take("words", torch.int32, *some.shape).copy_(some)
            return as_float32(unpacked(words.view(torch.uint8), weight.bits, buffers)[:, : weight.columns], buffers)
        first = start // in_word
        some = self.codes[:, first : -(end // -in_word)].T
        words = buffers.take("words", torch.int32, *some.shape).copy_(some)
        shifted = buffers.take("shifted", torch.int32, *some.shape)
        values = buffers.take("values", torch.float32, len(words), in_word, weight.columns)
        for number, place in enumerate(weight.order):
            torch.bitwise_right_shift(words, weight.bits * place, out=shifted)
            values[:, number].copy_(shifted.bitwise_and_((1 << weight.bits) - 1))
        return values.flatten(0, 1)[start - first * in_word : end - first * in_word]


def _zeros(packed: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Zero points of words: I32 (groups, words) → float32 (groups, outputs)."""
    import torch

    shifts = torch.tensor([bits * place for place in order], dtype=torch.int32)
    return (packed[..., None] >> shifts).bitwise_and_((1 << bits) - 1).flatten(1).float()

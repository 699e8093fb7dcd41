"""Encoders that round with error feedback what has input directions to keep, and leave the rest to another encoder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from converter.errors import NotFinite
from converter.merge.change import Directed
from converter.quantize.cut import STRIP_ELEMENTS, tile_bounds
from converter.quantize.format import Encoded, Rows, Shape
from converter.quantize.measure import row_sums
from converter.quantize.rounding.feedback import Directions, Grid, directions_of, round_by_torch, whole_numbers
from converter.read.stored.codes import four_bit_map

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.quantize.format import Encoder
    from converter.recipe import Recipe
    from converter.threads import Buffers

_RESTORED = 1 << 15
"""Weights that are restored at a time."""


def with_rounding(nearest: Encoder, recipe: Recipe, device: torch.device, *, kernels: bool) -> Encoder:
    """The encoder that a recipe's rounding asks for, given the one that rounds to the nearest code."""
    if recipe.rounding != "adapter":
        return nearest
    by_kernels = kernels and device.type == "cpu"
    if recipe.four_bit:
        return FourBitFeedback(nearest, recipe, by_kernels=by_kernels)
    return EightBitFeedback(nearest, by_kernels=by_kernels)


class _Feedback:
    """What both have: rows are rounded strip by strip, and each strip's delta is still in the cache then."""

    block = 1

    def __init__(self, nearest: Encoder, *, by_kernels: bool) -> None:
        self._nearest = nearest
        self._by_kernels = by_kernels
        self._known: list[tuple[Tensor, Directions]] = []

    def load(self, dtypes: Collection[str]) -> None:
        self._nearest.load(dtypes)
        if self._by_kernels:
            from converter.quantize.rounding import feedback_kernels

            feedback_kernels.load()

    def finish(self, name: str, shape: Shape, scales: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return self._nearest.finish(name, shape, scales)

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        import numpy
        import torch

        merge: object = rows.merge
        if not isinstance(merge, Directed):
            return self._nearest.encode(rows, buffers)
        directions = self._directions(merge.inputs)
        count, columns = rows.stored.shape
        pieces, scales, sums = [], [], []
        for first, last in pairwise(tile_bounds(count, columns, block=self.block, most=STRIP_ELEMENTS)):
            strip = replace(rows, stored=rows.stored[first:last], start=rows.start + first)
            merged = strip.merged()
            target = merged.exact.contiguous()
            scale = self._scales(rows.name, target)
            codes = self._codes(target, scale, directions)
            scales.append(scale)
            pieces.append((rows.name, *self._piece(strip, codes)))
            sums += [
                row_sums(merged.rows(part), self._restored(codes, scale, part))
                for part in _few_rows(last - first, columns)
            ]
        return Encoded(tuple(pieces), torch.cat(scales), numpy.concatenate(sums))

    def _directions(self, a: Tensor) -> Directions:
        """Those of an adapter's A. They are made once for the tiles of a weight, or twice, if two threads begin."""
        for known, directions in self._known:
            if known is a:
                return directions
        made = directions_of(a)
        self._known = [*self._known[-3:], (a, made)]
        return made

    def _rounded(self, target: Tensor, scales: Tensor, block: int, grid: Grid, directions: Directions) -> Tensor:
        """Codes of a strip; `scales`: one for `block` consecutive weights, across rows."""
        import torch

        if self._by_kernels:
            from converter.quantize.rounding.feedback_kernels import round_rows

            return torch.from_numpy(round_rows(target.numpy(), scales.numpy(), block, grid, directions))
        spread = scales.repeat_interleave(block)[: target.numel()].view(target.shape)
        return round_by_torch(target, spread, grid, directions)

    def _scales(self, name: str, target: Tensor) -> Tensor:
        """What `finish` needs of a strip. Raises `NotFinite`."""
        raise NotImplementedError

    def _codes(self, target: Tensor, scales: Tensor, directions: Directions) -> Tensor:
        """Of a strip: int8, indices of grid values or whole numbers."""
        raise NotImplementedError

    def _restored(self, codes: Tensor, scales: Tensor, part: slice) -> Tensor:
        """What some rows of a strip stand for, in float32."""
        raise NotImplementedError

    def _piece(self, strip: Rows, codes: Tensor) -> tuple[int, Tensor]:
        """The byte of the output at which a strip begins, and its bytes."""
        raise NotImplementedError


class FourBitFeedback(_Feedback):
    """NF4 and FP4. The scale of a block is its largest absolute value after the merge, as without error feedback."""

    def __init__(self, nearest: Encoder, recipe: Recipe, *, by_kernels: bool) -> None:
        super().__init__(nearest, by_kernels=by_kernels)
        self.block = recipe.block_size
        self._quant_type = recipe.quant_type

    @cached_property
    def _table(self) -> tuple[Grid, Any]:
        """The grid, and the code of each of its values."""
        import numpy

        code = four_bit_map(self._quant_type).numpy()
        # The first of FP4's two zeros comes first, as in bitsandbytes.
        order = numpy.argsort(code, kind="stable")
        values = code[order]
        return Grid(values, (values[:-1] + values[1:]) / numpy.float32(2)), order.astype(numpy.uint8)

    def _scales(self, name: str, target: Tensor) -> Tensor:
        import torch

        flat = target.flatten()
        whole = flat.numel() // self.block * self.block
        scales = flat[:whole].view(-1, self.block).abs().amax(1)
        if whole < flat.numel():
            scales = torch.cat([scales, flat[whole:].abs().max()[None]])
        if not bool(scales.isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity")
        return scales

    def _codes(self, target: Tensor, scales: Tensor, directions: Directions) -> Tensor:
        return self._rounded(target, scales, self.block, self._table[0], directions)

    def _restored(self, codes: Tensor, scales: Tensor, part: slice) -> Tensor:
        import torch

        columns = codes.shape[1]
        values = torch.from_numpy(self._table[0].values).to(codes.device)[codes[part].int()]
        first, last = part.start * columns, part.stop * columns
        blocks = torch.arange(first, last, device=codes.device).div_(self.block, rounding_mode="floor")
        return values.mul_(scales[blocks].view(values.shape))

    def _piece(self, strip: Rows, codes: Tensor) -> tuple[int, Tensor]:
        import torch

        order = self._table[1]
        flat = torch.from_numpy(order).to(codes.device)[codes.flatten().int()]
        if flat.numel() % 2:
            zero = int((four_bit_map(self._quant_type) == 0).nonzero()[0])
            flat = torch.cat([flat, flat.new_full((1,), zero)])
        return strip.first // 2, flat[::2] << 4 | flat[1::2]


class EightBitFeedback(_Feedback):
    """LLM.int8. The scale of a row is its largest absolute value after the merge, in float16."""

    def _scales(self, name: str, target: Tensor) -> Tensor:
        import torch

        absmax = target.abs().amax(1).to(torch.float16).float()
        if not bool(absmax.isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for float16 (int8)")
        return absmax

    def _codes(self, target: Tensor, scales: Tensor, directions: Directions) -> Tensor:
        return self._rounded(target, scales / 127, target.shape[1], whole_numbers(127), directions)

    def _restored(self, codes: Tensor, scales: Tensor, part: slice) -> Tensor:
        return codes[part].float().mul_(scales[part, None] / 127)

    def _piece(self, strip: Rows, codes: Tensor) -> tuple[int, Tensor]:
        return strip.first, codes


def _few_rows(count: int, columns: int) -> Iterator[slice]:
    """Rows of a strip that are restored at a time: what is made of them on the way takes many bytes a weight."""
    step = max(1, _RESTORED // max(1, columns))
    yield from (slice(first, min(first + step, count)) for first in range(0, count, step))

"""Encoders that round with error feedback what has input directions to keep, and leave the rest to another encoder."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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

    from converter.merge.change import MergedTile
    from converter.quantize.format import Encoder
    from converter.recipe import Recipe
    from converter.threads import Buffers


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
        codes, scales, sums = [], [], []
        for first, last in pairwise(tile_bounds(count, columns, block=self.block, most=STRIP_ELEMENTS)):
            merged = replace(rows, stored=rows.stored[first:last], start=rows.start + first).merged()
            strip, scale, restored = self._round(rows.name, merged, directions)
            codes.append(strip)
            scales.append(scale)
            sums.append(row_sums(merged, restored))
        return Encoded((self._piece(rows, torch.cat(codes)),), torch.cat(scales), numpy.concatenate(sums))

    def _directions(self, a: Tensor) -> Directions:
        """Those of an adapter's A. They are made once for the tiles of a weight, or twice, if two threads begin."""
        for known, directions in self._known:
            if known is a:
                return directions
        made = directions_of(a)
        self._known = [*self._known[-3:], (a, made)]
        return made

    def _codes(self, target: Tensor, scales: Tensor, block: int, grid: Grid, directions: Directions) -> Tensor:
        """Codes of a strip; `scales`: one for `block` consecutive weights, across rows."""
        import torch

        if self._by_kernels:
            from converter.quantize.rounding.feedback_kernels import round_rows

            return torch.from_numpy(round_rows(target.numpy(), scales.numpy(), block, grid, directions))
        return round_by_torch(target, _spread(scales, block, target), grid, directions)

    def _round(self, name: str, merged: MergedTile, directions: Directions) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and what they stand for, of a strip."""
        raise NotImplementedError

    def _piece(self, rows: Rows, codes: Tensor) -> tuple[str, int, Tensor]:
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

    def _round(self, name: str, merged: MergedTile, directions: Directions) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        grid, order = self._table
        target = merged.exact.contiguous()
        flat = target.flatten()
        whole = flat.numel() // self.block * self.block
        scales = flat[:whole].view(-1, self.block).abs().amax(1)
        if whole < flat.numel():
            scales = torch.cat([scales, flat[whole:].abs().max()[None]])
        if not bool(scales.isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity")
        codes = self._codes(target, scales, self.block, grid, directions).int()
        restored = torch.from_numpy(grid.values).to(codes.device)[codes] * _spread(scales, self.block, target)
        return torch.from_numpy(order).to(codes.device)[codes], scales, restored

    def _piece(self, rows: Rows, codes: Tensor) -> tuple[str, int, Tensor]:
        import torch

        flat = codes.flatten()
        if flat.numel() % 2:
            zero = int((four_bit_map(self._quant_type) == 0).nonzero()[0])
            flat = torch.cat([flat, flat.new_full((1,), zero)])
        return rows.name, rows.first // 2, flat[::2] << 4 | flat[1::2]


class EightBitFeedback(_Feedback):
    """LLM.int8. The scale of a row is its largest absolute value after the merge, in float16."""

    def _round(self, name: str, merged: MergedTile, directions: Directions) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        target = merged.exact.contiguous()
        absmax = target.to(torch.float16).abs().amax(1).float()
        if not bool(absmax.isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for float16 (int8)")
        step = absmax / 127
        codes = self._codes(target, step, target.shape[1], whole_numbers(127), directions)
        return codes, absmax, codes.float() * step[:, None]

    def _piece(self, rows: Rows, codes: Tensor) -> tuple[str, int, Tensor]:
        return rows.name, rows.first, codes


def _spread(scales: Tensor, block: int, target: Tensor) -> Tensor:
    """The scale of each weight, of the shape of `target`."""
    return scales.repeat_interleave(block)[: math.prod(target.shape)].view(target.shape)

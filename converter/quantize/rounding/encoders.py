"""Encoders that round with error feedback what has inputs to keep, and leave the rest to another encoder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from converter.merge.change import Directed
from converter.quantize.cut import STRIP_ELEMENTS, tile_bounds
from converter.quantize.format import Encoded, Rows, Shape
from converter.quantize.measure import row_sums
from converter.quantize.rounding.codings import Coding, coding_of
from converter.quantize.rounding.descent import swept
from converter.quantize.rounding.feedback import Directions, directions_of, round_by_torch
from converter.quantize.rounding.gptq import Factors, Moments, factors_of, rounded, squared
from converter.quantize.rounding.weighted_scales import weighted_scales

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from converter.calibration import Calibration
    from converter.merge.change import MergedTile
    from converter.quantize.format import Encoder
    from converter.recipe import Recipe
    from converter.threads import Buffers

_RESTORED = 1 << 15
"""Weights that are restored at a time."""


def with_rounding(nearest: Encoder, recipe: Recipe, device: torch.device, *, kernels: bool) -> Encoder:
    """The encoder that a recipe's rounding asks for, given the one that rounds to the nearest code."""
    by_kernels = kernels and device.type == "cpu"
    if recipe.rounding == "adapter":
        nearest = Feedback(nearest, coding_of(recipe), by_kernels=by_kernels)
    if recipe.calibration is not None:
        return Calibrated(nearest, coding_of(recipe), recipe.calibration, by_kernels=by_kernels)
    return nearest


class Feedback:
    """Keeps the product with the adapter's input directions. Rows are rounded strip by strip, and each strip's delta is
    still in the cache then."""

    def __init__(self, nearest: Encoder, coding: Coding, *, by_kernels: bool) -> None:
        self._nearest, self._coding = nearest, coding
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
        coding, directions = self._coding, self._directions(merge.inputs)
        count, columns = rows.stored.shape
        block = coding.block(columns)
        pieces: list[tuple[str, int, Tensor]] = []
        scales: list[Tensor] = []
        sums: list[np.ndarray[Any, Any]] = []
        for first, last in pairwise(tile_bounds(count, columns, block=block, most=STRIP_ELEMENTS)):
            strip = replace(rows, stored=rows.stored[first:last], start=rows.start + first)
            merged = strip.merged()
            target = merged.exact.contiguous()
            scale = coding.scales(rows.name, target)
            steps = coding.steps(scale)
            codes = self._rounded(target, steps, block, directions)
            scales.append(scale)
            pieces += coding.pieces(strip, codes, scale)
            sums += _sums(merged, codes, steps, coding, block)
        return Encoded(tuple(pieces), torch.cat(scales), numpy.concatenate(sums))

    def _directions(self, a: Tensor) -> Directions:
        """Those of an adapter's A. They are made once for the tiles of a weight, or twice, if two threads begin."""
        for known, directions in self._known:
            if known is a:
                return directions
        made = directions_of(a)
        self._known = [*self._known[-3:], (a, made)]
        return made

    def _rounded(self, target: Tensor, steps: Tensor, block: int, directions: Directions) -> Tensor:
        """Codes of a strip; `steps`: one for `block` consecutive weights, across rows."""
        import torch

        if self._by_kernels:
            from converter.quantize.rounding.feedback_kernels import round_rows

            return torch.from_numpy(round_rows(target.numpy(), steps.numpy(), block, self._coding.grid, directions))
        return round_by_torch(target, _spread(steps, block, target.shape), self._coding.grid, directions)


class Calibrated:
    """Keeps the product with the inputs that a text gives, by GPTQ. A weight comes as a whole, for its scales are those
    that a loader restores."""

    def __init__(self, nearest: Encoder, coding: Coding, how: Calibration, *, by_kernels: bool) -> None:
        self._nearest, self._coding, self._how = nearest, coding, how
        self._by_kernels = by_kernels
        self._known: list[tuple[Moments, Factors]] = []

    def load(self, dtypes: Collection[str]) -> None:
        self._nearest.load(dtypes)
        if self._by_kernels:
            from converter.quantize.rounding import column_kernels

            column_kernels.load()

    def finish(self, name: str, shape: Shape, scales: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return self._nearest.finish(name, shape, scales)

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        import numpy

        if rows.moments is None:
            return self._nearest.encode(rows, buffers)
        coding, merged, second = self._coding, rows.merged(), rows.moments.second
        target = merged.values.float().contiguous()
        shape, block = tuple(target.shape), coding.block(target.shape[1])
        scales = coding.scales(rows.name, target)
        if self._how.scales == "inputs":
            scales = weighted_scales(coding, target, scales, second.diagonal())
        steps = coding.steps(coding.seen(rows.name, shape, scales, self._nearest))
        factors, spread = self._factors(rows.moments), _spread(steps, block, target.shape)
        codes = rounded(target, spread, coding.grid, factors, by_kernels=self._by_kernels)
        for _ in range(self._how.sweeps):
            codes = swept(codes, target, spread, coding.grid, second, factors.damping, by_kernels=self._by_kernels)
        sums = numpy.concatenate([*_sums(merged, codes, steps, coding, block)])
        missed = coding.grid.of(codes).mul_(spread).sub_(target)
        outputs = squared(missed, rows.moments), squared(target, rows.moments)
        return Encoded(coding.pieces(rows, codes, scales), scales, sums, outputs)

    def _factors(self, moments: Moments) -> Factors:
        """Those of second moments, which several weights share; made twice if two threads begin."""
        for known, factors in self._known:
            if known is moments:
                return factors
        made = factors_of(moments, self._how.damping)
        self._known = [(moments, made)]
        return made


def _spread(steps: Tensor, block: int, shape: torch.Size) -> Tensor:
    """The step of each weight."""
    return steps.repeat_interleave(block)[: shape[0] * shape[1]].view(shape)


def _sums(
    merged: MergedTile, codes: Tensor, steps: Tensor, coding: Coding, block: int
) -> Iterator[np.ndarray[Any, Any]]:
    """The sums of a strip, a few rows at a time: what is made of them on the way takes many bytes a weight."""
    import torch

    count, columns = codes.shape
    step = max(1, _RESTORED // max(1, columns))
    for first in range(0, count, step):
        last = min(first + step, count)
        blocks = torch.arange(first * columns, last * columns, device=codes.device)
        sizes = steps[blocks.div_(block, rounding_mode="floor")].view(-1, columns)
        yield row_sums(merged.rows(slice(first, last)), coding.grid.of(codes[first:last]).mul_(sizes))

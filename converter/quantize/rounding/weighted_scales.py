"""Scales of blocks for weights whose inputs are known: of each block, the scale that loses the least of the outputs.

A format's own scale lets the largest value of a block lie on the grid. A smaller one clips that value and is finer for
all others, which pays if the inputs of the largest are small. What is compared is the error of the nearest codes, each
square multiplied by the mean square of its input: the diagonal of the second moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.quantize.rounding.feedback import inverse_of

if TYPE_CHECKING:
    from torch import Tensor

    from converter.quantize.rounding.codings import Coding

FACTORS = tuple(hundredths / 100 for hundredths in range(104, 68, -2) if hundredths != 100)
"""1.04, 1.02, 0.98, …, 0.70: what the format's scale is multiplied by."""
KEPT = 0.99999
"""A scale replaces the best one so far if its error is smaller than this share of that one's. So float32's rounding of
sums never decides."""
_AT_ONCE = 1 << 18
"""Weights that are handled at a time. Intermediate values of so many stay in the processor's cache."""


def weighted_scales(coding: Coding, target: Tensor, scales: Tensor, squares: Tensor) -> Tensor:
    """The scales of a weight's blocks, given the format's own.

    `target` (rows, columns) is what is wanted; `scales` are as `Coding.scales` gives them; `squares` (columns,) are the
    mean squares of the inputs; all in float32. A block that isn't whole keeps its scale.
    """
    import torch

    columns, flat, block = target.shape[1], target.flatten(), coding.block(target.shape[1])
    found = scales.clone()
    whole = flat.numel() // block
    at_once = max(1, _AT_ONCE // block)
    for first in range(0, whole, at_once):
        last = min(first + at_once, whole)
        numbers = torch.arange(first * block, last * block, device=target.device)
        weights = squares[numbers.remainder_(columns)].view(-1, block)
        values, own = flat[first * block : last * block].view(-1, block), scales[first:last]
        best, least = own, _error(coding, values, own, weights)
        for factor in FACTORS:
            tried = coding.stored(own * factor)
            error = _error(coding, values, tried, weights)
            better = error < least * KEPT
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
        found[first:last] = best
    return found


def _error(coding: Coding, values: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    steps = coding.steps(scales)[:, None]
    nearest = coding.grid.nearest(values * inverse_of(steps))
    missed = coding.grid.of(nearest).mul_(steps).sub_(values)
    return missed.square_().mul_(weights).sum(1)

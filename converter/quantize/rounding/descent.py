"""Coordinate descent: after GPTQ has gone through the columns once, each code is chosen again, all others being known.

With D = W − Q, what a weight Q makes of its inputs misses tr(D H Dᵀ). In one column j this is a parabola, whose lowest
point is q_j + (D H)_j / H_jj: the code nearest to that is the best one. So no sweep makes the sum larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.quantize.rounding.feedback import inverse_of

if TYPE_CHECKING:
    from torch import Tensor

    from converter.quantize.rounding.feedback import Grid

_BLOCK = 128
"""Columns in a block. What a block's new codes change is passed on to the later columns at its end."""


def swept(codes: Tensor, target: Tensor, steps: Tensor, grid: Grid, second: Tensor, damping: float) -> Tensor:
    """Codes after one sweep over the columns, int8 (rows, columns): indices of grid values, or whole numbers.

    `codes` are those before. `target` (rows, columns) is what is wanted, `steps`, of the same shape, what each grid
    value is multiplied by, `second` (columns, columns) the second moments of the inputs, to whose diagonal `damping` is
    added; all in float32.
    """
    import torch

    codes = codes.clone()
    missed = grid.of(codes).mul_(steps).neg_().add_(target)
    rest = (missed @ second).add_(missed, alpha=damping)
    del missed
    diagonal, columns = second.diagonal() + damping, target.shape[1]
    scaling = inverse_of(steps)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        near, within = rest[:, first:last], second[first:last, first:last]
        moved = torch.empty(codes.shape[0], last - first, device=codes.device)
        for column in range(last - first):
            at = first + column
            value = grid.of(codes[:, at]) * steps[:, at]
            code = grid.nearest((value + near[:, column] / diagonal[at]) * scaling[:, at])
            codes[:, at] = code
            change = grid.of(code) * steps[:, at] - value
            moved[:, column] = change
            near[:, column + 1 :].addr_(change, within[column, column + 1 :], alpha=-1)
        if last < columns:
            rest[:, last:].addmm_(moved, second[first:last, last:], alpha=-1)
    return codes

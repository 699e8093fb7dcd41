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


def swept(
    codes: Tensor,
    target: Tensor,
    steps: Tensor,
    grid: Grid,
    second: Tensor,
    damping: float,
    *,
    by_kernels: bool = False,
) -> Tensor:
    """Codes after one sweep over the columns, int8 (rows, columns): indices of grid values, or whole numbers.

    `codes` are those before. `target` (rows, columns) is what is wanted, `steps`, of the same shape, what each grid
    value is multiplied by, `second` (columns, columns) the second moments of the inputs, to whose diagonal `damping` is
    added; all in float32. `by_kernels`: the same bits by compiled code, on a CPU.
    """
    choose = sweep_columns
    if by_kernels:
        from converter.quantize.rounding import column_kernels

        choose = column_kernels.sweep_columns
    codes = codes.clone()
    missed = grid.of(codes).mul_(steps).neg_().add_(target)
    rest = (missed @ second).add_(missed, alpha=damping)
    del missed
    diagonal, columns = second.diagonal() + damping, target.shape[1]
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        part = slice(first, last)
        block = rest[:, part], steps[:, part], codes[:, part], second[part, part], diagonal[part], grid
        codes[:, part], moved = choose(*block)
        if last < columns:
            rest[:, last:].addmm_(moved, second[first:last, last:], alpha=-1)
    return codes


def sweep_columns(
    near: Tensor, steps: Tensor, before: Tensor, within: Tensor, diagonal: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Codes of a block of columns, int8, and by how much their weights change; each (rows, columns). `near` is a block
    of D H, `within` that of H, `diagonal` its damped diagonal. `column_kernels` has the same, bit for bit."""
    import torch

    scaling = inverse_of(steps)
    codes, moved = torch.empty_like(before), torch.empty_like(near)
    for column in range(near.shape[1]):
        value = grid.of(before[:, column]) * steps[:, column]
        code = grid.nearest((value + near[:, column] / diagonal[column]) * scaling[:, column])
        codes[:, column] = code
        change = grid.of(code) * steps[:, column] - value
        moved[:, column] = change
        near[:, column + 1 :].addr_(change, within[column, column + 1 :], alpha=-1)
    return codes, moved

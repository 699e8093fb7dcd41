"""GPTQ: rounding that keeps a weight's product with the inputs that it really gets.

https://arxiv.org/abs/2210.17323. With H the second moments of the inputs and U the upper Cholesky factor of its
inverse, H⁻¹ = UᵀU, columns are rounded one after the other. What rounding column i misses, divided by U_ii and
multiplied by U_ij, is taken from each later column j, so that these make up for it. Scales are fixed before the first
column is rounded; the columns with the largest inputs come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.errors import ConversionFailed
from converter.quantize.rounding.feedback import inverse_of

if TYPE_CHECKING:
    from torch import Tensor

    from converter.quantize.rounding.feedback import Grid

_BLOCK = 128
"""Columns whose errors are carried on to the rest of the matrix at once."""
_TRIES = 5
"""Times that the damping is made ten times as large, where H can't be factored."""


@dataclass(frozen=True)
class Moments:
    """What the inputs of a module are like."""

    second: Tensor
    """The mean of x · xᵀ over the tokens: float32 (in_features, in_features), symmetric."""


@dataclass(frozen=True)
class Factors:
    """What rounding by columns takes of the second moments."""

    order: Tensor
    """The numbers of the columns, in the order in which they are rounded: int64 (in_features,)."""
    upper: Tensor
    """U in that order: float32 (in_features, in_features)."""
    damping: float
    """What was added to the diagonal of the second moments."""


def factors_of(moments: Moments, damping: float) -> Factors:
    """The factors; `damping` is added to the diagonal, in means of it. Computed in float32.

    `ConversionFailed` if the matrix can't be factored.
    """
    import torch

    second = moments.second
    diagonal = second.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.mean()) or 1.0
    for _ in range(_TRIES):
        damped = second[order][:, order]
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return Factors(order, upper, damping * mean)
        damping *= 10
    raise ConversionFailed("the second moments of a module's inputs can't be factored: give more tokens of text")


def squared(weight: Tensor, moments: Moments) -> float:
    """The mean over the tokens of ‖W x‖²: tr(W H Wᵀ). `weight` is float32 (rows, in_features)."""
    return float(((weight @ moments.second).double() * weight).sum())


def rounded(target: Tensor, steps: Tensor, grid: Grid, factors: Factors, *, by_kernels: bool = False) -> Tensor:
    """Codes of a weight, int8 (rows, columns): indices of grid values, or whole numbers.

    `target` (rows, columns) is what is wanted, `steps`, of the same shape, what each grid value is multiplied by;
    both in float32. Rows don't depend on each other. `by_kernels`: the same bits by compiled code, on a CPU.
    """
    import torch

    choose = round_columns
    if by_kernels:
        from converter.quantize.rounding import column_kernels

        choose = column_kernels.round_columns
    order, upper = factors.order, factors.upper
    aimed, steps = target[:, order], steps[:, order]
    codes = torch.empty(target.shape, dtype=torch.int8, device=target.device)
    columns = target.shape[1]
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        block = aimed[:, first:last], steps[:, first:last], upper[first:last, first:last], grid
        codes[:, first:last], missed = choose(*block)
        if last < columns:
            aimed[:, last:].addmm_(missed, upper[first:last, last:], alpha=-1)
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found


def round_columns(near: Tensor, steps: Tensor, within: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes of a block of columns, int8, and what each column missed, divided by U_ii; each (rows, columns). `near` is
    what is wanted, `within` the block of U. `column_kernels` has the same, bit for bit."""
    import torch

    scaling = inverse_of(steps)
    codes, missed = torch.empty(near.shape, dtype=torch.int8, device=near.device), torch.empty_like(near)
    for column in range(near.shape[1]):
        wanted = near[:, column]
        code = grid.nearest(wanted * scaling[:, column])
        codes[:, column] = code
        error = (wanted - grid.of(code) * steps[:, column]) / within[column, column]
        missed[:, column] = error
        near[:, column + 1 :].addr_(error, within[column, column + 1 :], alpha=-1)
    return codes, missed

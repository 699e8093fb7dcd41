"""Scales of integers that are searched: of each group, the one that gives the smallest squared error.

The library's scale puts the largest value of a group at the end of the grid. A smaller one clips that value, and is
finer for all others. Candidates are the library's scale times `FACTORS`, each rounded to the dtype of scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.quantize.schemes import Scheme

FACTORS = tuple(hundredths / 100 for hundredths in range(99, 79, -1))
"""0.99, 0.98, …, 0.80: what the library's scale is multiplied by."""
KEPT = 0.99999
"""A scale is taken if its error is smaller than this share of the best one's so far. So a tie goes to the larger scale,
and what float32 rounds away of a sum of at most 128 squares, about a millionth, never makes an error larger."""
LANES = 32
"""Sums of squares of a group, each over every thirty-second value, which are added in halves: one order for all
processors."""


def searched(values: Tensor, scales: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The scales of groups, given those of the library, `scales`, (rows, groups) in `dtype`. `values` are (rows,
    columns), in `dtype` or in float32."""
    import torch

    grouped = values.unflatten(1, (scales.shape[1], -1))
    found, least = scales, _squared_error(grouped, scales, scheme)
    for factor in FACTORS:
        tried = (scales.float() * factor).to(dtype)
        error = _squared_error(grouped, tried, scheme)
        better = error < least * KEPT
        found, least = torch.where(better, tried, found), torch.where(better, error, least)
    return found


def _squared_error(grouped: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Of each group, in float32."""
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    spread = scales[:, :, None]
    codes = (grouped / spread).clamp(low, high).round()
    missed = codes.float() * spread.float() - grouped.float()
    first, *others = (missed * missed).unflatten(2, (-1, LANES)).unbind(2)
    for squares in others:
        first = first + squares
    while first.shape[2] > 1:
        half = first.shape[2] // 2
        first = first[:, :, :half] + first[:, :, half:]
    return first[:, :, 0]

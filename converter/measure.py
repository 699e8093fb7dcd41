"""How far a converted tensor is from what it should be, and how much of the adapter survived in it.

With S the float32 sum of base W and delta Δ, and Q(S) what the output holds (before double quantization):

- relative error: ‖Q(S) − S‖ / ‖S‖
- survival: ⟨Q(S) − W, Δ⟩ / ⟨Δ, Δ⟩: 1 where the output moved as far along the delta as it should, 0 where rounding
  put every weight back to where the base alone would have been.

Sums are taken in float64, first along each row, then over the rows, so that they don't depend on tiles or threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from converter.merge import MergedTile

DIGITS = 6
"""Significant digits that are reported."""


@dataclass(frozen=True)
class Fidelity:
    """The figures of one tensor."""

    error: float
    """‖Q(S) − S‖ / ‖S‖; 0 for a tensor of zeros that stayed one."""
    survival: float | None
    """⟨Q(S) − W, Δ⟩ / ⟨Δ, Δ⟩; None where there is no delta, or a delta of zeros."""


class Tally:
    """The sums of one tensor, tile by tile."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, tile: MergedTile, restored: Tensor) -> None:
        """Count a tile; `restored` is Q(S) in float32, of the tile's shape (rows, columns)."""
        import torch

        miss = restored - tile.exact
        sums = [_row_sums(miss, miss), _row_sums(tile.exact, tile.exact)]
        if tile.delta is not None:
            moved = torch.sub(restored, tile.base, out=miss)
            sums += [_row_sums(moved, tile.delta), _row_sums(tile.delta, tile.delta)]
        self._rows.append(torch.stack(sums).cpu())

    def fidelity(self) -> Fidelity:
        """The figures; error 0 if nothing was counted, as for bytes that are copied."""
        import torch

        if not self._rows:
            return Fidelity(0.0, None)
        totals = [math.fsum(row) for row in torch.cat(self._rows, dim=1).tolist()]
        missed, whole = totals[:2]
        error = math.sqrt(missed / whole) if whole else (0.0 if missed == 0 else math.inf)
        survival = totals[2] / totals[3] if len(totals) == 4 and totals[3] else None
        return Fidelity(_rounded(error), None if survival is None else _rounded(survival))


def _row_sums(one: Tensor, other: Tensor) -> Tensor:
    import torch

    return torch.sum((one * other).reshape(one.shape[0], -1), dim=1, dtype=torch.float64)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

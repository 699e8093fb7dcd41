"""How far a converted tensor is from what it should be, and how much of the adapter survived in it.

With S the float32 sum of base W and delta Δ, and Q(S) what the output holds (before double quantization):

- relative error: ‖Q(S) − S‖ / ‖S‖
- survival: ⟨Q(S) − W, Δ⟩ / ⟨Δ, Δ⟩: 1 where the output moved as far along the delta as it should, 0 where rounding
  put every weight back to where the base alone would have been.
- output error: ‖X(Q(S) − S)ᵀ‖ / ‖XSᵀ‖, with X the inputs that a text gave a weight whose codes it chose.

Sums are taken in float64, first along each row, then over the rows, so that they don't depend on tiles or threads. The
CPU kernels take those of a block in float32, which may move the last digit that is reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from converter.merge.change import MergedTile

DIGITS = 6
"""Significant digits that are reported."""
_ELEMENTS = 1 << 15
"""That are measured at a time: few enough for the processor's cache, and for memory that is used again."""


@dataclass(frozen=True)
class Fidelity:
    """The figures of one tensor."""

    error: float
    """‖Q(S) − S‖ / ‖S‖; 0 for a tensor of zeros that stayed one."""
    survival: float | None
    """⟨Q(S) − W, Δ⟩ / ⟨Δ, Δ⟩; None where there is no delta, or a delta of zeros."""
    output_error: float | None = None
    """‖X(Q(S) − S)ᵀ‖ / ‖XSᵀ‖; None where no text chose the codes."""


def calibrated_in(figures: Mapping[str, Fidelity]) -> dict[str, float]:
    """The output errors of the tensors whose codes a text chose."""
    return {name: of.output_error for name, of in figures.items() if of.output_error is not None}


def figures_of(values: Mapping[str, float], worst: Callable[..., str]) -> dict[str, Any] | None:
    """Mean and worst of some tensors' figures, by name; `worst` is max or min. None without any."""
    if not values:
        return None
    tensor = worst(values, key=lambda name: values[name])
    return {"mean": statistics.fmean(values.values()), "worst": values[tensor], "worst_tensor": tensor}


class Tally:
    """The sums of one tensor, tile by tile."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray[Any, Any]] = []
        self._outputs: list[tuple[float, float]] = []

    def add(self, tile: MergedTile, restored: Tensor) -> None:
        """Count a tile; `restored` is Q(S) in float32, of the tile's shape (rows, columns)."""
        self.add_rows(row_sums(tile, restored))

    def add_rows(self, sums: np.ndarray[Any, Any]) -> None:
        """Count a tile by its `row_sums`."""
        self._rows.append(sums)

    def add_outputs(self, missed: float, whole: float) -> None:
        """Count ‖X(Q(S) − S)ᵀ‖² and ‖XSᵀ‖² of some rows."""
        self._outputs.append((missed, whole))

    def fidelity(self) -> Fidelity:
        """The figures; error 0 if nothing was counted, as for bytes that are copied."""
        import numpy

        if not self._rows:
            return Fidelity(0.0, None)
        totals = [float(total) for total in numpy.concatenate(self._rows).sum(axis=0)]
        error = _ratio(*totals[:2])
        survival = _rounded(totals[2] / totals[3]) if len(totals) == 4 and totals[3] else None
        of_outputs = _ratio(*map(sum, zip(*self._outputs, strict=True))) if self._outputs else None
        return Fidelity(error, survival, of_outputs)


def row_sums(tile: MergedTile, restored: Tensor) -> np.ndarray[Any, Any]:
    """Of each row: ‖Q(S) − S‖², ‖S‖² and, where there is a delta, ⟨Q(S) − W, Δ⟩, ⟨Δ, Δ⟩: (rows, 2 or 4), float64."""
    import torch

    rows = tile.exact.shape[0]
    at_a_time = max(1, _ELEMENTS * rows // max(tile.exact.numel(), 1))
    pieces = []
    for first in range(0, rows, at_a_time):
        part = slice(first, first + at_a_time)
        exact, found = _double(tile.exact[part]), _double(restored[part])
        sums = [_dot(found - exact, found - exact), _dot(exact, exact)]
        if tile.delta is not None:
            delta = _double(tile.delta[part])
            sums += [_dot(found - _double(tile.base[part]), delta), _dot(delta, delta)]
        pieces.append(torch.stack(sums, dim=1))
    result: np.ndarray[Any, Any] = torch.cat(pieces).cpu().numpy()
    return result


def _double(part: Tensor) -> Tensor:
    return part.reshape(part.shape[0], -1).double()


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=1)


def _ratio(missed: float, whole: float) -> float:
    """The ratio of two lengths, from their squares."""
    return _rounded(math.sqrt(missed / whole) if whole else (0.0 if missed == 0 else math.inf))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

"""The CPU kernels of `gptq` and `descent`: the same bits, sixty-four rows at a time.

Rows lie side by side in a vector, the columns of a block are taken one after the other. What a block changes is
carried on to the rest of the matrix by torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from converter.quantize.jit import LANES, choose, choose_whole_number, jitted
from converter.quantize.rounding.feedback import whole_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from converter.quantize.rounding.feedback import Grid

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def round_columns(near: Tensor, steps: Tensor, within: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """What `gptq.round_columns` gives."""
    import torch

    before = torch.empty((0, 0), dtype=torch.int8)
    return _made(near, steps, before, within, within.diagonal(), grid)


def sweep_columns(
    near: Tensor, steps: Tensor, before: Tensor, within: Tensor, diagonal: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """What `descent.sweep_columns` gives."""
    return _made(near, steps, before, within, diagonal, grid)


def _made(
    near: Tensor, steps: Tensor, before: Tensor, within: Tensor, divisors: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    import torch

    given: list[Any] = [one.contiguous().numpy() for one in (near, steps, before, within, divisors)]
    codes, carried = _columns(*given, grid)
    return torch.from_numpy(codes), torch.from_numpy(carried)


def load() -> None:
    """Compile the kernel, or load it from where it is kept."""
    import torch

    one = torch.ones(1, 1)
    round_columns(one, one, one, whole_numbers(1))


@jitted()
def _columns(near, steps, before, within, divisors, grid):  # type: ignore[no-untyped-def]
    """`before`: the codes that are chosen again; empty: none is chosen yet. `divisors`: (columns,)."""
    values, bounds, most, least = grid.values, grid.bounds, np.float32(grid.most), np.float32(grid.least)
    rows, columns = near.shape
    again = before.size > 0
    codes, carried = np.empty((rows, columns), np.int8), np.empty((rows, columns), np.float32)
    left = np.empty((columns, LANES), np.float32)
    sizes = np.empty((columns, LANES), np.float32)
    chosen = np.empty((columns, LANES), np.int32)
    value = np.empty(LANES, np.float32)
    aimed = np.empty(LANES, np.float32)
    moved = np.empty(LANES, np.float32)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        left[:], sizes[:] = _ZERO, _ONE
        value[:] = _ZERO
        for lane in range(count):
            for j in range(columns):
                left[j, lane] = near[first + lane, j]
                sizes[j, lane] = steps[first + lane, j]
        for j in range(columns):
            divisor = divisors[j]
            if again:
                for lane in range(count):
                    code = before[first + lane, j]
                    value[lane] = (np.float32(code) if most > _ZERO else values[code]) * sizes[j, lane]
                for lane in range(LANES):
                    aimed[lane] = value[lane] + left[j, lane] / divisor
            else:
                for lane in range(LANES):
                    aimed[lane] = left[j, lane]
            if most > _ZERO:
                choose_whole_number(aimed, sizes, j, least, most, chosen)
                for lane in range(LANES):
                    moved[lane] = np.float32(chosen[j, lane]) * sizes[j, lane]
            else:
                choose(aimed, sizes, j, bounds, chosen)
                for lane in range(LANES):
                    moved[lane] = values[chosen[j, lane]] * sizes[j, lane]
            if again:
                for lane in range(LANES):
                    moved[lane] -= value[lane]
            else:
                for lane in range(LANES):
                    moved[lane] = (aimed[lane] - moved[lane]) / divisor
            for later in range(j + 1, columns):
                weight = within[j, later]
                for lane in range(LANES):
                    left[later, lane] -= moved[lane] * weight
            for lane in range(count):
                codes[first + lane, j] = chosen[j, lane]
                carried[first + lane, j] = moved[lane]
    return codes, carried

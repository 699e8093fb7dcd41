"""The CPU kernel of `feedback`: the same bits, sixty-four rows at a time.

Rows lie side by side in a vector, columns are taken one after the other. So each row's sums are taken in one order,
whatever the processor.
"""

from __future__ import annotations

import numpy as np

from converter.quantize.jit import LANES, Array, choose, choose_whole_number, jitted
from converter.quantize.rounding.feedback import Directions, Grid, whole_numbers

_STEP = 64
"""Columns that are turned at a time, so that rows lie side by side."""
_ZERO = np.float32(0.0)


def round_rows(target: Array, scales: Array, block: int, grid: Grid, directions: Directions) -> Array:
    """Codes, int8 of the shape of `target`, (rows, columns) in float32: indices of grid values, or whole numbers.

    `scales`: float32, one for `block` consecutive weights, across rows.
    """
    codes = np.empty(target.shape, np.int8)
    _round(target, scales, block, grid, directions, codes)
    return codes


def load() -> None:
    """Compile the kernel, or load it from where it is kept."""
    one, order = np.ones((1, 1), np.float32), np.zeros(1, np.int64)
    round_rows(one, one[0], 1, whole_numbers(1), Directions(order, one, one))


@jitted()
def _round(target, scales, block, grid, directions, codes):  # type: ignore[no-untyped-def]
    values, bounds, most, least = grid.values, grid.bounds, np.float32(grid.most), np.float32(grid.least)
    order, inputs, gains = directions.order, directions.inputs, directions.gains
    rows, columns = target.shape
    carried = np.empty((inputs.shape[1], LANES), np.float32)
    wanted = np.empty((_STEP, LANES), np.float32)
    sizes = np.empty((_STEP, LANES), np.float32)
    chosen = np.empty((_STEP, LANES), np.int32)
    aimed = np.empty(LANES, np.float32)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        carried[:] = _ZERO
        wanted[:] = _ZERO
        sizes[:] = _ZERO
        for begin in range(0, columns, _STEP):
            width = min(_STEP, columns - begin)
            for j in range(width):
                column = order[begin + j]
                for lane in range(count):
                    wanted[j, lane] = target[first + lane, column]
                    sizes[j, lane] = scales[((first + lane) * columns + column) // block]
            for j in range(width):
                _aim(wanted, j, carried, gains, begin + j, aimed)
                if most > _ZERO:
                    choose_whole_number(aimed, sizes, j, least, most, chosen)
                    for lane in range(LANES):
                        aimed[lane] = wanted[j, lane] - np.float32(chosen[j, lane]) * sizes[j, lane]
                else:
                    choose(aimed, sizes, j, bounds, chosen)
                    for lane in range(LANES):
                        aimed[lane] = wanted[j, lane] - values[chosen[j, lane]] * sizes[j, lane]
                _carry(aimed, inputs, begin + j, carried)
            for j in range(width):
                column = order[begin + j]
                for lane in range(count):
                    codes[first + lane, column] = chosen[j, lane]


# Inlined, so that no array is passed, and counted, for each column.
@jitted(inline="always")
def _aim(wanted, j, carried, gains, column, aimed):  # type: ignore[no-untyped-def]
    """What is rounded: what is wanted, and what earlier columns missed."""
    for lane in range(LANES):
        aimed[lane] = wanted[j, lane]
    for k in range(gains.shape[1]):
        gain = gains[column, k]
        for lane in range(LANES):
            aimed[lane] += carried[k, lane] * gain


@jitted(inline="always")
def _carry(missed, inputs, column, carried):  # type: ignore[no-untyped-def]
    for k in range(inputs.shape[1]):
        direction = inputs[column, k]
        for lane in range(LANES):
            carried[k, lane] += missed[lane] * direction

"""The CPU kernels of `gptq` and `descent`: the same bits, sixty-four rows at a time.

Rows lie side by side in a vector, the columns of a block are taken one after the other. What a block changes is
carried on to the rest of the matrix by torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from converter.quantize.jit import LANES, Array, choose, choose_whole_number, jitted
from converter.quantize.rounding.feedback import Grid, whole_numbers

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class Block(NamedTuple):
    """Columns that are rounded one after the other; float32, in row-major order."""

    near: Array
    """(rows, columns)"""
    steps: Array
    """What each grid value is multiplied by, (rows, columns)."""
    within: Array
    """(columns, columns)"""
    grid: Grid


def round_columns(block: Block) -> tuple[Array, Array]:
    """What `gptq.round_columns` gives: codes, int8, and what is carried on, float32; each (rows, columns)."""
    return _made(block, np.empty((0, 0), np.int8), block.within.diagonal().copy())


def sweep_columns(block: Block, before: Array, diagonal: Array) -> tuple[Array, Array]:
    """What `descent.sweep_columns` gives: codes, int8, and what they changed, float32; each (rows, columns)."""
    return _made(block, before, diagonal)


def _made(block: Block, before: Array, divisors: Array) -> tuple[Array, Array]:
    codes, carried = np.empty(block.near.shape, np.int8), np.empty_like(block.near)
    _columns(block, before, divisors, codes, carried)
    return codes, carried


def load() -> None:
    """Compile the kernel, or load it from where it is kept."""
    one = np.ones((1, 1), np.float32)
    round_columns(Block(one, one, one, whole_numbers(1)))


@jitted()
def _columns(block, before, divisors, codes, carried):  # type: ignore[no-untyped-def]
    """`before`: the codes that are chosen again; empty: none is chosen yet. `divisors`: (columns,)."""
    near, steps, within, grid = block.near, block.steps, block.within, block.grid
    values, bounds, most, least = grid.values, grid.bounds, np.float32(grid.most), np.float32(grid.least)
    rows, columns = near.shape
    again = before.size > 0
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

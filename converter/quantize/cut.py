"""Where a matrix is cut into tiles, and a tile into strips."""

from __future__ import annotations

import math

MIN_MERGE_ROWS = 64
"""Rows of a product B·A that BLAS computes to the same bits as the whole product; short tiles were seen to differ."""
STRIP_ELEMENTS = 1 << 18
"""Weights of a tile whose delta the CPU kernels have at a time: one megabyte of it."""


def tile_bounds(rows: int, columns: int, *, block: int, most: int) -> tuple[int, ...]:
    """Row numbers that cut a matrix into tiles of about `most` elements: (0, …, rows).

    Tiles hold whole blocks (of `block` consecutive elements, across rows) and whole bytes of packed codes; none but the
    only one has fewer than `MIN_MERGE_ROWS` rows.
    """
    unit, least = _steps(columns, block)
    count = max(1, min(-(rows * columns // -most), rows // least))
    return (*(rows * number // count // unit * unit for number in range(count)), rows)


def longest_strip(columns: int, block: int) -> int:
    """The most weights that a strip of a tile has."""
    unit, least = _steps(columns, block)
    return max(STRIP_ELEMENTS, 2 * least * columns) + unit * columns


def _steps(columns: int, block: int) -> tuple[int, int]:
    """Of how many rows a part has a multiple, and of how many at least: equal parts of so many rows stay that long when
    each begins at a multiple of the first."""
    unit = block // math.gcd(columns, block) if columns else 1
    return unit, -(MIN_MERGE_ROWS // -unit) * unit

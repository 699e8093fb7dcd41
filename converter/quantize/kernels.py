"""The CPU kernels: rows of a weight plus delta → absmax, packed codes and the sums behind the figures, in one pass.

Equal to `bitsandbytes.functional.quantize_4bit` on a CPU, bit for bit; tests hold them so. Each call runs on one
thread and without Python's lock: the pipeline runs several.

All arithmetic is in the order in which PEFT and bitsandbytes do it. Each step goes over a group of blocks, small enough
for the processor's nearest caches: calls and counted references for each block would cost as much as some of the steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from converter.quantize.jit import (
    BFLOAT16,
    EXACT,
    FLOAT16,
    SUMS,
    Array,
    Source,
    jitted,
    merge_blocks,
    row_sums,
    select,
    tally_blocks,
)
from converter.read.stored.codes import four_bit_map

_GROUP = 2048
"""Weights that a step takes at a time, or one block, if that is more; no result depends on it."""
_SMALLEST = np.float32(1e-38)


class Code(NamedTuple):
    """The code of a type."""

    values: Array
    """float32 [16], ascending."""
    order: Array
    """uint8 [16]: the code of each value."""
    bounds: Array
    """float32 [15], between neighbouring values. A value on a bound goes to the lower side."""


@cache
def code_of(quant_type: str) -> Code:
    """The code of nf4 or fp4."""
    code = four_bit_map(quant_type).numpy()
    # torch.argsort's order of the two zeros of FP4: the first one comes first.
    order = np.argsort(code, kind="stable").astype(np.uint8)
    values = code[order]
    bounds = (values[:-1] + values[1:]) / np.float32(2)
    return Code(values, order, bounds)


def quantize_rows(
    source: Source,
    *,
    quant_type: str,
    block: int,
    packed: Array,
    absmax: Array,
    sums: Array,
) -> bool:
    """Merge and quantize some rows, which begin with a block; False if a value is NaN or infinite.

    Filled in: `packed` (uint8, half as many, rounded up), `absmax` (float32, one a block, the last of which may be
    short), `sums` (float64, (rows, SUMS)).
    """
    return bool(_quantize(source.in_bits(), code_of(quant_type), block, packed, absmax, sums))


def sums_of(exact: Array, restored: Array, base: Array, delta: Array) -> Array:
    """`measure.row_sums` of float32 arrays, (rows, columns) each, where delta is not zero: (rows, SUMS), float64."""
    sums = np.empty((exact.shape[0], SUMS))
    row_sums(exact, restored, base, delta, sums)
    return sums


def load(dtypes: Iterable[str]) -> None:
    """Compile what quantizes arrays of some dtypes, float32 or uint16, or load it from where it is kept."""
    one = np.ones((1, 1), np.float32)
    sums_of(one, one, one, one)
    for dtype in dtypes:
        size, small = np.ones(2, np.float32), np.empty(1, np.uint8)
        how: dict[str, Any] = {"quant_type": "nf4", "block": 64, "packed": small}
        quantize_rows(Source(size.astype(dtype), 2), **how, absmax=size[:1], sums=np.empty((1, SUMS)))


def compiled() -> tuple[int, int]:
    """How many forms of the kernel are there, and how many of them were compiled by an earlier process."""
    return len(_quantize.signatures), sum(_quantize.stats.cache_hits.values())


@jitted()
def _search(rounded, size, block, absmax, bounds, codes):  # type: ignore[no-untyped-def]
    """Codes: the number of bounds below the scaled value, by binary search in all values at a time."""
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14 = bounds
    for number in range(absmax.size):
        first, last = number * block, (number + 1) * block
        inverse = np.float32(1.0) / max(absmax[number], _SMALLEST)
        if last > size:
            # bitsandbytes divides in a last block that is short, and keeps its absmax from being zero.
            last, inverse = size, np.float32(1.0)
            absmax[number] = max(absmax[number], _SMALLEST)
            for j in range(first, last):
                rounded[j] /= absmax[number]
        for j in range(first, last):
            v = rounded[np.uintp(j)] * inverse
            eight = v > b7
            four = v > select(eight, b11, b3)
            two = v > select(four, select(eight, b13, b5), select(eight, b9, b1))
            low = select(four, select(eight, b12, b4), select(eight, b8, b0))
            high = select(four, select(eight, b14, b6), select(eight, b10, b2))
            one = v > select(two, high, low)
            codes[np.uintp(j)] = np.int32(eight) << 3 | np.int32(four) << 2 | np.int32(two) << 1 | np.int32(one)


@jitted()
def _pack(pairs, size, packed, begin):  # type: ignore[no-untyped-def]
    """Two codes of 32 bits, seen as one of 64, to a byte: the first one in its upper half."""
    for j in range((size + 1) // 2):
        packed[np.uintp(begin // 2 + j)] = np.uint8(pairs[j] << np.uint64(4) | pairs[j] >> np.uint64(32))


@jitted()
def _unpack(packed, begin, size, stands_for, pairs):  # type: ignore[no-untyped-def]
    """What the codes stand for, by byte: two values of 32 bits, seen as one of 64."""
    for j in range((size + 1) // 2):
        pairs[np.uintp(j)] = stands_for[packed[np.uintp(begin // 2 + j)]]


@jitted()
def _quantize(source, code, block, packed, absmax, sums):  # type: ignore[no-untyped-def]
    values, order, bounds, rounding, total = code.values, code.order, code.bounds, source.rounding, source.stored.size
    identity = (order == np.arange(16)).all()
    group = max(block, _GROUP)
    rounded = np.empty(group, np.float32)
    codes = np.empty(group, np.int32)
    restored = np.empty(group, np.float32)
    halves = np.empty((256, 2), np.float32)
    for byte in range(256):
        halves[byte, 0], halves[byte, 1] = values[byte >> 4], values[byte & 15]
    stands_for = halves.reshape(512).view(np.uint64)
    finite = True
    sums[:] = 0.0
    for begin in range(0, total, group):
        size = min(group, total - begin)
        scales = absmax[begin // block : (begin + size + block - 1) // block]
        if rounding == EXACT:
            finite &= merge_blocks(source, EXACT, begin, size, block, rounded, scales)
        elif rounding == BFLOAT16:
            finite &= merge_blocks(source, BFLOAT16, begin, size, block, rounded, scales)
        else:
            finite &= merge_blocks(source, FLOAT16, begin, size, block, rounded, scales)
        _search(rounded, size, block, scales, bounds, codes)
        if size % 2:
            codes[size] = (bounds < np.float32(0.0)).sum()  # the code of zero
        _pack(codes.view(np.uint64), size, packed, begin)
        _unpack(packed, begin, size, stands_for, restored.view(np.uint64))
        tally_blocks(source, begin, size, block, restored, scales, sums)
    if not identity:
        for j in range(packed.size):
            packed[j] = order[packed[j] >> 4] << 4 | order[packed[j] & 15]
    return finite

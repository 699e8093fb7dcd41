"""The CPU kernels of compressed-tensors' schemes: rows of a weight plus delta → codes, scales and sums, in one pass.

Equal to `formulas.quantize`, bit for bit; tests hold them so. Rounding to whole numbers, to E4M3 and to E2M1 is done by
adding a number so large that only what is wanted of the other is left, or in the bits of its fraction: both vectorize.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from converter.quantize.jit import (
    BFLOAT16,
    EXACT,
    FLOAT16,
    INTEGER_BITS,
    SIZE,
    STEP,
    SUMS,
    TO_INTEGER,
    Array,
    Source,
    bits_of,
    jitted,
    merge_blocks,
    round_float,
    select,
    tally_blocks,
    value_of,
)
from converter.quantize.scale_search_kernels import search_scales
from converter.quantize.schemes import Scheme

_INT4, _INT8, _NVFP4, _MXFP4 = 0, 1, 2, 3
_RUN = 128
"""Weights of a row in E4M3 whose sums are taken together."""
_ZERO, _ONE = np.uint32(0), np.uint32(1)
_TO_E4M3, _E4M3_BITS = np.float32(16384.0), np.uint32(0x46800000)
"""2¹⁴, whose neighbours are 2⁻⁹ away: as far as those of E4M3's smallest numbers."""
_TO_E2M1, _E2M1_BITS = np.float32(4194304.0), np.uint32(0x4A800000)
"""2²², whose neighbours are ½ away."""


class Groups(NamedTuple):
    """How the groups of a row are quantized, as the compiled functions take it."""

    group: int
    """Weights that share a scale."""
    kind: int
    """_INT4, _INT8, _NVFP4 or _MXFP4."""
    searches: bool
    """Whether a better scale than the library's is looked for."""
    dtype: int
    """That of scales."""
    global_scale: np.float32


def quantize_rows(
    source: Source, scheme: Scheme, dtype: int, global_scale: float, packed: Array, scales: Array, sums: Array
) -> float:
    """Merge and quantize some rows, which hold whole blocks. The largest absolute value; infinity if one is NaN.

    The steps of the computation are rounded as base and sum are. `dtype` is that of scales where the scheme names no
    other: BFLOAT16 or FLOAT16. `global_scale`: of a scheme that has one. Filled in: `packed` (uint8, the bytes of what
    is stored), `scales` (float32, as `formulas` makes them), `sums` (float64, (rows, SUMS)).
    """
    if scheme.layout == "float-quantized":
        height, width = scheme.extent(source.columns)
        return float(_quantize_runs(source.in_bits(), height, width < source.columns, dtype, packed, scales, sums))
    kinds = {("int", 4): _INT4, ("int", 8): _INT8, ("float", 4): _NVFP4 if scheme.has_global_scale else _MXFP4}
    kind = kinds[scheme.kind, scheme.bits]
    assert scheme.group is not None  # noqa: S101  (only runs have none)
    groups = Groups(scheme.group, kind, scheme.searches, dtype, np.float32(global_scale))
    return float(_quantize_groups(source.in_bits(), groups, packed, scales, sums))


def load(scheme: Scheme, dtypes: Iterable[str]) -> None:
    """Compile what quantizes arrays of some dtypes, float32 or uint16, or load it from where it is kept."""
    for dtype in dtypes:
        quantize_rows(
            Source(np.zeros(128, dtype), 128),
            scheme,
            BFLOAT16,
            1.0,
            np.empty(128, np.uint8),
            np.empty(8, np.float32),
            np.empty((1, SUMS)),
        )


def compiled() -> int:
    """How many forms of the kernels there are."""
    return len(_quantize_groups.signatures) + len(_quantize_runs.signatures)


@jitted(inline="always")
def _to_e4m3(value):  # type: ignore[no-untyped-def]
    """The code of a float32 in E4M3 without its sign, and its size; at most 448."""
    size = min(np.uint32(bits_of(value) & SIZE), np.uint32(0x43E00000))
    few = np.float32(value_of(size) + _TO_E4M3)
    even = np.uint32(size >> np.uint32(20)) & _ONE
    many = np.uint32((size + np.uint32(0x7FFFF) + even) & np.uint32(0xFFF00000))
    is_small = size < np.uint32(0x3C800000)  # 2⁻⁶
    code = select(is_small, np.uint32(bits_of(few) - _E4M3_BITS), np.uint32((many >> np.uint32(20)) - np.uint32(960)))
    return code, select(is_small, np.float32(few - _TO_E4M3), value_of(many))


@jitted(inline="always")
def _to_e2m1(value):  # type: ignore[no-untyped-def]
    """The code of a float32 in E2M1 without its sign, and its size; at most 6."""
    size = min(np.uint32(bits_of(value) & SIZE), np.uint32(0x40C00000))
    few = np.float32(value_of(size) + _TO_E2M1)
    even = np.uint32(size >> np.uint32(22)) & _ONE
    many = np.uint32((size + np.uint32(0x1FFFFF) + even) & np.uint32(0xFFC00000))
    is_small = size < np.uint32(0x3F800000)  # 1
    code = select(is_small, np.uint32(bits_of(few) - _E2M1_BITS), np.uint32((many >> np.uint32(22)) - np.uint32(252)))
    return code, select(is_small, np.float32(few - _TO_E2M1), value_of(many))


@jitted()
def _or_epsilon(scale, dtype):  # type: ignore[no-untyped-def]
    if scale != np.float32(0.0):
        return scale
    return np.float32(0.0078125) if dtype == BFLOAT16 else np.float32(0.0009765625)


@jitted()
def _power_of_two(largest, rounding):  # type: ignore[no-untyped-def]
    """`formulas._power_of_two`"""
    tiny = np.uint32(0x38800000 if rounding == FLOAT16 else 0x00800000)
    exponent = np.uint32((max(bits_of(largest), tiny) + np.uint32(0x200000)) >> np.uint32(23))
    if exponent <= np.uint32(2) or largest < np.float32(0.75) * value_of(tiny):
        return np.float32(1.0) if rounding == FLOAT16 else value_of(np.uint32(0x00400000))
    return value_of(np.uint32((exponent - np.uint32(2)) << np.uint32(23)))


@jitted()
def _scale(largest, kind, rounding, dtype, global_scale, scales, divisors):  # type: ignore[no-untyped-def]
    """Of each group: its scale as it is stored, and what its values are divided by."""
    for number in range(largest.size):
        if kind == _MXFP4:
            scales[number] = _power_of_two(largest[number], rounding)
            divisors[number] = scales[number]
        elif kind == _NVFP4:
            scaled = global_scale * round_float(largest[number] / np.float32(6.0), rounding)
            _, scale = _to_e4m3(scaled)
            scales[number] = np.float32(0.125) if scale == np.float32(0.0) else scale
            divisors[number] = scales[number] / global_scale
        else:
            top = np.float32(7.5) if kind == _INT4 else np.float32(127.5)
            scales[number] = _or_epsilon(round_float(largest[number] / top, dtype), dtype)
            divisors[number] = scales[number]


@jitted(inline="always")
def _to_integers(values, divisors, group, half, rounding, codes, restored):  # type: ignore[no-untyped-def]
    low, high, first = np.float32(-half), np.float32(half - 1), np.uint32(INTEGER_BITS - np.uint32(half))
    for number in range(divisors.size):
        divisor, start = divisors[number], number * group
        for i in range(group):
            j = start + i
            value = round_float(values[np.uintp(j)] / divisor, rounding)
            value = select(value < low, low, select(value > high, high, value))
            shifted = np.float32(value + TO_INTEGER)
            codes[np.uintp(j)] = np.uint32(bits_of(shifted) - first)
            restored[np.uintp(j)] = np.float32(shifted - TO_INTEGER) * divisor


@jitted(inline="always")
def _to_floats(values, divisors, group, rounding, codes, restored):  # type: ignore[no-untyped-def]
    for number in range(divisors.size):
        divisor, start = divisors[number], number * group
        for i in range(group):
            j = start + i
            value = round_float(values[np.uintp(j)] / divisor, rounding)
            code, size = _to_e2m1(value)
            sign = select(value == np.float32(0.0), _ZERO, np.uint32(bits_of(value) & np.uint32(0x80000000)))
            codes[np.uintp(j)] = np.uint32(code | (sign >> np.uint32(28)))
            restored[np.uintp(j)] = value_of(np.uint32(bits_of(size) | sign)) * divisor


@jitted()
def _encode(values, divisors, group, kind, rounding, codes, restored):  # type: ignore[no-untyped-def]
    if kind == _NVFP4 or (kind == _MXFP4 and rounding != FLOAT16):
        # A scale in float32 rounds nothing; nor does a power of two, but for what is too small for float16.
        if group == 16:  # a number that the compiler knows: short loops are vectorized only then
            _to_floats(values, divisors, 16, EXACT, codes, restored)
        else:
            _to_floats(values, divisors, 32, EXACT, codes, restored)
    elif kind == _MXFP4:
        _to_floats(values, divisors, 32, FLOAT16, codes, restored)
    else:
        half = 8 if kind == _INT4 else 128
        if rounding == EXACT:
            _to_integers(values, divisors, group, half, EXACT, codes, restored)
        elif rounding == BFLOAT16:
            _to_integers(values, divisors, group, half, BFLOAT16, codes, restored)
        else:
            _to_integers(values, divisors, group, half, FLOAT16, codes, restored)


@jitted()
def _pack_pairs(pairs, packed):  # type: ignore[no-untyped-def]
    """Two codes of 32 bits, seen as one of 64, to a byte: the first one in its lower half."""
    for j in range(packed.size):
        packed[np.uintp(j)] = np.uint8(pairs[np.uintp(j)] | pairs[np.uintp(j)] >> np.uint64(28))


@jitted()
def _pack_bytes(codes, packed):  # type: ignore[no-untyped-def]
    for j in range(packed.size):
        packed[np.uintp(j)] = np.uint8(codes[np.uintp(j)])


@jitted(inline="always")
def _largest_of(values, group, largest):  # type: ignore[no-untyped-def]
    for number in range(largest.size):
        most, start = _ZERO, number * group
        for i in range(group):
            most = max(most, np.uint32(bits_of(values[np.uintp(start + i)]) & SIZE))
        largest[number] = value_of(most)


@jitted()
def _find_largest(values, group, largest):  # type: ignore[no-untyped-def]
    """The largest absolute value of each group."""
    if group == 16:  # a number that the compiler knows: short loops are vectorized only then
        _largest_of(values, 16, largest)
    else:
        _largest_of(values, group, largest)


@jitted(inline="always")
def _merge(source, begin, size, block, values, largest):  # type: ignore[no-untyped-def]
    rounding = source.rounding
    if rounding == EXACT:
        return merge_blocks(source, EXACT, begin, size, block, values, largest)
    if rounding == BFLOAT16:
        return merge_blocks(source, BFLOAT16, begin, size, block, values, largest)
    return merge_blocks(source, FLOAT16, begin, size, block, values, largest)


@jitted()
def _quantize_groups(source, groups, packed, scales, sums):  # type: ignore[no-untyped-def]
    columns, rounding, total = source.columns, source.rounding, source.stored.size
    group, kind, searches, dtype, global_scale = groups
    values, restored = np.empty(STEP, np.float32), np.empty(STEP, np.float32)
    codes = np.empty(STEP, np.uint32)
    largest, divisors = np.empty(STEP // group, np.float32), np.empty(STEP // group, np.float32)
    most, ones = np.empty(1, np.float32), np.ones(STEP // group, np.float32)
    together = _RUN  # whose sums are taken together: they don't go from row to row
    while columns % together:
        together //= 2
    finite, top = True, np.float32(0.0)
    sums[:] = 0.0
    for begin in range(0, total, STEP):
        size = min(STEP, total - begin)
        count = size // group
        here, by = scales[begin // group : begin // group + count], divisors[:count]
        finite &= _merge(source, begin, size, STEP, values, most)
        top = max(top, most[0])
        _find_largest(values, group, largest[:count])
        _scale(largest[:count], kind, rounding, dtype, global_scale, here, by)
        if searches:
            search_scales(values, group, 8 if kind == _INT4 else 128, rounding, dtype, here)
            by[:] = here
        _encode(values, by, group, kind, rounding, codes, restored)
        if kind == _INT8:
            _pack_bytes(codes, packed[begin : begin + size])
        else:
            _pack_pairs(codes.view(np.uint64), packed[begin // 2 : (begin + size) // 2])
        tally_blocks(source, begin, size, together, restored, ones[: size // together], sums)
    return top if finite else np.float32(np.inf)


@jitted(inline="always")
def _to_runs(values, divisors, rounding, packed, restored):  # type: ignore[no-untyped-def]
    """A row in E4M3; `divisors`: the scale of each run of it."""
    for number in range(divisors.size):
        divisor = divisors[number]
        for j in range(number * _RUN, min((number + 1) * _RUN, packed.size)):
            value = round_float(values[np.uintp(j)] / divisor, rounding)
            code, size = _to_e4m3(value)
            sign = np.uint32(bits_of(value) & np.uint32(0x80000000))
            packed[np.uintp(j)] = np.uint8(code | (sign >> np.uint32(24)))
            restored[np.uintp(j)] = value_of(np.uint32(bits_of(size) | sign))


@jitted()
def _encode_row(values, divisors, rounding, packed, restored):  # type: ignore[no-untyped-def]
    if rounding == EXACT:
        _to_runs(values, divisors, EXACT, packed, restored)
    elif rounding == BFLOAT16:
        _to_runs(values, divisors, BFLOAT16, packed, restored)
    else:
        _to_runs(values, divisors, FLOAT16, packed, restored)


@jitted()
def _quantize_runs(source, height, by_run, dtype, packed, scales, sums):  # type: ignore[no-untyped-def]
    """Rows in E4M3. `height` rows share scales, `by_run`: one for each run of them, else one for all."""
    columns, rounding = source.columns, source.rounding
    runs = (columns + _RUN - 1) // _RUN
    values, restored = np.empty(columns, np.float32), np.empty(columns, np.float32)
    largest, most, divisors = np.empty(runs, np.float32), np.empty(runs, np.float32), np.empty(runs, np.float32)
    each = runs if by_run else 1
    rows = source.stored.size // columns
    finite, top = True, np.float32(0.0)
    sums[:] = 0.0
    for first in range(0, rows, height):
        last = min(first + height, rows)
        most[:] = np.float32(0.0)
        for row in range(first, last):
            begin = row * columns
            finite &= _merge(source, begin, columns, _RUN, values, largest)
            for number in range(runs):
                at = number if by_run else 0
                most[at] = max(most[at], largest[number])
                top = max(top, largest[number])
        here = scales[first // height * each : (first // height + 1) * each]
        for number in range(each):
            here[number] = _or_epsilon(round_float(most[number] / np.float32(448.0), dtype), dtype)
        for number in range(runs):
            divisors[number] = here[number if by_run else 0]
        for row in range(first, last):
            begin = row * columns
            if height > 1:  # merging again is cheaper than keeping all rows
                _merge(source, begin, columns, _RUN, values, largest)
            _encode_row(values, divisors, rounding, packed[begin : begin + columns], restored)
            tally_blocks(source, begin, columns, _RUN, restored, divisors, sums)
    return top if finite else np.float32(np.inf)

"""What the CPU kernels of all formats share: how they are compiled, how rows are merged, how their sums are taken.

Each call runs on one thread and without Python's lock. All arithmetic is in float32 and never contracted: the loops are
written so that the compiler vectorizes them without being allowed to reorder a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.core import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]

EXACT, BFLOAT16, FLOAT16 = 0, 1, 2
"""What base and sum are rounded to before they are quantized: nothing, or a 16-bit type."""
UNCHANGED, ADDED, REPLACED = 0, 1, 2
"""What a change does to stored values: nothing; it is scaled and added; it is the merged values."""
SUMS = 4
"""Sums of a row: ‖Q(S) − S‖², ‖S‖², ⟨Q(S) − W, Δ⟩, ⟨Δ, Δ⟩."""
STEP = 2048
"""Weights that a step takes at a time, in the kernels that work by steps; no result depends on it."""
SIZE = np.uint32(0x7FFFFFFF)
"""All bits of a float32 but its sign."""
TO_INTEGER, INTEGER_BITS = np.float32(12582912.0), np.uint32(0x4B400000)
"""1.5 · 2²³, whose neighbours in float32 are 1 away, and its bits."""

LANES = 64
"""Rows that are rounded side by side, where what one column misses is made up for by later ones."""
_ONE, _ZERO, _SMALLEST = np.float32(1.0), np.float32(0.0), np.float32(1e-38)
_INFINITY = np.uint32(0x7F800000)
_intrinsic: Any = intrinsic
_function_cache: Any = FunctionCache
_FEW, _MANY = np.float32(1e-30), np.float32(1e30)
"""Between these, sums of squares in float32 lose nothing to its range."""


class Source(NamedTuple):
    """Rows of a weight as the kernels take them."""

    stored: Array
    """rows · columns values: float32, or bfloat16 as uint16."""
    columns: int
    rounding: int = EXACT
    """What base and merged values are rounded to: EXACT, BFLOAT16 or FLOAT16."""
    change: Array | None = None
    """As many values in float32: a product that is not yet scaled, or what the merge made."""
    scaling: float = 1.0
    how: int = UNCHANGED
    """What becomes of the change: ADDED or REPLACED; UNCHANGED: there is none."""

    def in_bits(self) -> Bits:
        """As the compiled functions take them."""
        stored = self.stored if self.stored.dtype == np.uint16 else self.stored.view(np.uint32)
        change = np.empty(0, np.float32) if self.change is None else self.change
        return Bits(stored, change, self.how, np.float32(self.scaling), self.columns, self.rounding)


class Bits(NamedTuple):
    """A `Source` whose fields have the same type each time, so that one form of a function takes all of them.

    A compiled function takes what it needs of it before its loops: there, each array that is taken would be counted.
    """

    stored: Array
    """Bits of float32 as uint32, or of bfloat16 as uint16."""
    change: Array
    """float32; empty if there is none."""
    how: int
    scaling: np.float32
    columns: int
    rounding: int


class _Kept(_function_cache):  # type: ignore[misc]
    """Compiled code, kept for other processes. Where its folder can't be used, the code is compiled again: numba itself
    would fail on a full disk, or on a file that is empty.

    Numba compiles a function again when its own file changes. This file's code is part of other files' functions, so a
    change here counts for all."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        ours = Path(__file__).stat()
        self._cache_file._source_stamp = (self._cache_file._source_stamp, ours.st_mtime, ours.st_size)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(Exception):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)


def jitted(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's decorator, with a cache if there is a folder for one. An installation may be read-only, and its user may
    have no home."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
        with suppress(RuntimeError, OSError):
            dispatcher._cache = _Kept(function)
        return dispatcher

    return compiled


@_intrinsic
def select(_typing, condition, one, other):  # type: ignore[no-untyped-def]
    """`one if condition else other` as one instruction: the branches that Python's form becomes aren't vectorized."""
    return one(condition, one, other), lambda _context, builder, _signature, operands: builder.select(*operands)


@_intrinsic
def bits_of(_typing, value):  # type: ignore[no-untyped-def]
    """The bits of a float32."""

    def generate(context, builder, _signature, operands):  # type: ignore[no-untyped-def]
        return builder.bitcast(operands[0], context.get_value_type(types.uint32))

    return types.uint32(value), generate


@_intrinsic
def value_of(_typing, bits):  # type: ignore[no-untyped-def]
    """The float32 that has these 32 bits; of 16 bits, the value of the bfloat16 that has them."""

    def generate(context, builder, _signature, operands):  # type: ignore[no-untyped-def]
        (found,) = operands
        if bits == types.uint16:
            wide = context.get_value_type(types.uint32)
            found = builder.shl(builder.zext(found, wide), wide(16))
        return builder.bitcast(found, context.get_value_type(types.float32))

    return types.float32(bits), generate


@jitted()
def round_float(value, rounding):  # type: ignore[no-untyped-def]
    """Round a float32 to the nearest bfloat16 or float16; ties to even."""
    # Without the casts numba computes with 64 bits, and a vector holds half as many values.
    u = bits_of(value)
    if rounding == BFLOAT16:
        even = (u >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32((u + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000))
        # The sum would carry some NaNs over to zero.
        return value_of(select(np.uint32(u & np.uint32(0x7FFFFFFF)) > _INFINITY, u, rounded))
    if rounding == FLOAT16:
        sign, size = np.uint32(u & np.uint32(0x80000000)), np.uint32(u & np.uint32(0x7FFFFFFF))
        # Below 2⁻¹⁴ float16 has steps of 2⁻²⁴, which are those of float32 around 0.75.
        small = bits_of(np.float32(value_of(size) + np.float32(0.75)) - np.float32(0.75))
        even = (size >> np.uint32(13)) & np.uint32(1)
        large = np.uint32((size + np.uint32(0xFFF) + even) & np.uint32(0xFFFFE000))
        large = select(large > np.uint32(0x477FE000), _INFINITY, large)
        return value_of(np.uint32(sign | select(size < np.uint32(0x38800000), small, large)))
    return value


# Inlined, so that each rounding gets loops of its own.
@jitted(inline="always")
def merge_blocks(source, rounding, begin, size, block, rounded, largest):  # type: ignore[no-untyped-def]
    """What is quantized of `size` values from `begin` on, and the largest of each block. `rounding` is the source's, as
    a number that the compiler knows."""
    stored, change, how, scaling = source.stored, source.change, source.how, source.scaling
    finite = True
    for number in range(largest.size):
        most = np.uint32(0)
        for j in range(number * block, min((number + 1) * block, size)):
            if how == REPLACED:
                value = round_float(change[np.uintp(begin + j)], rounding)
            else:
                value = round_float(value_of(stored[np.uintp(begin + j)]), rounding)
            if how == ADDED:
                value = round_float(value + change[np.uintp(begin + j)] * scaling, rounding)
            rounded[np.uintp(j)] = value
            # Without their sign, floats are ordered as their bits are; NaN and infinity come last.
            most = max(most, np.uint32(bits_of(value) & np.uint32(0x7FFFFFFF)))
        if most >= _INFINITY:
            finite = False
        largest[number] = value_of(most)
    return finite


# Sums alone may be reordered, so that they vectorize: their order then depends on their length, and nothing else.
@jitted(fastmath={"reassoc"})
def _tally_widely(source, begin, first, last, restored, scale, sums):  # type: ignore[no-untyped-def]
    """Add a block to the sums of its rows, of which it may lie in several, in float64."""
    stored, change, how, scaling, columns = source.stored, source.change, source.how, source.scaling, source.columns
    while first < last:
        row = (begin + first) // columns
        end = min(last, (row + 1) * columns - begin)
        missed, whole, along, shift = 0.0, 0.0, 0.0, 0.0
        for j in range(first, end):
            weight, moved = value_of(stored[np.uintp(begin + j)]), np.float32(0)
            merged = weight
            if how == ADDED:
                moved = change[np.uintp(begin + j)] * scaling
                merged = weight + moved
            elif how == REPLACED:
                merged = change[np.uintp(begin + j)]
                moved = merged - weight
            s, q = np.float64(merged), np.float64(restored[np.uintp(j)] * scale)
            w, d = np.float64(weight), np.float64(moved)
            missed += (q - s) * (q - s)
            whole += s * s
            along += (q - w) * d
            shift += d * d
        sums[row, 0] += missed
        sums[row, 1] += whole
        sums[row, 2] += along
        sums[row, 3] += shift
        first = end


@jitted(fastmath={"reassoc"})
def tally_blocks(source, begin, size, block, restored, absmax, sums):  # type: ignore[no-untyped-def]
    """The same, in float32 within a block, wherever that will do."""
    stored, change, how, scaling, columns = source.stored, source.change, source.how, source.scaling, source.columns
    for number in range(absmax.size):
        first, last, scale = number * block, min((number + 1) * block, size), absmax[number]
        row = (begin + first) // columns
        missed, whole, along, shift = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        if begin + last > (row + 1) * columns:
            last = first  # nothing here, all of it below
        if how == ADDED:
            for j in range(first, last):
                w, d = value_of(stored[np.uintp(begin + j)]), change[np.uintp(begin + j)] * scaling
                s, q = w + d, restored[np.uintp(j)] * scale
                missed += (q - s) * (q - s)
                whole += s * s
                along += (q - w) * d
                shift += d * d
        elif how == REPLACED:
            for j in range(first, last):
                w, s = value_of(stored[np.uintp(begin + j)]), change[np.uintp(begin + j)]
                d, q = s - w, restored[np.uintp(j)] * scale
                missed += (q - s) * (q - s)
                whole += s * s
                along += (q - w) * d
                shift += d * d
        else:
            for j in range(first, last):
                s, q = value_of(stored[np.uintp(begin + j)]), restored[np.uintp(j)] * scale
                missed += (q - s) * (q - s)
                whole += s * s
            shift = whole
        if min(missed, whole, shift) > _FEW and max(missed, whole, shift) < _MANY:
            sums[row, 0] += missed
            sums[row, 1] += whole
            if how != UNCHANGED:
                sums[row, 2] += along
                sums[row, 3] += shift
        else:
            last = min((number + 1) * block, size)
            _tally_widely(source, begin, first, last, restored, scale, sums)


@jitted(fastmath={"reassoc"})
def tally_row(source, begin, size, restored, sums):  # type: ignore[no-untyped-def]
    """Add a part of one row to its sums, in float64."""
    stored, change, how, scaling = source.stored, source.change, source.how, source.scaling
    missed, whole, along, shift = 0.0, 0.0, 0.0, 0.0
    if how == REPLACED:
        for j in range(size):
            weight, merged = value_of(stored[np.uintp(begin + j)]), change[np.uintp(begin + j)]
            s, q = np.float64(merged), np.float64(restored[np.uintp(j)])
            w, d = np.float64(weight), np.float64(merged - weight)
            missed += (q - s) * (q - s)
            whole += s * s
            along += (q - w) * d
            shift += d * d
    elif how == ADDED:
        for j in range(size):
            weight, moved = value_of(stored[np.uintp(begin + j)]), change[np.uintp(begin + j)] * scaling
            s, q = np.float64(weight + moved), np.float64(restored[np.uintp(j)])
            w, d = np.float64(weight), np.float64(moved)
            missed += (q - s) * (q - s)
            whole += s * s
            along += (q - w) * d
            shift += d * d
    else:
        for j in range(size):
            s, q = np.float64(value_of(stored[np.uintp(begin + j)])), np.float64(restored[np.uintp(j)])
            missed += (q - s) * (q - s)
            whole += s * s
    sums[0] += missed
    sums[1] += whole
    sums[2] += along
    sums[3] += shift


@jitted(fastmath={"reassoc"})
def row_sums(exact, restored, base, delta, sums):  # type: ignore[no-untyped-def]
    """The sums of rows whose merge is no sum, as `measure.row_sums` takes them: float32 (rows, columns) each; `sums` is
    (rows, SUMS) in float64."""
    for row in range(exact.shape[0]):
        missed, whole, along, shift = 0.0, 0.0, 0.0, 0.0
        for j in range(exact.shape[1]):
            s, q = np.float64(exact[row, j]), np.float64(restored[row, j])
            w, d = np.float64(base[row, j]), np.float64(delta[row, j])
            missed += (q - s) * (q - s)
            whole += s * s
            along += (q - w) * d
            shift += d * d
        sums[row, 0], sums[row, 1], sums[row, 2], sums[row, 3] = missed, whole, along, shift


@jitted(inline="always")
def choose(aimed, sizes, j, bounds, chosen):  # type: ignore[no-untyped-def]
    """The number of bounds below each scaled value, by binary search in all lanes at a time."""
    for lane in range(LANES):
        scale = sizes[j, lane]
        v = select(scale > _ZERO, aimed[lane] * (_ONE / max(scale, _SMALLEST)), _ZERO)
        eight = v > bounds[7]
        four = v > select(eight, bounds[11], bounds[3])
        two = v > select(four, select(eight, bounds[13], bounds[5]), select(eight, bounds[9], bounds[1]))
        low = select(four, select(eight, bounds[12], bounds[4]), select(eight, bounds[8], bounds[0]))
        high = select(four, select(eight, bounds[14], bounds[6]), select(eight, bounds[10], bounds[2]))
        one = v > select(two, high, low)
        chosen[j, lane] = np.int32(eight) << 3 | np.int32(four) << 2 | np.int32(two) << 1 | np.int32(one)


@jitted(inline="always")
def choose_whole_number(aimed, sizes, j, least, most, chosen):  # type: ignore[no-untyped-def]
    """The whole number nearest to each scaled value; ties go to the even one."""
    for lane in range(LANES):
        scale = sizes[j, lane]
        v = select(scale > _ZERO, aimed[lane] * (_ONE / max(scale, _SMALLEST)), _ZERO)
        chosen[j, lane] = np.int32(min(max(np.rint(v), least), most))

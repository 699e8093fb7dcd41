"""The CPU kernels: rows of a weight plus delta → absmax, packed codes and the sums behind the figures, in one pass.

Equal to `bitsandbytes.functional.quantize_4bit` on a CPU, bit for bit; tests hold them so. Each call runs on one
thread and without Python's lock: the pipeline runs several.

All arithmetic is in float32, in the order in which PEFT and bitsandbytes do it, and never contracted: the loops are
written so that the compiler vectorizes them without being allowed to reorder a sum. Each step goes over a group of
blocks, small enough for the processor's nearest caches: calls and counted references for each block would cost as much
as some of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numba.core import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from converter.quantize.bnb import four_bit_map

Array = np.ndarray[Any, Any]

EXACT, BFLOAT16, FLOAT16 = 0, 1, 2
"""What base and sum are rounded to before they are quantized: nothing, or a 16-bit type."""
SUMS = 4
"""Sums of a row: ‖Q(S) − S‖², ‖S‖², ⟨Q(S) − W, Δ⟩, ⟨Δ, Δ⟩."""

_GROUP = 2048
"""Weights that a step takes at a time, or one block, if that is more; no result depends on it."""
_SMALLEST = np.float32(1e-38)
_INFINITY = np.uint32(0x7F800000)
_intrinsic: Any = intrinsic
_function_cache: Any = FunctionCache
_FEW, _MANY = np.float32(1e-30), np.float32(1e30)
"""Between these, sums of squares in float32 lose nothing to its range."""


class _Kept(_function_cache):  # type: ignore[misc]
    """Compiled code, kept for other processes. Where its folder can't be used, the code is compiled again: numba itself
    would fail on a full disk, or on a file that is empty."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(Exception):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's decorator, with a cache if there is a folder for one. An installation may be read-only, and its user may
    have no home."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
        with suppress(RuntimeError, OSError):
            dispatcher._cache = _Kept(function)
        return dispatcher

    return compiled


@cache
def tables(quant_type: str) -> tuple[Array, Array, Array]:
    """The code of a type: (values, order, bounds) = (16 values ascending, their codes, 15 bounds between them).

    A value on a bound goes to the lower side.
    """
    code = four_bit_map(quant_type).numpy()
    # torch.argsort's order of the two zeros of FP4: the first one comes first.
    order = np.argsort(code, kind="stable").astype(np.uint8)
    values = code[order]
    bounds = (values[:-1] + values[1:]) / np.float32(2)
    return values, order, bounds


def quantize_rows(
    base: Array,
    delta: Array | None,
    scaling: float,
    columns: int,
    *,
    quant_type: str,
    block: int,
    rounding: int,
    packed: Array,
    absmax: Array,
    sums: Array,
) -> bool:
    """Merge and quantize some rows, which begin with a block; False if a value is NaN or infinite.

    `base` holds rows · columns values: float32, or bfloat16 as uint16. `delta` is B · A in float32, of the same
    number, not yet scaled; None: no delta. Filled in: `packed` (uint8, half as many, rounded up), `absmax` (float32,
    one a block, the last of which may be short), `sums` (float64, (rows, SUMS)).
    """
    stored = base if base.dtype == np.uint16 else base.view(np.uint32)
    values, order, bounds = tables(quant_type)
    identity = bool((order == np.arange(16)).all())
    none = np.empty(0, np.float32)
    return bool(
        _quantize(
            stored,
            none if delta is None else delta,
            delta is not None,
            np.float32(scaling),
            columns,
            values,
            order,
            bounds,
            identity,
            block,
            rounding,
            packed,
            absmax,
            sums,
        )
    )


def load(dtypes: Iterable[str]) -> None:
    """Compile what quantizes arrays of some dtypes, float32 or uint16, or load it from where it is kept."""
    for dtype in dtypes:
        size, small = np.ones(2, np.float32), np.empty(1, np.uint8)
        how: dict[str, Any] = {"quant_type": "nf4", "block": 64, "rounding": EXACT, "packed": small}
        quantize_rows(size.astype(dtype), None, 1.0, 2, **how, absmax=size[:1], sums=np.empty((1, SUMS)))


def compiled() -> tuple[int, int]:
    """How many forms of the kernel are there, and how many of them were compiled by an earlier process."""
    return len(_quantize.signatures), sum(_quantize.stats.cache_hits.values())


@_intrinsic
def _select(_typing, condition, one, other):  # type: ignore[no-untyped-def]
    """`one if condition else other` as one instruction: the branches that Python's form becomes aren't vectorized."""
    return one(condition, one, other), lambda _context, builder, _signature, operands: builder.select(*operands)


@_intrinsic
def _bits(_typing, value):  # type: ignore[no-untyped-def]
    """The bits of a float32."""

    def generate(context, builder, _signature, operands):  # type: ignore[no-untyped-def]
        return builder.bitcast(operands[0], context.get_value_type(types.uint32))

    return types.uint32(value), generate


@_intrinsic
def _value(_typing, bits):  # type: ignore[no-untyped-def]
    """The float32 of 32 bits, or of the 16 bits of a bfloat16, which are its upper half."""

    def generate(context, builder, _signature, operands):  # type: ignore[no-untyped-def]
        (found,) = operands
        if bits == types.uint16:
            wide = context.get_value_type(types.uint32)
            found = builder.shl(builder.zext(found, wide), wide(16))
        return builder.bitcast(found, context.get_value_type(types.float32))

    return types.float32(bits), generate


@_compiled()
def _round(value, rounding):  # type: ignore[no-untyped-def]
    """Round a float32 to the nearest bfloat16 or float16; ties to even."""
    # Without the casts numba computes with 64 bits, and a vector holds half as many values.
    u = _bits(value)
    if rounding == BFLOAT16:
        even = (u >> np.uint32(16)) & np.uint32(1)
        return _value(np.uint32((u + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)))
    if rounding == FLOAT16:
        sign, size = np.uint32(u & np.uint32(0x80000000)), np.uint32(u & np.uint32(0x7FFFFFFF))
        # Below 2⁻¹⁴ float16 has steps of 2⁻²⁴, which are those of float32 around 0.75.
        small = _bits(np.float32(_value(size) + np.float32(0.75)) - np.float32(0.75))
        even = (size >> np.uint32(13)) & np.uint32(1)
        large = np.uint32((size + np.uint32(0xFFF) + even) & np.uint32(0xFFFFE000))
        large = _select(large > np.uint32(0x477FE000), _INFINITY, large)
        return _value(np.uint32(sign | _select(size < np.uint32(0x38800000), small, large)))
    return value


# Inlined, so that each rounding gets loops of its own.
@_compiled(inline="always")
def _merge(  # type: ignore[no-untyped-def]
    stored, delta, merged, scaling, rounding, begin, size, block, rounded, largest
):
    """What is quantized of `size` values from `begin` on, and the largest of each block."""
    finite = True
    for number in range(largest.size):
        most = np.uint32(0)
        for j in range(number * block, min((number + 1) * block, size)):
            value = _round(_value(stored[np.uintp(begin + j)]), rounding)
            if merged:
                value = _round(value + delta[np.uintp(begin + j)] * scaling, rounding)
            rounded[np.uintp(j)] = value
            # Without their sign, floats are ordered as their bits are; NaN and infinity come last.
            most = max(most, np.uint32(_bits(value) & np.uint32(0x7FFFFFFF)))
        if most >= _INFINITY:
            finite = False
        largest[number] = _value(most)
    return finite


@_compiled()
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
            four = v > _select(eight, b11, b3)
            two = v > _select(four, _select(eight, b13, b5), _select(eight, b9, b1))
            low = _select(four, _select(eight, b12, b4), _select(eight, b8, b0))
            high = _select(four, _select(eight, b14, b6), _select(eight, b10, b2))
            one = v > _select(two, high, low)
            codes[np.uintp(j)] = np.int32(eight) << 3 | np.int32(four) << 2 | np.int32(two) << 1 | np.int32(one)


@_compiled()
def _pack(pairs, size, packed, begin):  # type: ignore[no-untyped-def]
    """Two codes of 32 bits, seen as one of 64, to a byte: the first one in its upper half."""
    for j in range((size + 1) // 2):
        packed[np.uintp(begin // 2 + j)] = np.uint8(pairs[j] << np.uint64(4) | pairs[j] >> np.uint64(32))


@_compiled()
def _unpack(packed, begin, size, stands_for, pairs):  # type: ignore[no-untyped-def]
    """What the codes stand for, by byte: two values of 32 bits, seen as one of 64."""
    for j in range((size + 1) // 2):
        pairs[np.uintp(j)] = stands_for[packed[np.uintp(begin // 2 + j)]]


# Sums alone may be reordered, so that they vectorize: their order then depends on their length, and nothing else.
@_compiled(fastmath={"reassoc"})
def _tally_widely(  # type: ignore[no-untyped-def]
    stored, delta, merged, scaling, columns, begin, first, last, restored, scale, sums
):
    """Add a block to the sums of its rows, of which it may lie in several, in float64."""
    while first < last:
        row = (begin + first) // columns
        end = min(last, (row + 1) * columns - begin)
        missed, whole, along, shift = 0.0, 0.0, 0.0, 0.0
        for j in range(first, end):
            weight, moved = _value(stored[np.uintp(begin + j)]), np.float32(0)
            if merged:
                moved = delta[np.uintp(begin + j)] * scaling
            s, q = np.float64(weight + moved), np.float64(restored[np.uintp(j)] * scale)
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


@_compiled(fastmath={"reassoc"})
def _tally(  # type: ignore[no-untyped-def]
    stored, delta, merged, scaling, columns, begin, size, block, restored, absmax, sums
):
    """The same, in float32 within a block, wherever that will do."""
    for number in range(absmax.size):
        first, last, scale = number * block, min((number + 1) * block, size), absmax[number]
        row = (begin + first) // columns
        missed, whole, along, shift = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        if begin + last > (row + 1) * columns:
            last = first  # nothing here, all of it below
        if merged:
            for j in range(first, last):
                w, d = _value(stored[np.uintp(begin + j)]), delta[np.uintp(begin + j)] * scaling
                s, q = w + d, restored[np.uintp(j)] * scale
                missed += (q - s) * (q - s)
                whole += s * s
                along += (q - w) * d
                shift += d * d
        else:
            for j in range(first, last):
                s, q = _value(stored[np.uintp(begin + j)]), restored[np.uintp(j)] * scale
                missed += (q - s) * (q - s)
                whole += s * s
            shift = whole
        if min(missed, whole, shift) > _FEW and max(missed, whole, shift) < _MANY:
            sums[row, 0] += missed
            sums[row, 1] += whole
            if merged:
                sums[row, 2] += along
                sums[row, 3] += shift
        else:
            last = min((number + 1) * block, size)
            _tally_widely(stored, delta, merged, scaling, columns, begin, first, last, restored, scale, sums)


@_compiled()
def _quantize(  # type: ignore[no-untyped-def]
    stored,
    delta,
    merged,
    scaling,
    columns,
    values,
    order,
    bounds,
    identity,
    block,
    rounding,
    packed,
    absmax,
    sums,
):
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
    for begin in range(0, stored.size, group):
        size = min(group, stored.size - begin)
        scales = absmax[begin // block : (begin + size + block - 1) // block]
        if rounding == EXACT:
            finite &= _merge(stored, delta, merged, scaling, EXACT, begin, size, block, rounded, scales)
        elif rounding == BFLOAT16:
            finite &= _merge(stored, delta, merged, scaling, BFLOAT16, begin, size, block, rounded, scales)
        else:
            finite &= _merge(stored, delta, merged, scaling, FLOAT16, begin, size, block, rounded, scales)
        _search(rounded, size, block, scales, bounds, codes)
        if size % 2:
            codes[size] = (bounds < np.float32(0.0)).sum()  # the code of zero
        _pack(codes.view(np.uint64), size, packed, begin)
        _unpack(packed, begin, size, stands_for, restored.view(np.uint64))
        _tally(stored, delta, merged, scaling, columns, begin, size, block, restored, scales, sums)
    if not identity:
        for j in range(packed.size):
            packed[j] = order[packed[j] >> 4] << 4 | order[packed[j] & 15]
    return finite

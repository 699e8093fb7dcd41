"""The CPU kernels: rows of a weight plus delta → absmax, packed codes and the sums behind the figures, in one pass.

Equal to `bitsandbytes.functional.quantize_4bit` on a CPU, bit for bit; tests hold them so. Each call runs on one
thread and without Python's lock: the pipeline runs several.

All arithmetic is in float32, in the order in which PEFT and bitsandbytes do it, and never contracted: the loops are
written so that the compiler vectorizes them without being allowed to reorder a sum.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from converter.quantize import four_bit_map

Array = np.ndarray[Any, Any]

EXACT, BFLOAT16, FLOAT16 = 0, 1, 2
"""What base and sum are rounded to before they are quantized: nothing, or a 16-bit type."""
SUMS = 4
"""Sums of a row: ‖Q(S) − S‖², ‖S‖², ⟨Q(S) − W, Δ⟩, ⟨Δ, Δ⟩."""

_SMALLEST = np.float32(1e-38)
_INFINITY = np.uint32(0x7F800000)


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
    # bfloat16 is the upper half of float32.
    stored, shift = (base, 16) if base.dtype == np.uint16 else (base.view(np.uint32), 0)
    values, order, bounds = tables(quant_type)
    identity = bool((order == np.arange(16)).all())
    none = np.empty(0, np.float32)
    return bool(
        _quantize(
            stored,
            np.uint32(shift),
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


def all_finite(bits: Array, exponent: int) -> bool:
    """Whether no value is NaN or infinite: their bits, and those of the exponent, all of which NaN and infinity set."""
    return not _some_have(bits, bits.dtype.type(exponent))


@njit(nogil=True, cache=True, error_model="numpy")
def _some_have(bits, mask):  # type: ignore[no-untyped-def]
    found = np.uint32(0)
    for j in range(bits.size):
        found |= np.uint32((bits[j] & mask) == mask)
    return found != 0


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _round(bits: Array, count: int, rounding: int) -> None:
    """Round float32 values, given as their bits, to the nearest bfloat16 or float16; ties to even."""
    if rounding == BFLOAT16:
        for i in range(count):
            u = bits[i]
            bits[i] = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    elif rounding == FLOAT16:
        values = bits.view(np.float32)
        for i in range(count):
            u = bits[i]
            sign = u & np.uint32(0x80000000)
            size = u & np.uint32(0x7FFFFFFF)
            if size < np.uint32(0x38800000):
                # Below 2⁻¹⁴ float16 has steps of 2⁻²⁴, which are those of float32 around 0.75.
                values[i] = np.abs(values[i]) + np.float32(0.75) - np.float32(0.75)
                bits[i] |= sign
            else:
                size = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
                bits[i] = sign | (_INFINITY if size > np.uint32(0x477FE000) else size)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _quantize_block(x, count, values, bounds, codes, restored, factor):  # type: ignore[no-untyped-def]
    """Codes of scaled values, and what they stand for: a code is the number of bounds below the value."""
    # All bounds stay in registers, and the loop over the values vectorizes.
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14 = bounds
    for j in range(count):
        v = x[j]
        low = np.int32(v > b0) + np.int32(v > b1) + np.int32(v > b2) + np.int32(v > b3) + np.int32(v > b4)
        mid = np.int32(v > b5) + np.int32(v > b6) + np.int32(v > b7) + np.int32(v > b8) + np.int32(v > b9)
        top = np.int32(v > b10) + np.int32(v > b11) + np.int32(v > b12) + np.int32(v > b13) + np.int32(v > b14)
        codes[j] = low + mid + top
    for j in range(count):
        restored[j] = values[codes[j] & 15] * factor


# Sums alone may be reordered, so that they vectorize: their order then depends on their length, and nothing else.
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _tally(exact, restored, weight, moved, merged, count, sums, row):  # type: ignore[no-untyped-def]
    """Add the first `count` values to the row's sums."""
    missed, whole, along, shift = 0.0, 0.0, 0.0, 0.0
    if merged:
        for j in range(count):
            s, q = np.float64(exact[j]), np.float64(restored[j])
            w, d = np.float64(weight[j]), np.float64(moved[j])
            missed += (q - s) * (q - s)
            whole += s * s
            along += (q - w) * d
            shift += d * d
    else:
        for j in range(count):
            s, q = np.float64(exact[j]), np.float64(restored[j])
            missed += (q - s) * (q - s)
            whole += s * s
    sums[row, 0] += missed
    sums[row, 1] += whole
    sums[row, 2] += along
    sums[row, 3] += shift


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize(  # type: ignore[no-untyped-def]
    stored,
    move,
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
    total = stored.size
    bits = np.empty(block, np.uint32)  # of the base's values
    weight = bits.view(np.float32)
    exact = np.empty(block, np.float32)
    moved = np.zeros(block, np.float32)  # the scaled delta
    rounded_bits = np.empty(block, np.uint32)  # of what is quantized
    rounded = rounded_bits.view(np.float32)
    codes = np.empty(block + 1, np.int32)
    restored = np.empty(block, np.float32)
    scale_bits = np.empty(1, np.uint32)
    scale_value = scale_bits.view(np.float32)
    finite = True
    sums[:] = 0.0
    for number in range(absmax.size):
        start = number * block
        count = min(block, total - start)
        for j in range(count):
            bits[j] = np.uint32(stored[np.uintp(start + j)]) << move
        if merged:
            for j in range(count):
                moved[j] = delta[np.uintp(start + j)] * scaling
                exact[j] = weight[j] + moved[j]
        else:
            for j in range(count):
                exact[j] = weight[j]
        if rounding == EXACT:
            for j in range(count):
                rounded[j] = exact[j]
        else:
            for j in range(count):
                rounded[j] = weight[j]
            _round(rounded_bits, count, rounding)
            if merged:
                for j in range(count):
                    rounded[j] += moved[j]
                _round(rounded_bits, count, rounding)
        # Without their sign, floats are ordered as their bits are; NaN and infinity come last.
        largest = np.uint32(0)
        for j in range(count):
            largest = max(largest, rounded_bits[j] & np.uint32(0x7FFFFFFF))
        if largest >= _INFINITY:
            finite = False
        scale_bits[0] = largest
        scale = scale_value[0]
        if count == block:
            inverse = np.float32(1.0) / max(scale, _SMALLEST)
            for j in range(count):
                rounded[j] = min(max(rounded[j] * inverse, np.float32(-1.0)), np.float32(1.0))
        else:
            # bitsandbytes divides in a last block that is short, and keeps its absmax from being zero.
            scale = max(scale, _SMALLEST)
            for j in range(count):
                rounded[j] = min(max(rounded[j] / scale, np.float32(-1.0)), np.float32(1.0))
        absmax[number] = scale
        _quantize_block(rounded, count, values, bounds, codes, restored, scale)
        if not identity:
            for j in range(count):
                codes[j] = order[codes[j] & 15]
        if count % 2:
            zero = 0
            for k in range(15):
                zero += np.float32(0.0) > bounds[k]
            codes[count] = order[zero]
        for j in range((count + 1) // 2):
            packed[np.uintp(start // 2 + j)] = (codes[2 * j] << 4) | codes[2 * j + 1]
        first, row = 0, start // columns
        if start + count <= (row + 1) * columns:
            _tally(exact, restored, weight, moved, merged, count, sums, row)
            continue
        while first < count:  # a block that lies in several rows
            row = (start + first) // columns
            last = min(count, (row + 1) * columns - start)
            e, r, w, m = exact[first:last], restored[first:last], weight[first:last], moved[first:last]
            _tally(e, r, w, m, merged, last - first, sums, row)
            first = last
    return finite

"""The CPU kernels: rows of a weight plus delta → absmax, packed codes and the sums behind the figures, in one pass.

Equal to `bitsandbytes.functional.quantize_4bit` on a CPU, bit for bit; tests hold them so. Each call runs on one
thread and without Python's lock: the pipeline runs several.

All arithmetic is in float32, in the order in which PEFT and bitsandbytes do it, and never contracted: the loops are
written so that the compiler vectorizes them without being allowed to reorder a sum. An index that may be negative, for
all it knows, keeps it from that (hence `uintp`); a slice made in a loop costs the counting of a reference.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from converter.quantize import four_bit_map

Array = np.ndarray[Any, Any]

EXACT, BFLOAT16, FLOAT16 = 0, 1, 2
"""What base and sum are rounded to before they are quantized: nothing, or a 16-bit type."""
SUMS = 4
"""Sums of a row: ‖Q(S) − S‖², ‖S‖², ⟨Q(S) − W, Δ⟩, ⟨Δ, Δ⟩."""

_SMALLEST = np.float32(1e-38)
_INFINITY = np.uint32(0x7F800000)

_LANES = 16
_UNIT = 64
"""Values that are summed in float32, in `_LANES` sums of a fixed order, before float64 takes over: the figures are the
same on every processor, however wide its vectors are."""
_SMALL, _LARGE = np.float32(1e-24), np.float32(1e15)
"""A sum in one lane so small that others may have lost squares below float32's range; an absmax that may exceed it."""


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


@cache
def _pairs(quant_type: str) -> tuple[Array, Array]:
    """Of two ranks among the values, ascending, in one byte: the byte of their codes, and the bits of their values."""
    values, order, _ = tables(quant_type)
    ranks = np.arange(256)
    codes = (order[ranks >> 4] << 4) | order[ranks & 15]
    both = np.stack([values[ranks >> 4], values[ranks & 15]], axis=1)
    return codes, both.view(np.uint64).ravel()


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
    _, order, bounds = tables(quant_type)
    pair_codes, pair_values = _pairs(quant_type)
    none = np.empty(0, np.float32)
    return bool(
        _quantize(
            base if base.dtype == np.uint16 else base.view(np.uint32),
            none if delta is None else delta,
            delta is not None,
            np.float32(scaling),
            columns,
            tuple(bounds),
            bool((order == np.arange(16)).all()),
            pair_codes,
            pair_values,
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


def _reinterpret(_typing: Any, stored: Any) -> Any:
    """The float32 of stored bits: uint16 is bfloat16, the upper half of a float32; uint32 is all of one."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        bits = builder.zext(arguments[0], context.get_value_type(types.uint32))
        if stored == types.uint16:
            bits = builder.shl(bits, bits.type(16))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(stored), generate


_float32: Any = intrinsic(_reinterpret)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _rank(v, bounds):  # type: ignore[no-untyped-def]
    """How many bounds lie below a value."""
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14 = bounds
    low = np.int32(v > b0) + np.int32(v > b1) + np.int32(v > b2) + np.int32(v > b3) + np.int32(v > b4)
    mid = np.int32(v > b5) + np.int32(v > b6) + np.int32(v > b7) + np.int32(v > b8) + np.int32(v > b9)
    top = np.int32(v > b10) + np.int32(v > b11) + np.int32(v > b12) + np.int32(v > b13) + np.int32(v > b14)
    return np.int32(low + mid + top)


# Sums alone may be reordered, so that they vectorize: their order then depends on their length, and nothing else.
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _tally(stored, delta, merged, scaling, restored, start, first, last, sums, row):  # type: ignore[no-untyped-def]
    """Add values `first` to `last` of the block at `start` to the row's sums, in float64."""
    missed, whole, along, shift = 0.0, 0.0, 0.0, 0.0
    if merged:
        for j in range(first, last):
            weight, moved = _float32(stored[np.uintp(start + j)]), delta[np.uintp(start + j)] * scaling
            s, q = np.float64(weight + moved), np.float64(restored[np.uintp(j)])
            w, d = np.float64(weight), np.float64(moved)
            missed += (q - s) * (q - s)
            whole += s * s
            along += (q - w) * d
            shift += d * d
    else:
        for j in range(first, last):
            s, q = np.float64(_float32(stored[np.uintp(start + j)])), np.float64(restored[np.uintp(j)])
            missed += (q - s) * (q - s)
            whole += s * s
    sums[row, 0] += missed
    sums[row, 1] += whole
    sums[row, 2] += along
    sums[row, 3] += shift


@njit(nogil=True, cache=True, error_model="numpy")
def _end_row(row_sums, sums, row):  # type: ignore[no-untyped-def]
    """Add a row's sums by lane to its sums, always in the same order, and begin anew."""
    for lane in range(row_sums.size):
        sums[row, lane // _LANES] += row_sums[lane]
        row_sums[lane] = 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize(  # type: ignore[no-untyped-def]
    stored,
    delta,
    merged,
    scaling,
    columns,
    bounds,
    identity,
    pair_codes,
    pair_values,
    block,
    rounding,
    packed,
    absmax,
    sums,
):
    total = stored.size
    bits = np.empty(block, np.uint32)  # of what is quantized
    values = bits.view(np.float32)
    signed = bits.view(np.int32)
    ranks = np.empty(block // 2, np.int32)  # two in each
    restored_pairs = np.empty(block // 2, np.uint64)
    restored = restored_pairs.view(np.float32)
    unit_sums = np.empty(SUMS * _LANES, np.float32)
    row_sums = np.zeros(SUMS * _LANES)
    lanes = (SUMS if merged else 2) * _LANES
    finite = True
    row = 0
    sums[:] = 0.0
    for number in range(absmax.size):
        start = number * block
        count = min(block, total - start)
        if rounding == EXACT and merged:
            for j in range(count):
                values[j] = _float32(stored[np.uintp(start + j)]) + delta[np.uintp(start + j)] * scaling
        else:
            for j in range(count):
                values[j] = _float32(stored[np.uintp(start + j)])
            if rounding != EXACT:
                _round(bits, count, rounding)
                if merged:
                    for j in range(count):
                        values[j] += delta[np.uintp(start + j)] * scaling
                    _round(bits, count, rounding)
        # A short block ends with zeros: the second half of its last byte may be the code of one.
        for j in range(count, block):
            values[j] = np.float32(0.0)
        # Without their sign, floats are ordered as their bits are; NaN and infinity come last.
        largest = np.int32(0)
        for j in range(block):
            largest = max(largest, np.int32(signed[j] & np.int32(0x7FFFFFFF)))
        if np.uint32(largest) >= _INFINITY:
            finite = False
        scale = _float32(np.uint32(largest))
        # No bound lies beyond ±1, so that values just beyond need not be clamped.
        if count == block:
            factor = np.float32(1.0) / max(scale, _SMALLEST)
        else:
            # bitsandbytes divides in a last block that is short, and keeps its absmax from being zero.
            scale = max(scale, _SMALLEST)
            for j in range(count):
                values[j] = values[j] / scale
            factor = np.float32(1.0)
        absmax[number] = scale
        nbytes = (count + 1) // 2
        for j in range(nbytes):
            high, low = _rank(values[2 * j] * factor, bounds), _rank(values[2 * j + 1] * factor, bounds)
            ranks[j] = (high << 4) | low
        if identity:
            for j in range(nbytes):
                packed[np.uintp(start // 2 + j)] = ranks[j]
        else:
            for j in range(nbytes):
                packed[np.uintp(start // 2 + j)] = pair_codes[np.uint8(ranks[j])]
        for j in range(nbytes):
            restored_pairs[j] = pair_values[np.uint8(ranks[j])]
        for j in range(count):
            restored[j] *= scale
        first = 0
        while first < count:
            now = (start + first) // columns
            if now != row:
                _end_row(row_sums, sums, row)
                row = now
            last = min(count, first + _UNIT, (row + 1) * columns - start)
            if last - first < _UNIT:  # at the end of a row, or of a small block
                _tally(stored, delta, merged, scaling, restored, start, first, last, sums, row)
                first = last
                continue
            if merged:
                for lane in range(_LANES):
                    missed = whole = along = shift = np.float32(0.0)
                    for k in range(_UNIT // _LANES):
                        j = first + lane + k * _LANES
                        w, d = _float32(stored[np.uintp(start + j)]), delta[np.uintp(start + j)] * scaling
                        s, q = w + d, restored[np.uintp(j)]
                        missed += (q - s) * (q - s)
                        whole += s * s
                        along += (q - w) * d
                        shift += d * d
                    unit_sums[lane] = missed
                    unit_sums[_LANES + lane] = whole
                    unit_sums[2 * _LANES + lane] = along
                    unit_sums[3 * _LANES + lane] = shift
            else:
                for lane in range(_LANES):
                    missed = whole = np.float32(0.0)
                    for k in range(_UNIT // _LANES):
                        j = first + lane + k * _LANES
                        s, q = _float32(stored[np.uintp(start + j)]), restored[np.uintp(j)]
                        missed += (q - s) * (q - s)
                        whole += s * s
                    unit_sums[lane] = missed
                    unit_sums[_LANES + lane] = whole
            small = unit_sums[_LANES] < _SMALL or (merged and unit_sums[3 * _LANES] < _SMALL)
            if small or scale > _LARGE:  # zeros, as a rule; squares that float32 may not hold
                _tally(stored, delta, merged, scaling, restored, start, first, last, sums, row)
                first = last
                continue
            for lane in range(lanes):
                row_sums[lane] += np.float64(unit_sums[lane])
            first = last
    _end_row(row_sums, sums, row)
    return finite

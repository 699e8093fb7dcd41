"""The CPU kernels of what isn't packed: rows of a weight plus delta → floats of 16 or 32 bits, or codes of LLM.int8,
and the sums behind the figures, in one pass.

Equal to torch and to `bitsandbytes.functional.int8_vectorwise_quant`, bit for bit; tests hold them so. Sums are taken
in float64, as torch takes them.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    tally_row,
)

_INFINITY = np.uint32(0x7F800000)
_SMALLEST_OF_FLOAT16 = np.uint32(0x38800000)
"""2⁻¹⁴, the smallest normal one, as a float32. Below it, all are multiples of 2⁻²⁴."""


def keep_rows(source: Source, *, dtype: int, out: Array, sums: Array) -> bool:
    """Merge some rows and round them to a dtype: EXACT (float32), BFLOAT16 or FLOAT16. False if a value is NaN or
    infinite there.

    Filled in: `out` (uint16, or uint32 of float32; the bits), `sums` (float64, (rows, SUMS)).
    """
    return bool(_keep(source.in_bits(), dtype, out, sums))


def eight_bit_rows(source: Source, *, codes: Array, absmax: Array, sums: Array) -> bool:
    """The same, quantized as LLM.int8 does. Filled in: `codes` (int8), `absmax` (float32, one a row), `sums`."""
    return bool(_eight_bit(source.in_bits(), codes, absmax, sums))


def load(dtypes: Iterable[str]) -> None:
    """Compile what takes arrays of some dtypes, float32 or uint16, or load it from where it is kept."""
    for dtype in dtypes:
        one, sums = Source(np.ones(1, dtype), 1), np.empty((1, SUMS))
        for out, kept in (("uint16", BFLOAT16), ("uint32", EXACT)):
            keep_rows(one, dtype=kept, out=np.empty(1, out), sums=sums)
        eight_bit_rows(one, codes=np.empty(1, np.int8), absmax=np.empty(1, np.float32), sums=sums)


@jitted(inline="always")
def _rounded_to(values, size, dtype):  # type: ignore[no-untyped-def]
    """Round values in place; the largest of their bits, without the sign."""
    most = np.uint32(0)
    for j in range(size):
        value = round_float(values[np.uintp(j)], dtype)
        values[np.uintp(j)] = value
        most = max(most, np.uint32(bits_of(value) & SIZE))
    return most


@jitted()
def _merge(source, begin, size, rounded, largest):  # type: ignore[no-untyped-def]
    rounding = source.rounding
    if rounding == EXACT:
        return merge_blocks(source, EXACT, begin, size, size, rounded, largest)
    if rounding == BFLOAT16:
        return merge_blocks(source, BFLOAT16, begin, size, size, rounded, largest)
    return merge_blocks(source, FLOAT16, begin, size, size, rounded, largest)


@jitted()
def _write(values, size, dtype, begin, out):  # type: ignore[no-untyped-def]
    """The bits of floats that a dtype has."""
    if dtype == EXACT:
        for j in range(size):
            out[np.uintp(begin + j)] = bits_of(values[np.uintp(j)])
    elif dtype == BFLOAT16:
        for j in range(size):
            out[np.uintp(begin + j)] = np.uint16(bits_of(values[np.uintp(j)]) >> np.uint32(16))
    else:
        for j in range(size):
            bits = bits_of(values[np.uintp(j)])
            amount, sign = np.uint32(bits & SIZE), np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
            if amount >= _SMALLEST_OF_FLOAT16:
                out[np.uintp(begin + j)] = np.uint16(sign | ((amount - np.uint32(0x38000000)) >> np.uint32(13)))
            else:
                out[np.uintp(begin + j)] = np.uint16(
                    sign | np.uint32(abs(values[np.uintp(j)]) * np.float32(16777216.0))
                )


@jitted()
def _keep(source, dtype, out, sums):  # type: ignore[no-untyped-def]
    columns = source.columns
    rounded, largest = np.empty(STEP, np.float32), np.empty(1, np.float32)
    finite = True
    sums[:] = 0.0
    for row in range(sums.shape[0]):
        for first in range(0, columns, STEP):
            size, begin = min(STEP, columns - first), row * columns + first
            finite &= _merge(source, begin, size, rounded, largest)
            if dtype == BFLOAT16:
                finite &= _rounded_to(rounded, size, BFLOAT16) < _INFINITY
            elif dtype == FLOAT16:
                finite &= _rounded_to(rounded, size, FLOAT16) < _INFINITY
            _write(rounded, size, dtype, begin, out)
            tally_row(source, begin, size, rounded, sums[row])
    return finite


@jitted()
def _eight_bit(source, codes, absmax, sums):  # type: ignore[no-untyped-def]
    columns = source.columns
    rounded, largest = np.empty(columns, np.float32), np.empty(1, np.float32)
    finite = True
    sums[:] = 0.0
    for row in range(sums.shape[0]):
        begin = row * columns
        finite &= _merge(source, begin, columns, rounded, largest)
        finite &= _rounded_to(rounded, columns, FLOAT16) < _INFINITY
        most = np.float32(0.0)
        for j in range(columns):
            most = max(most, abs(rounded[np.uintp(j)]))
        absmax[row] = most
        # In this order torch divides a number by a tensor.
        inverse = (np.float32(1.0) / most) * np.float32(127.0) if most > np.float32(0.0) else np.float32(0.0)
        scale = most / np.float32(127.0)
        for j in range(columns):
            whole = (rounded[np.uintp(j)] * inverse) + TO_INTEGER
            codes[np.uintp(begin + j)] = np.int8(np.int32(bits_of(whole) - INTEGER_BITS))
            rounded[np.uintp(j)] = (whole - TO_INTEGER) * scale
        tally_row(source, begin, columns, rounded, sums[row])
    return finite

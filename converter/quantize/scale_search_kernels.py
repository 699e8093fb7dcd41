"""The CPU kernel of `scale_search`: the same bits."""

from __future__ import annotations

import numpy as np

from converter.quantize.jit import BFLOAT16, EXACT, FLOAT16, TO_INTEGER, jitted, round_float, select
from converter.quantize.scale_search import FACTORS, KEPT, LANES

_FACTORS = np.array(FACTORS, np.float32)
_KEPT = np.float32(KEPT)


@jitted()
def search_scales(values, group, half, rounding, dtype, scales):  # type: ignore[no-untyped-def]
    """Replace the library's scale of each group. The integers are those from -half to half - 1; `rounding`: what each
    step is rounded to; `dtype`: that of scales."""
    if rounding == EXACT:
        _search(values, group, half, EXACT, dtype, scales)
    elif rounding == BFLOAT16:
        _search(values, group, half, BFLOAT16, dtype, scales)
    else:
        _search(values, group, half, FLOAT16, dtype, scales)


@jitted(inline="always")
def _search(values, group, half, rounding, dtype, scales):  # type: ignore[no-untyped-def]
    lanes = np.empty(LANES, np.float32)
    for number in range(scales.size):
        start, largest = number * group, scales[number]
        least = _squared_error(values, start, group, largest, half, rounding, lanes)
        for k in range(_FACTORS.size):
            tried = round_float(largest * _FACTORS[k], dtype)
            error = _squared_error(values, start, group, tried, half, rounding, lanes)
            if error < least * _KEPT:
                scales[number], least = tried, error


@jitted(inline="always")
def _squared_error(values, start, group, scale, half, rounding, lanes):  # type: ignore[no-untyped-def]
    low, high = np.float32(-half), np.float32(half - 1)
    lanes[:] = np.float32(0.0)
    for begin in range(start, start + group, LANES):
        for lane in range(LANES):
            exact = values[np.uintp(begin + lane)]
            value = round_float(exact / scale, rounding)
            value = select(value < low, low, select(value > high, high, value))
            missed = np.float32(np.float32(value + TO_INTEGER) - TO_INTEGER) * scale - exact
            lanes[lane] += missed * missed
    count = LANES // 2
    while count:
        for lane in range(count):
            lanes[lane] += lanes[lane + count]
        count //= 2
    return lanes[0]

"""Values → codes and scales, by torch, as compressed-tensors computes them on a CPU.

compressed-tensors computes in the dtype of the weights, and rounds to it at each step: `calculate_qparams`,
`generate_gparam`, `_quantize`, `pack_to_int32`, `pack_fp4_to_uint8`. Of values in float32 (a merge that is not rounded)
scales are rounded to the dtype in which they are stored, and nothing else is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from converter.quantize.scale_search import searched
from converter.quantize.schemes import LARGEST_E2M1, LARGEST_E4M3, SMALLEST_E4M3, Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Quantized(NamedTuple):
    """Some rows of a weight."""

    packed: Tensor
    """The codes as they are stored: int32 (rows, columns · bits / 32), uint8 (rows, columns / 2), or E4M3."""
    scales: Tensor
    """As they are stored."""
    restored: Tensor
    """What a loader makes of both, in float32: (rows, columns)."""


def quantize(values: Tensor, scheme: Scheme, dtype: torch.dtype, global_scale: Tensor | None = None) -> Quantized:
    """Quantize rows that hold whole blocks: `values` is (rows, columns), in `dtype` or in float32.

    `dtype` is that of scales, where the scheme names no other. `global_scale`: float32 [1], of a scheme that has one.
    """
    largest = _largest(values, scheme)
    if scheme.layout == "mxfp4-pack-quantized":
        scales = divisors = _power_of_two(largest)
    elif global_scale is not None:
        scales = (global_scale * (largest / scheme.top)).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(_e4m3()).float()
        scales[scales == 0] = SMALLEST_E4M3
        divisors = scales / global_scale
    else:
        scales = _or_epsilon((largest / scheme.top).to(dtype))
        scales = divisors = searched(values, scales, scheme, dtype) if scheme.searches else scales
    stored = stored_scales(scales, scheme, dtype)
    spread = _spread(divisors, scheme, values.shape)
    scaled = values / spread
    if scheme.kind == "int":
        low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
        codes = scaled.clamp(low, high).round()
        return Quantized(packed_integers(codes, scheme.bits), stored, codes.float() * spread.float())
    if scheme.bits == 8:
        eighths = scaled.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(_e4m3())
        return Quantized(eighths, stored, eighths.float() * spread.float())
    codes = _to_e2m1(scaled.clamp(-LARGEST_E2M1, LARGEST_E2M1))
    return Quantized(_packed_floats(codes), stored, codes * spread.float())


def global_scale_of(largest: float, dtype: torch.dtype) -> Tensor:
    """The scale of scales in E4M3, float32 [1], of weights whose largest absolute value is `largest`.

    Computed in `dtype`: that of the weights, or float32. Where it is too large for `dtype`, it is 1, as in
    compressed-tensors.
    """
    import torch

    at_least = torch.tensor([largest], dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
    scale = LARGEST_E4M3 * LARGEST_E2M1 / at_least
    return torch.nan_to_num(scale, nan=1.0, posinf=1.0).float()


def stored_scales(scales: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Scales, which their dtype on disk holds exactly, in that dtype."""
    import torch

    if scheme.layout == "mxfp4-pack-quantized":  # E8M0: the exponent with a bias of 127
        return (torch.frexp(scales.float()).exponent - 1 + 127).to(torch.uint8)
    return scales.to(_e4m3() if scheme.has_global_scale else dtype)


def _e4m3() -> torch.dtype:
    import torch

    return torch.float8_e4m3fn


def _largest(values: Tensor, scheme: Scheme) -> Tensor:
    """The largest absolute value of all that share a scale: (rows, columns) of scales, in the dtype of `values`."""
    import torch

    rows, columns = scheme.extent(values.shape[1])
    down, right = -values.shape[0] % rows, -values.shape[1] % columns
    padded = torch.nn.functional.pad(values.abs(), (0, right, 0, down))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax(dim=(1, 3))


def _spread(scales: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """The scale of each value."""
    rows, columns = scheme.extent(shape[1])
    spread = scales.repeat_interleave(rows, 0) if rows > 1 else scales
    return spread.repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def _or_epsilon(scales: Tensor) -> Tensor:
    """Scales, of which none is zero."""
    import torch

    return torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)


def _power_of_two(largest: Tensor) -> Tensor:
    """MX scales: the power of two that makes `largest` lie in [3.5, 7), in its dtype.

    `generate_mx_scales`, `maybe_convert_from_mx_exp`. They add a quarter to the fraction and look at the exponent,
    which takes what is below the normal numbers for zero; of float16, a scale that would be zero is one.
    """
    import torch

    tiny = torch.finfo(largest.dtype).tiny
    fraction, exponent = torch.frexp(largest.float().clamp(min=tiny))
    power = (exponent - 1 + (fraction >= 0.875).int() - 2).clamp(min=-127)
    power[largest < 0.75 * tiny] = -127
    bits = torch.where(power > -127, (power + 127) << 23, 1 << 22).to(torch.int32)
    scales = bits.view(torch.float32).to(largest.dtype)
    return torch.where(scales == 0, 1.0, scales).to(largest.dtype)


def _to_e2m1(values: Tensor) -> Tensor:
    """Values of at most 6, rounded to 0, 0.5, 1, 1.5, 2, 3, 4 or 6; ties to even. `cast_to_fp4`

    What is rounded to zero keeps its sign, unless it was zero.
    """
    import torch

    size = values.abs().float()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = (torch.round(size / step) * step).copysign(values)
    return torch.where(values == 0, 0.0, rounded)


def packed_integers(codes: Tensor, bits: int) -> Tensor:
    """Integers as unsigned numbers in the bits of int32, low bits first: (rows, columns · bits / 32)."""
    import torch

    unsigned = (codes + 2 ** (bits - 1)).to(torch.uint8)
    each = 32 // bits
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % each))
    octets = unsigned if bits == 8 else unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return octets.contiguous().view(torch.int32)


def _packed_floats(codes: Tensor) -> Tensor:
    """Values of E2M1 as their numbers with the sign in bit 3, two a byte, the first in the low half."""
    import torch

    doubled = (codes.abs() * 2).to(torch.uint8)
    numbers = torch.where(doubled < 5, doubled, torch.where(doubled == 6, 5, torch.where(doubled == 8, 6, 7)))
    numbers = (numbers | torch.signbit(codes).to(torch.uint8) << 3).to(torch.uint8)
    return numbers[:, 0::2] | numbers[:, 1::2] << 4

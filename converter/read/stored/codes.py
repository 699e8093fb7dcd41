"""What the 4-bit codes of bitsandbytes stand for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# https://arxiv.org/abs/2305.14314, appendix E
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# One bit of sign, two of exponent, one of fraction: not in order of value.
_FP4 = (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)


@cache
def four_bit_map(quant_type: str) -> Tensor:
    """What each code stands for: float32 [16]. `bitsandbytes.functional.get_4bit_type`"""
    import torch

    values = torch.tensor(_NF4 if quant_type == "nf4" else _FP4, dtype=torch.float32)
    return values / values.abs().max()

"""Codes taken out of bytes, and what they stand for, in memory that is used again.

Fresh memory for each step would cost a page fault every 4 kB, and those of several threads wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from converter.threads import Buffers


def unpacked(packed: Tensor, bits: int, buffers: Buffers) -> Tensor:
    """Codes of 2, 4 or 8 bits, the lowest of a byte first: uint8 (rows, bytes) → uint8 (rows, codes)."""
    import torch

    width, codes = 8, packed
    while width > bits:
        width //= 2
        # Both halves of a code side by side, in the two bytes of a number.
        wide = buffers.take(f"{width} bits", torch.int16, *codes.shape).copy_(codes)
        moved = buffers.take(f"{width} bits moved", torch.int16, *codes.shape)
        torch.bitwise_left_shift(wide, 8 - width, out=moved)
        codes = wide.bitwise_or_(moved).bitwise_and_(((1 << width) - 1) * 0x0101).view(torch.uint8)
    return codes


def as_float32(codes: Tensor, buffers: Buffers) -> Tensor:
    """Whole numbers in float32."""
    import torch

    return buffers.take("values", torch.float32, *codes.shape).copy_(codes)


def looked_up(codes: Tensor, table: Tensor, buffers: Buffers) -> Tensor:
    """What codes stand for: uint8 of any shape, and float32 [codes that there are] → float32."""
    import torch

    indexes = buffers.take("indexes", torch.int32, codes.numel()).copy_(codes.flatten())
    values = buffers.take("values", torch.float32, codes.numel())
    torch.index_select(table, 0, indexes, out=values)
    return values.view(codes.shape)


def in_groups(values: Tensor, how: Callable[[Tensor, Tensor], Tensor], by_group: Tensor, width: int) -> None:
    """Change values (rows, columns) in place by what so many columns in turn share: float32 (rows, groups)."""
    whole = values.shape[1] // width
    how(values[:, : whole * width].unflatten(1, (whole, width)), by_group[:, :whole, None])
    if whole < by_group.shape[1]:
        how(values[:, whole * width :], by_group[:, whole:])


def spread(by_group: Tensor, group_of_column: Tensor, buffers: Buffers) -> Tensor:
    """What groups of columns in any order share, for each column: float32 (rows, groups) → (rows, columns)."""
    import torch

    of_columns = buffers.take("spread", torch.float32, len(by_group), len(group_of_column))
    torch.index_select(by_group, 1, group_of_column, out=of_columns)
    return of_columns

"""Weights that are codes times a scale: FP8, FP4 and whole numbers of 8 or 4 bits.

A scale is for the whole weight, a row, a group of a row, or a block of rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from converter.errors import BadCheckpoint
from converter.read.stored.stored import LUT_BYTES, Parts, as_uint8, read_codes, read_whole
from converter.read.stored.unpack import as_float32, in_groups, looked_up, unpacked
from converter.tensors import torch_dtype
from converter.threads import Buffers

if TYPE_CHECKING:
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader

Codes = Literal["F8_E4M3", "I8", "E2M1", "packed 4", "packed 8"]
"""What lies on disk. E2M1: floats of four bits, two a byte, the lower half first. packed: whole numbers of so many bits
plus half of what these can tell apart, packed into I32, the lowest bits first; a row begins with a word."""
SCALES = ("F32", "BF16", "F16")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


@dataclass(frozen=True)
class ScaledWeight(Parts):
    """A weight of codes and scales.

    Its parts: codes, scale, zero points or a global scale if it has some, and what belongs to it but isn't needed to
    read it, such as the scale of its module's inputs.
    """

    scheme: str
    codes: Codes
    extent: tuple[int, int]
    """Rows and columns that share a scale."""
    has_zeros: bool = False
    has_global: bool = False
    """Whether a scale of the whole weight divides all others: `weight_global_scale` of NVFP4."""
    block: int = 1

    @property
    def dtype(self) -> str:
        return "BF16" if self.codes == "E2M1" else self.parts[1].dtype

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of scales."""
        return -(self.shape[0] // -self.extent[0]), -(self.columns // -self.extent[1])

    @property
    def bits(self) -> int:
        return 4 if self.codes in ("E2M1", "packed 4") else 8

    @property
    def row_bytes(self) -> int:
        """Of codes."""
        if self.codes.startswith("packed"):
            return -(self.columns * self.bits // -32) * 4
        return self.columns * self.bits // 8

    @property
    def opened_bytes(self) -> int:
        rows, columns = self.grid
        return sum(part.nbytes for part in self.parts[1:]) + rows * columns * (8 if self.has_zeros else 4)

    @property
    def tile_bytes(self) -> float:
        return self.bits / 8

    def open(self, folder: Folder) -> OpenedScaled:
        tensors = [read_whole(part, folder) for part in self.parts[1:]]
        scales = _factors(tensors[0][0]).reshape(self.grid)
        if self.has_global:
            scales = scales / tensors[1][0].reshape(())
        if not bool(scales.isfinite().all()):
            raise BadCheckpoint(f"{self.parts[1].name}: holds a NaN or an infinity")
        zeros = self._zeros(tensors[1][0]) if self.has_zeros else None
        return OpenedScaled(self, folder, scales, zeros, tuple(raw for _, raw in tensors))

    def _zeros(self, packed: Tensor) -> Tensor:
        """What a code of zero stands for: float32, of the shape of the scales. They are packed along the rows."""
        import torch

        zeros = _whole_numbers(packed.T.contiguous().view(torch.uint8), self.bits, Buffers(pinned=False))
        return zeros[:, : self.shape[0]].T.contiguous()


@dataclass(frozen=True)
class OpenedScaled:
    """`scales` and `zeros` are float32, (rows, columns) of the grid."""

    weight: ScaledWeight
    folder: Folder
    scales: Tensor
    zeros: Tensor | None
    raw: Sequence[memoryview]

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        row_bytes = self.weight.row_bytes
        return read_codes(self.weight.parts[0], self.folder, (start * row_bytes, end * row_bytes), buffers)

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """(code − zero) · scale in float32, rounded once.

        `compressed_tensors.quantization.lifecycle.forward.dequantize`, bit for bit: the difference is exact in the
        dtype of each scale.
        """
        import torch

        weight, columns = self.weight, self.weight.columns
        codes = as_uint8(raw).view(end - start, weight.row_bytes)
        decoded = buffers.take("decoded", torch_dtype(weight.dtype), end - start, columns)
        group_of_row = torch.arange(start, end).div_(weight.extent[0], rounding_mode="floor")
        step = max(1, LUT_BYTES // columns)
        for first in range(0, end - start, step):
            some = slice(first, first + step)
            values, rows = self._values(codes[some], buffers), group_of_row[some]
            if self.zeros is not None:
                in_groups(values, torch.Tensor.sub_, self.zeros.index_select(0, rows), weight.extent[1])
            in_groups(values, torch.Tensor.mul_, self.scales.index_select(0, rows), weight.extent[1])
            decoded[some].copy_(values)
        return decoded

    def _values(self, codes: Tensor, buffers: Buffers) -> Tensor:
        """What codes stand for before they are scaled: float32 (rows, columns)."""
        import torch

        match self.weight.codes:
            case "F8_E4M3":
                return looked_up(codes, _e4m3(), buffers)
            case "E2M1":
                return looked_up(unpacked(codes, 4, buffers), torch.tensor(E2M1), buffers)
            case "I8":
                return as_float32(codes.view(torch.int8), buffers)
        return _whole_numbers(codes, self.weight.bits, buffers)[:, : self.weight.columns]


@cache
def _e4m3() -> Tensor:
    """What each code of E4M3 stands for: float32 [256]. torch converts them one by one."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _factors(scales: Tensor) -> Tensor:
    """Scales in float32. Those of one byte without a sign are exponents of two, as MX formats have them."""
    import torch

    return power_of_two(scales) if scales.dtype == torch.uint8 else scales.float()


def power_of_two(exponents: Tensor) -> Tensor:
    """What exponents of MX formats stand for: uint8 → float32."""
    import torch

    return torch.exp2(exponents.float() - _EXPONENT_BIAS)


def _whole_numbers(packed: Tensor, bits: int, buffers: Buffers) -> Tensor:
    """Codes of bytes, (rows, bytes) → float32 (rows, codes)."""
    return as_float32(unpacked(packed, bits, buffers), buffers).sub_(1 << bits - 1)


def shares_of(shape: tuple[int, ...], scale: TensorHeader, extents: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Which of some extents, in rows and columns, one value of `scale` has. `BadCheckpoint` if none fits.

    Where one value is for the whole weight or a whole row, its shape may be said with fewer sizes.
    """
    rows, columns = shape
    for high, wide in extents:
        grid = (-(rows // -high), -(columns // -wide))
        spelled = [grid, *([grid[:1]] if grid[1] == 1 else []), *([()] if grid == (1, 1) else [])]
        if scale.shape in spelled and scale.dtype in SCALES:
            return high, wide
    raise BadCheckpoint(
        f"{scale.name}: {scale.dtype} {list(scale.shape)}, expected one of {', '.join(SCALES)} for blocks of "
        f"{' or '.join(f'{high} × {wide}' for high, wide in extents)} of a weight of {rows} × {columns}"
    )

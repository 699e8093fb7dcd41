"""LLM.int8 weights as bitsandbytes saves them: codes of eight bits, an absmax a row. https://arxiv.org/abs/2208.07339"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.errors import BadCheckpoint, Unsupported
from converter.read.stored.stored import Parts, as_uint8, read_codes, read_whole
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader
    from converter.threads import Buffers

_SCB = ".SCB"
_LAYOUT_BYTES = 8
"""The most that the number of a layout takes; bitsandbytes writes one byte."""
_STEP = 7.874015718698502e-3
"""1/127, as `bitsandbytes.functional.int8_vectorwise_dequant` has it."""


@dataclass(frozen=True)
class EightBitWeight(Parts):
    """Its parts: codes, absmax, and the number of the layout where there is one."""

    @property
    def scheme(self) -> str:
        return "bitsandbytes int8"

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def block(self) -> int:
        return 1

    @property
    def opened_bytes(self) -> int:
        return 4 * self.shape[0]

    @property
    def tile_bytes(self) -> float:
        return 1.0

    def open(self, folder: Folder) -> OpenedEightBit:
        absmax, *rest = [read_whole(part, folder) for part in self.parts[1:]]
        if not bool(absmax[0].isfinite().all()):
            raise BadCheckpoint(f"{self.parts[1].name}: holds a NaN or an infinity")
        return OpenedEightBit(self, folder, absmax[0], tuple(raw for _, raw in (absmax, *rest)))


@dataclass(frozen=True)
class OpenedEightBit:
    """`absmax` is that of every row, in float32."""

    weight: EightBitWeight
    folder: Folder
    absmax: Tensor
    raw: tuple[memoryview, ...]

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        columns = self.weight.columns
        return read_codes(self.weight.parts[0], self.folder, (start * columns, end * columns), buffers)

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """Codes · absmax · (1/127) in float32: `bitsandbytes.functional.int8_vectorwise_dequant`, bit for bit."""
        import torch

        columns = self.weight.columns
        decoded = buffers.take("decoded", torch_dtype(self.dtype), end - start, columns)
        codes = as_uint8(raw).view(torch.int8).view(end - start, columns)
        torch.mul(codes, self.absmax[start:end, None], out=decoded)
        return decoded.mul_(_STEP)

    @property
    def dtype(self) -> str:
        return self.weight.dtype


def eight_bit_weights(tensors: Mapping[str, TensorHeader], folder: Folder) -> dict[str, EightBitWeight]:
    """The LLM.int8 weights of a checkpoint, by name. `BadCheckpoint` where parts don't fit each other; `Unsupported`
    for a layout other than that of rows."""
    found: dict[str, EightBitWeight] = {}
    for name, absmax in tensors.items():
        if not name.endswith(_SCB):
            continue
        weight = f"{name.removesuffix(_SCB)}.weight"
        codes, layout = tensors.get(weight), tensors.get(f"{weight}_format")
        if codes is None or codes.dtype != "I8" or len(codes.shape) != 2 or 0 in codes.shape:
            raise BadCheckpoint(f"{weight}: no matrix of I8, but {name} holds its absmax")
        if absmax.dtype != "F32" or absmax.shape != codes.shape[:1]:
            raise BadCheckpoint(f"{name}: {absmax.dtype} {list(absmax.shape)}, expected F32 [{codes.shape[0]}]")
        if layout is not None and (layout.nbytes > _LAYOUT_BYTES or any(read_whole(layout, folder)[1])):
            raise Unsupported(f"{layout.name}: a layout of a GPU's tiles; load and save the base with bitsandbytes")
        parts = (codes, absmax) if layout is None else (codes, absmax, layout)
        found[weight] = EightBitWeight(weight, codes.shape, parts)
    return found

"""How one weight of a base lies on disk: the seam behind which every scheme of quantized bases lies.

A `Stored` is a value of the plan. It stands for a weight of a 16-bit or 32-bit base wherever a tensor's header would:
it has a name, a dtype and a shape. Opened, it gives rows. Reading and decoding are two steps, because one thread reads
for several that decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader
    from converter.threads import Buffers

LUT_BYTES = 1 << 16
"""Bytes of codes that are looked up at a time, so that what is made on the way stays in the processor's cache."""


class Stored(Protocol):
    """One weight of a quantized base: a frozen value."""

    @property
    def name(self) -> str:
        """The weight's name in a checkpoint that isn't quantized."""

    @property
    def scheme(self) -> str:
        """What it is in, for people and for the receipt: "bitsandbytes nf4"."""

    @property
    def dtype(self) -> str:
        """That of its rows: BF16, F16 or F32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight: (out_features, in_features) of a matrix."""

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        """All tensors on disk that belong to it, in the order in which a digest takes them."""

    @property
    def file(self) -> str:
        """The file of its first part."""

    @property
    def offset(self) -> int:
        """Where in it the first part begins."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    @property
    def block(self) -> int:
        """Consecutive weights, across rows, that a tile must hold whole."""

    @property
    def opened_bytes(self) -> int:
        """Memory that it takes while it is open."""

    @property
    def tile_bytes(self) -> float:
        """Memory that one weight of a tile takes, as read and as decoded."""

    def pieces(self, folder: Folder) -> Iterator[memoryview]:
        """The bytes of all its parts, piece by piece."""

    def open(self, folder: Folder) -> Opened:
        """Read what all its rows need. Raises what reading raises, and `BadCheckpoint`."""


class Opened(Protocol):
    """A stored weight whose scales are in memory. One thread reads; several may decode at a time."""

    raw: Sequence[memoryview]
    """What was read to open it."""

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        """Read what is left of rows `start` to `end` into `buffers`."""

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """Their values, (end - start, columns) in its dtype; they lie in `buffers`. `raw` is what `read` gave."""


@dataclass(frozen=True)
class Parts:
    """What every scheme has: a name, a shape, and tensors on disk, the first of which holds the codes."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorHeader, ...]

    @property
    def file(self) -> str:
        return self.parts[0].file

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def columns(self) -> int:
        """Weights of a row, a row being what one index of the first dimension selects."""
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return columns

    def pieces(self, folder: Folder) -> Iterator[memoryview]:
        # What opening reads comes first, then the codes: in this order a conversion reads them, too.
        for part in (*self.parts[1:], self.parts[0]):
            yield from part.pieces(folder)


def read_whole(header: TensorHeader, folder: Folder) -> tuple[Tensor, memoryview]:
    """A tensor of a file, and its bytes."""
    import torch

    raw = bytearray(header.nbytes)
    folder.read_into(header.file, header.offset, memoryview(raw))
    if not raw:
        return torch.empty(header.shape, dtype=torch_dtype(header.dtype)), memoryview(raw)
    return torch.frombuffer(raw, dtype=torch_dtype(header.dtype)).view(header.shape), memoryview(raw)


def read_codes(header: TensorHeader, folder: Folder, span: tuple[int, int], buffers: Buffers) -> memoryview:
    """Some bytes of a tensor of a file, from the first to the one after the last, into `buffers`."""
    import torch

    first, last = span
    raw = memoryview(buffers.take("codes", torch.uint8, last - first).numpy())
    folder.expect(header.file, header.offset + first)
    folder.read_into(header.file, header.offset + first, raw)
    return raw


def as_uint8(raw: memoryview) -> torch.Tensor:
    """The bytes that `read_codes` gave, as a tensor on the same memory."""
    import torch

    return torch.frombuffer(raw, dtype=torch.uint8) if raw.nbytes else torch.empty(0, dtype=torch.uint8)

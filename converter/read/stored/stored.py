"""How one weight of a base lies on disk: the seam behind which every scheme of quantized bases lies.

A `Stored` is a value of the plan. It stands where the header of a 16-bit weight would: it has a name, a dtype, a shape.
Opened, it gives rows. Reading and decoding are two steps, because one thread reads for several that decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

from converter.errors import BadCheckpoint
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.checkpoint import Checkpoint
    from converter.read.folder import Folder
    from converter.read.header import TensorHeader
    from converter.threads import Buffers

LUT_BYTES = 1 << 16
"""Bytes of codes that are looked up at a time, so that what is made on the way stays in the processor's cache."""


class Source(Protocol):
    """Where a weight's values are: a tensor's header, or what stands for one."""

    @property
    def name(self) -> str:
        """The weight's name in a checkpoint that isn't quantized."""

    @property
    def dtype(self) -> str:
        """That of its rows. Of a quantized base's weight: BF16, F16 or F32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight: (out_features, in_features) of a matrix, but for a plain Conv1D, which is turned."""

    @property
    def file(self) -> str:
        """Where it is, or its codes are."""

    @property
    def offset(self) -> int:
        """Where in that file they begin."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def pieces(self, folder: Folder) -> Iterator[memoryview]:
        """All its bytes, piece by piece, in the order in which a conversion reads them."""


@runtime_checkable
class Stored(Source, Protocol):
    """One weight of a quantized base: a frozen value."""

    @property
    def scheme(self) -> str:
        """What it is in, for people and for the receipt: "bitsandbytes nf4"."""

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        """All tensors on disk that belong to it, the codes first."""

    @property
    def rows(self) -> int:
        """How many rows it is read by: as many as the first dimension has, unless it holds the matrices of experts."""

    @property
    def block(self) -> int:
        """Consecutive weights, across rows, that a tile must hold whole."""

    @property
    def opened_bytes(self) -> int:
        """Memory that it takes while it is open."""

    @property
    def tile_bytes(self) -> float:
        """Memory that one weight of a tile takes besides its value."""

    def open(self, folder: Folder) -> Opened:
        """Read what all its rows need. Raises what reading raises, and `BadCheckpoint`."""


_STORED: dict[type, bool] = {}


def is_stored(source: Source) -> TypeGuard[Stored]:
    """Whether a source is a weight of a quantized base. Each class is asked once: Python 3.11 looks for every member of
    a protocol whenever isinstance is called, and a plan asks for each tensor several times."""
    kind = type(source)
    if kind not in _STORED:
        _STORED[kind] = isinstance(source, Stored)
    return _STORED[kind]


class Opened(Protocol):
    """A source whose scales, if it has some, are in memory. One thread reads; several may decode at a time."""

    @property
    def raw(self) -> Sequence[memoryview]:
        """What was read to open it."""

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        """Read what is left of rows `start` to `end` into `buffers`."""

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """Their values, (end - start, columns) in its dtype; they lie in `buffers`. `raw` is what `read` gave."""


def named(source: Source, name: str) -> Source:
    """The same source for a weight of another name."""
    renamed: Source = replace(source, name=name)  # type: ignore[type-var]  # every source is a dataclass
    return renamed


class HasParts(Protocol):
    @property
    def parts(self) -> tuple[TensorHeader, ...]: ...


def in_order(stored: HasParts) -> tuple[TensorHeader, ...]:
    """The parts in the order in which a conversion reads them: what opening reads, then the codes."""
    return *stored.parts[1:], stored.parts[0]


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
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Weights of a row, a row being what one index of the first dimension selects."""
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return columns

    def pieces(self, folder: Folder) -> Iterator[memoryview]:
        for part in in_order(self):
            yield from part.pieces(folder)


def part_of(base: Checkpoint, name: str) -> TensorHeader:
    """A tensor of a base that other parts of a weight call for. `BadCheckpoint` if it isn't there."""
    if name not in base.tensors:
        raise BadCheckpoint(f"{name}: missing, but other parts of the weight are there")
    return base.tensors[name]


def read_whole(header: TensorHeader, folder: Folder) -> tuple[Tensor, memoryview]:
    """A tensor of a file, and its bytes."""
    import torch

    raw = bytearray(header.nbytes)
    folder.read_into(header.file, header.offset, memoryview(raw))
    if not raw:
        return torch.empty(header.shape, dtype=torch_dtype(header.dtype)), memoryview(raw)
    return torch.frombuffer(raw, dtype=torch_dtype(header.dtype)).view(header.shape), memoryview(raw)


def read_codes(source: Source, folder: Folder, span: tuple[int, int], buffers: Buffers) -> memoryview:
    """Some bytes of a file's tensor, from the first to the one after the last, into `buffers`."""
    import torch

    first, last = span
    raw = memoryview(buffers.take("codes", torch.uint8, last - first).numpy())
    folder.expect(source.file, source.offset + first)
    folder.read_into(source.file, source.offset + first, raw)
    return raw


def as_uint8(raw: memoryview) -> torch.Tensor:
    """The bytes that `read_codes` gave, as a tensor on the same memory."""
    import torch

    return torch.frombuffer(raw, dtype=torch.uint8) if raw.nbytes else torch.empty(0, dtype=torch.uint8)

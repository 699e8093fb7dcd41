"""Rows of any source, and the bytes of a quantized weight as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.read.stored.stored import Opened, Source, Stored, as_uint8, in_order, is_stored, read_codes
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.threads import Buffers


def open_source(source: Source, folder: Folder, rows: int, *, turned: bool = False, verbatim: bool = False) -> Opened:
    """Open a source for reading its rows, of which it has so many.

    `turned`: it is a plain matrix whose rows on disk are its columns, so it is read as a whole. `verbatim`: rows are
    the bytes of a quantized weight, one a row.
    """
    if not is_stored(source):
        return PlainRows(source, folder, rows, turned)
    opened = source.open(folder)  # also of bytes that are copied, what opening finds wrong is wrong
    return Verbatim(source, folder) if verbatim else opened


@dataclass(frozen=True)
class PlainRows:
    """A tensor whose values lie on disk as they are."""

    source: Source
    folder: Folder
    rows: int
    turned: bool
    raw: tuple[memoryview, ...] = ()

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        source = self.source
        row_bytes = source.nbytes // self.rows if self.rows else 0
        first, last = (0, source.nbytes) if self.turned else (start * row_bytes, end * row_bytes)
        return read_codes(source, self.folder, (first, last), buffers)

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        values = as_uint8(raw).view(torch_dtype(self.source.dtype))
        if self.turned:
            return values.view(self.source.shape).T
        return values.view(end - start, -1) if values.numel() else values.view(end - start, 0)


@dataclass(frozen=True)
class Verbatim:
    """The bytes of all parts of a quantized weight, one after the other; a row is a byte."""

    source: Stored
    folder: Folder
    raw: Sequence[memoryview] = ()

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        import torch

        raw = memoryview(buffers.take("stored", torch.uint8, end - start).numpy())
        begin = 0
        for part in in_order(self.source):
            first, last = max(start, begin), min(end, begin + part.nbytes)
            if first < last:
                offset = part.offset + first - begin
                self.folder.expect(part.file, offset)
                self.folder.read_into(part.file, offset, raw[first - start : last - start])
            begin += part.nbytes
        return raw

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        return as_uint8(raw).view(end - start, 1)

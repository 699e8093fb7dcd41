"""One tile, from the bytes that were read to those that are written: merge, encode, measure, write."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from converter.errors import ConverterError
from converter.merge.change import Rounding, Surveying
from converter.quantize.cut import tile_bounds
from converter.quantize.format import Encoded, Rows, Sharing
from converter.quantize.formats import format_of
from converter.quantize.measure import Fidelity, Tally
from converter.quantize.rounding.encoders import with_rounding
from converter.quantize.sixteen_bit import kept_by
from converter.read.stored.rows import open_source
from converter.read.stored.stored import is_stored
from converter.tensors import as_bytes, refuse_not_finite, torch_device

if TYPE_CHECKING:
    from torch import Tensor

    from converter.merge.change import Merge
    from converter.plan.plan import Plan, TensorPlan
    from converter.quantize.format import Encoder
    from converter.read.folder import Folder
    from converter.read.stored.stored import Opened
    from converter.seal.production import Target
    from converter.threads import Buffers

_log = logging.getLogger(__name__)
"""Says at level DEBUG which tensor is begun, once for each output."""


class Encoding:
    """How a plan's tensors are computed: on which device, to what they are rounded, by which encoders."""

    def __init__(self, plan: Plan) -> None:
        self.device = torch_device(plan.device)
        self._recipe, self._kernels = plan.recipe, plan.resources.kernels
        self._kept = kept_by(self.device, kernels=self._kernels)
        self._quantized = self._of_dtype(None)
        dtypes = {tensor.dtype for tensor in plan.tensors() if tensor.action == "quantize"}
        self._by_dtype = {dtype: self._of_dtype(dtype) for dtype in dtypes}
        self.largest: dict[tuple[int, tuple[str, ...]], float] = {}
        """The largest absolute value of weights that share a scale, by their adapter and names."""

    def _of_dtype(self, dtype: str | None) -> Encoder:
        """The encoder whose quant states name a dtype; None: the recipe's."""
        nearest = format_of(self._recipe, dtype).encoder(self.device, kernels=self._kernels)
        return with_rounding(nearest, self._recipe, self.device, kernels=self._kernels)

    def encoder(self, tensor: TensorPlan) -> Encoder:
        return self._by_dtype[tensor.dtype] if tensor.action == "quantize" else self._kept

    def rounding(self, tensor: TensorPlan) -> Rounding:
        """How base and sum are rounded."""
        return tensor.rounding(self._recipe)

    def load(self, plan: Plan) -> None:
        """Load the compiled code before there are threads: if one of several ran out of memory while it loads, numba's
        lock could stay locked, and the others would wait for ever."""
        self._quantized.load({tensor.source.dtype for tensor in plan.tensors() if tensor.action == "quantize"})
        kept = (tensor for tensor in plan.tensors() if tensor.action == "keep" and not tensor.is_copy)
        self._kept.load({tensor.source.dtype for tensor in kept})


class Conversion:
    """A tensor on its way into one output. An error is kept, not raised: other outputs go on without this one.

    Several threads may convert its tiles, in any order. The last of them finishes the tensor.
    """

    def __init__(self, target: Target, encoding: Encoding) -> None:
        _log.debug("begun: %s", target.tensor.name)
        self.target = target
        self.encoder = encoding.encoder(target.tensor)
        self._encoding = encoding
        self._merge: Merge | None = None
        self._tiles: dict[int, Encoded] = {}
        self._left = len(target.tensor.tiles) - 1
        self._counting = threading.Lock()
        self._made: Fidelity | None = None
        self._failure: ConverterError | None = None
        tensor = target.tensor
        # Of an untouched group the largest value is the same in every output.
        self._group = id(target.adapter) if tensor.is_touched else 0, tuple(part.name for part in tensor.fused)
        change = tensor.change
        if change is not None and target.adapter is not None:
            try:
                self._merge = change.load(target.adapter, encoding.device, encoding.rounding(tensor))
            except ConverterError as exc:
                self._failure = exc

    @property
    def surveys(self) -> bool:
        """Whether it must see all tiles, in order, before it converts the first."""
        return self._failure is None and isinstance(self._merge, Surveying)

    def unseen(self) -> Iterator[tuple[TensorPlan, Merge | None]]:
        """The tensors that share a scale with this one, with their merges; nothing once the largest value is known."""
        tensor, encoding = self.target.tensor, self._encoding
        if self._failure is not None or not tensor.fused or self._group in encoding.largest:
            return
        try:
            for part in tensor.fused:
                merge = None
                if part.change is not None and self.target.adapter is not None:
                    merge = part.change.load(self.target.adapter, encoding.device, encoding.rounding(part))
                yield part, merge
        except ConverterError as exc:
            self._failure = exc

    def largest_of(self, part: TensorPlan, merge: Merge | None, tile: Tile) -> float:
        """The largest absolute value in a tile of a tensor that shares a scale with this one."""
        encoding = self._encoding
        stored = tile.values().to(encoding.device, non_blocking=True)
        rows = Rows(part.name, tile.start, stored, merge, encoding.rounding(part), part.dtype, part.transpose)
        assert isinstance(self.encoder, Sharing)  # noqa: S101  (only formats that share scales have fused tensors)
        return self.encoder.largest(rows)

    def note_largest(self, found: Sequence[Future[float]]) -> None:
        """Wait for the largest values of all tiles, and note the largest of them."""
        try:
            self._encoding.largest[self._group] = max(tile.result() for tile in found)
        except ConverterError as exc:
            self._failure = exc

    def survey(self, start: int, stored: Tensor) -> None:
        """See rows from `start` on."""
        merge: object = self._merge
        if isinstance(merge, Surveying):
            stored = stored.to(self._encoding.device)  # waits: the tile's buffers are used again when this returns
            merge.survey(stored, start, start + int(stored.shape[0]))

    def convert(self, start: int, stored: Tensor, buffers: Buffers) -> None:
        """Convert rows from `start` on and write them. After an error, do nothing."""
        try:
            if self._failure is None:
                self._tiles[start] = self._copied(start, stored) or self._encoded(start, stored, buffers)
            with self._counting:
                self._left -= 1
                was_last = self._left == 0
            if was_last and self._failure is None:
                self._made = self._finish()
        except ConverterError as exc:
            self._failure = exc

    def made(self) -> Fidelity | ConverterError:
        """What became of it, once all tiles are converted."""
        made = self._failure or self._made
        assert made is not None  # noqa: S101  (the caller waited for the tiles)
        return made

    def _copied(self, start: int, stored: Tensor) -> Encoded | None:
        """Write the bytes as they are, if that is all there is to do."""
        tensor = self.target.tensor
        if not tensor.is_copy:
            return None
        if tensor.checked and tensor.action == "keep":
            refuse_not_finite(tensor.name, stored)
        first, raw = start * tensor.columns * stored.element_size(), as_bytes(stored)
        # Of a quantized weight that is copied, the bytes of all outputs are counted as one.
        begin = 0
        for output in tensor.outputs:
            piece = raw[max(begin - first, 0) : max(begin + output.nbytes - first, 0)]
            if piece:
                self.target.writer.write(output.name, max(first - begin, 0), piece)
            begin += output.nbytes
        return Encoded(())

    def _encoded(self, start: int, stored: Tensor, buffers: Buffers) -> Encoded:
        tensor, encoding = self.target.tensor, self._encoding
        stored = stored.to(encoding.device, non_blocking=True)
        how = encoding.rounding(tensor)
        largest = encoding.largest[self._group] if tensor.fused else 0.0
        rows = Rows(tensor.name, start, stored, self._merge, how, tensor.dtype, tensor.transpose, largest)
        encoded = self.encoder.encode(rows, buffers)
        for name, first, values in encoded.pieces:
            self.target.writer.write(name, first, as_bytes(values))
        return Encoded((), encoded.scales, encoded.sums)  # the values lie in buffers that are used again

    def _finish(self) -> Fidelity:
        """Write what needs the whole tensor: its quant state."""
        tensor, tally = self.target.tensor, Tally()
        encoded = [self._tiles[start] for start, _ in tensor.spans()]
        for tile in encoded:
            if tile.sums is not None:
                tally.add_rows(tile.sums)
        if not tensor.is_copy:
            scales = [tile.scales for tile in encoded if tile.scales is not None]
            for name, value in self.encoder.finish(tensor.name, tensor.shape, scales).items():
                self.target.writer.write(name, 0, as_bytes(value))
        self._tiles.clear()
        return tally.fidelity()


@dataclass(frozen=True)
class Tile:
    """Rows `start` to `end` of a tensor as they were read; they lie in `buffers`."""

    opened: Opened
    start: int
    end: int
    raw: memoryview
    buffers: Buffers

    def values(self) -> Tensor:
        """(rows, columns), as the base stores them; a Conv1D comes turned, whole, as (out_features, in_features)."""
        return self.opened.decode(self.start, self.end, self.raw, self.buffers)


def open_tensor(tensor: TensorPlan, folder: Folder) -> Opened:
    """Open a tensor's source for `read_tile`."""
    return open_source(tensor.source, folder, tensor.rows, turned=tensor.transpose, verbatim=tensor.action == "copy")


def read_tile(_: TensorPlan, opened: Opened, start: int, end: int, buffers: Buffers) -> tuple[Tile, memoryview]:
    """Rows `start` to `end` of a tensor's source, and their bytes."""
    raw = opened.read(start, end, buffers)
    return Tile(opened, start, end, raw, buffers), raw


def spans_of_part(part: TensorPlan, tensor: TensorPlan) -> Iterator[tuple[int, int]]:
    """First row and the row after the last, for each tile of `part`, which shares a scale with `tensor`."""
    block = part.source.block if is_stored(part.source) else 1
    most = part.rows * part.columns if part.whole else tensor.largest_tile
    yield from pairwise(tile_bounds(part.rows, part.columns, block=block, most=most))


def convert_tile(conversions: Sequence[Conversion], tile: Tile) -> None:
    """Convert a tile into every output that a tensor goes to.

    On an accelerator all of it runs on the default stream: bitsandbytes' kernels that quantize take no other one.
    """
    stored = tile.values()
    for conversion in conversions:
        conversion.convert(tile.start, stored, tile.buffers)


def survey_tile(conversions: Sequence[Conversion], tile: Tile) -> None:
    """Let those that must see a tensor before they convert it see a tile."""
    stored = tile.values()
    for conversion in conversions:
        conversion.survey(tile.start, stored)

"""One tile, from the bytes that were read to those that are written: merge, encode, measure, write."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from converter.device import Device, open_device
from converter.errors import ConverterError
from converter.merge.change import Rounding, Surveying
from converter.quantize.agreement import Agreement
from converter.quantize.cut import tile_bounds
from converter.quantize.format import Encoded, Rows, Sharing
from converter.quantize.formats import format_of
from converter.quantize.measure import Fidelity, Tally
from converter.quantize.rounding.encoders import with_rounding
from converter.quantize.sixteen_bit import kept_by
from converter.read.stored.rows import open_source
from converter.read.stored.stored import is_stored
from converter.recheck import Recheck, sampled
from converter.resources import Resources
from converter.tensors import as_bytes, refuse_not_finite

if TYPE_CHECKING:
    from torch import Tensor

    from converter.merge.change import Merge
    from converter.plan.plan import Plan, TensorPlan
    from converter.quantize.format import Encoder
    from converter.quantize.rounding.gptq import Moments
    from converter.read.folder import Folder
    from converter.read.stored.stored import Opened
    from converter.seal.production import Target
    from converter.threads import Buffers

_log = logging.getLogger(__name__)
"""Says at level DEBUG which tensor is begun, once for each output."""


class Encoding:
    """How a plan's tensors are computed: on which device, to what they are rounded, by which encoders."""

    def __init__(self, plan: Plan, device: Device | None = None, check_tiles: int = 0) -> None:
        """`device`: that which the plan names, if none is given. `check_tiles`: of an accelerator's tiles, one in so
        many is made again on the CPU."""
        self.device = device or open_device(plan.device)
        self._recipe, self._kernels = plan.recipe, plan.resources.kernels
        self.on_cpu: Encoding | None = None
        """How the tiles in `sampled` are made again."""
        self.sampled: dict[str, frozenset[int]] = {}
        """Tensor → numbers of its tiles."""
        if self.device.is_accelerator and check_tiles:
            resources = replace(plan.resources, kernels=Resources().kernels)
            self.on_cpu = Encoding(replace(plan, device="cpu", resources=resources))
            self.sampled = sampled(plan, check_tiles)
        self.recheck = Recheck(plan.recipe, plan.device)
        self._kept = kept_by(self.device.place, kernels=self._kernels)
        self._quantized = self._of_dtype(None)
        dtypes = {tensor.dtype for tensor in plan.tensors() if tensor.action == "quantize"}
        self._by_dtype = {dtype: self._of_dtype(dtype) for dtype in dtypes}
        self.moments: dict[str, Moments] = {}
        """Tensor → what its module's inputs are like, while it is calibrated."""
        self.largest: dict[tuple[int, tuple[str, ...]], float] = {}
        """The largest absolute value of weights that share a scale, by their adapter and names."""

    def _of_dtype(self, dtype: str | None) -> Encoder:
        """The encoder whose quant states name a dtype; None: the recipe's."""
        place, kernels = self.device.place, self._kernels
        nearest = format_of(self._recipe, dtype).encoder(place, kernels=kernels)
        return with_rounding(nearest, self._recipe, place, kernels=kernels)

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
        if self.on_cpu is not None:
            self.on_cpu.load(plan)

    def merge(self, tensor: TensorPlan, adapter: Folder | None) -> Merge | None:
        """What the adapter makes of a tensor, with its factors on the device. Raises what reading raises."""
        if tensor.change is None or adapter is None:
            return None
        return tensor.change.load(adapter, self.device.place, self.rounding(tensor))


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
        self.agreement: Agreement | None = None
        """Of the tiles that were made again on the CPU; None on a CPU, or if none was."""
        self._failure: ConverterError | None = None
        tensor = target.tensor
        # Of an untouched group the largest value is the same in every output.
        self._group = id(target.adapter) if tensor.is_touched else 0, tuple(part.name for part in tensor.fused)
        self._merge_again: Merge | None = None
        try:
            self._merge = encoding.merge(tensor, target.adapter)
            if encoding.on_cpu is not None and tensor.name in encoding.sampled:
                self._merge_again = encoding.on_cpu.merge(tensor, target.adapter)
        except ConverterError as exc:
            self._failure = exc

    @property
    def device(self) -> Device:
        return self._encoding.device

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
                yield part, encoding.merge(part, self.target.adapter)
        except ConverterError as exc:
            self._failure = exc

    def largest_of(self, part: TensorPlan, merge: Merge | None, tile: Tile) -> float:
        """The largest absolute value in a tile of a tensor that shares a scale with this one."""
        encoding = self._encoding
        values = Values(tile.values(), encoding.device)
        rows = Rows(part.name, tile.start, values.brought, merge, encoding.rounding(part), part.dtype, part.transpose)
        assert isinstance(self.encoder, Sharing)  # noqa: S101  (only formats that share scales have fused tensors)
        return self.encoder.largest(rows)

    def note_largest(self, found: Sequence[Future[float]]) -> None:
        """Wait for the largest values of all tiles, and note the largest of them."""
        try:
            self._encoding.largest[self._group] = max(tile.result() for tile in found)
        except ConverterError as exc:
            self._failure = exc

    def survey(self, start: int, values: Values) -> None:
        """See rows from `start` on."""
        merge: object = self._merge
        again: object = self._merge_again
        if isinstance(merge, Surveying):
            merge.survey(values.brought, start, start + values.rows)
        if isinstance(again, Surveying):
            again.survey(values.host, start, start + values.rows)

    def convert(self, start: int, values: Values, buffers: Buffers) -> None:
        """Convert rows from `start` on and write them. After an error, do nothing."""
        try:
            if self._failure is None:
                self._tiles[start] = self._copied(start, values.host) or self._encoded(start, values, buffers)
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

    def _encoded(self, start: int, values: Values, buffers: Buffers) -> Encoded:
        tensor, encoding = self.target.tensor, self._encoding
        how = encoding.rounding(tensor)
        largest = encoding.largest[self._group] if tensor.fused else 0.0
        rows = Rows(tensor.name, start, values.brought, self._merge, how, tensor.dtype, tensor.transpose, largest)
        rows = replace(rows, moments=encoding.moments.get(tensor.name))
        encoded = self.encoder.encode(rows, buffers)
        made = encoding.device.fetch([piece for _, _, piece in encoded.pieces], buffers)
        is_sampled = tensor.tiles.index(start) in encoding.sampled.get(tensor.name, ())
        # With error feedback through a whole weight, the last bit of one product may change many codes.
        if encoding.on_cpu is not None and is_sampled and rows.moments is None:
            on_cpu = replace(rows, stored=values.host, merge=self._merge_again)
            found = encoding.recheck(encoding.on_cpu.encoder(tensor), on_cpu, encoded, made)
            with self._counting:
                self.agreement = found + (self.agreement or Agreement())
        for (name, first, _), piece in zip(encoded.pieces, made, strict=True):
            self.target.writer.write(name, first, as_bytes(piece))
        return replace(encoded, pieces=())  # the values lie in buffers that are used again

    def _finish(self) -> Fidelity:
        """Write what needs the whole tensor: its quant state."""
        tensor, tally = self.target.tensor, Tally()
        encoded = [self._tiles[start] for start, _ in tensor.spans()]
        for tile in encoded:
            if tile.sums is not None:
                tally.add_rows(tile.sums)
            if tile.outputs is not None:
                tally.add_outputs(*tile.outputs)
        if not tensor.is_copy:
            scales = [tile.scales for tile in encoded if tile.scales is not None]
            for name, value in self.encoder.finish(tensor.name, tensor.shape, scales).items():
                self.target.writer.write(name, 0, as_bytes(value))
        self._tiles.clear()
        return tally.fidelity()


class Values:
    """A tile's values, (rows, columns): on the host, and on the device once they are asked for."""

    def __init__(self, host: Tensor, device: Device) -> None:
        self.host = host
        self.rows = int(host.shape[0])
        self._device = device

    @cached_property
    def brought(self) -> Tensor:
        return self._device.bring(self.host)


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
    """Convert a tile into every output that a tensor goes to."""
    with _values_of(conversions, tile) as values:
        for conversion in conversions:
            conversion.convert(tile.start, values, tile.buffers)


def survey_tile(conversions: Sequence[Conversion], tile: Tile) -> None:
    """Let those that must see a tensor before they convert it see a tile."""
    with _values_of(conversions, tile) as values:
        for conversion in conversions:
            conversion.survey(tile.start, values)


@contextmanager
def _values_of(conversions: Sequence[Conversion], tile: Tile) -> Iterator[Values]:
    """A tile's values; at the end nothing is under way that reads them, so that its buffers can be used again."""
    device = conversions[0].device
    try:
        yield Values(tile.values(), device)
    finally:
        device.settle()

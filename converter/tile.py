"""One tile, from the bytes that were read to those that are written: merge, encode, measure, write."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.errors import ConverterError
from converter.merge.change import Rounding, Surveying
from converter.quantize.format import Encoded, Rows
from converter.quantize.formats import format_of
from converter.quantize.measure import Fidelity, Tally
from converter.quantize.sixteen_bit import SixteenBitEncoder
from converter.tensors import as_bytes, refuse_not_finite, torch_device, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from converter.merge.change import Merge
    from converter.plan.plan import Plan, TensorPlan
    from converter.quantize.format import Encoder
    from converter.read.folder import Folder
    from converter.seal.production import Target
    from converter.threads import Buffers


class Encoding:
    """How a plan's tensors are computed: on which device, to what they are rounded, by which encoders."""

    def __init__(self, plan: Plan) -> None:
        self.device = torch_device(plan.device)
        self.rounding = Rounding.of(plan.recipe)
        self._quantized = format_of(plan.recipe).encoder(self.device, kernels=plan.resources.kernels)
        self._kept = SixteenBitEncoder()

    def encoder(self, tensor: TensorPlan) -> Encoder:
        return self._quantized if tensor.action == "quantize" else self._kept

    def load(self, plan: Plan) -> None:
        """Load the compiled code before there are threads: if one of several ran out of memory while it loads, numba's
        lock could stay locked, and the others would wait for ever."""
        self._quantized.load({tensor.source.dtype for tensor in plan.tensors() if tensor.action == "quantize"})


class Conversion:
    """A tensor on its way into one output. An error is kept, not raised: other outputs go on without this one.

    Several threads may convert its tiles, in any order. The last of them finishes the tensor.
    """

    def __init__(self, target: Target, encoding: Encoding) -> None:
        self.target = target
        self.encoder = encoding.encoder(target.tensor)
        self._encoding = encoding
        self._merge: Merge | None = None
        self._tiles: dict[int, Encoded] = {}
        self._left = len(target.tensor.tiles) - 1
        self._counting = threading.Lock()
        self._made: Fidelity | None = None
        self._failure: ConverterError | None = None
        change = target.tensor.change
        if change is not None and target.adapter is not None:
            try:
                self._merge = change.load(target.adapter, encoding.device, encoding.rounding)
            except ConverterError as exc:
                self._failure = exc

    @property
    def surveys(self) -> bool:
        """Whether it must see all tiles, in order, before it converts the first."""
        return self._failure is None and isinstance(self._merge, Surveying)

    def survey(self, start: int, stored: Tensor) -> None:
        """See rows from `start` on."""
        merge: object = self._merge
        if isinstance(merge, Surveying):
            stored = stored.to(self._encoding.device, non_blocking=True)
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
        if tensor.checked:
            refuse_not_finite(tensor.name, stored)
        self.target.writer.write(tensor.name, start * tensor.columns * stored.element_size(), as_bytes(stored))
        return Encoded(())

    def _encoded(self, start: int, stored: Tensor, buffers: Buffers) -> Encoded:
        tensor, encoding = self.target.tensor, self._encoding
        stored = stored.to(encoding.device, non_blocking=True)
        rows = Rows(tensor.name, start, stored, self._merge, encoding.rounding, tensor.dtype, tensor.transpose)
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


def convert_tile(conversions: Sequence[Conversion], start: int, stored: Tensor, buffers: Buffers) -> None:
    """Convert rows from `start` on into every output that a tensor goes to; `stored` lies in `buffers`.

    On an accelerator all of it runs on the default stream: bitsandbytes' kernels that quantize take no other one.
    """
    for conversion in conversions:
        conversion.convert(start, stored, buffers)


def survey_tile(conversions: Sequence[Conversion], start: int, stored: Tensor) -> None:
    """Let those that must see a tensor before they convert it see rows from `start` on."""
    for conversion in conversions:
        conversion.survey(start, stored)


def read_tile(tensor: TensorPlan, folder: Folder, start: int, end: int, buffers: Buffers) -> tuple[Tensor, memoryview]:
    """Rows `start` to `end` of a tensor's source, as stored, and their bytes; both lie in `buffers`.

    The shape is (rows, columns); a Conv1D comes turned, whole, as (out_features, in_features).
    """
    import torch

    header = tensor.source
    row_bytes = header.nbytes // tensor.rows if tensor.rows else 0
    flat = buffers.take("stored", torch.uint8, (end - start) * row_bytes)
    raw = memoryview(flat.numpy())
    folder.expect(header.file, header.offset + start * row_bytes)
    folder.read_into(header.file, header.offset + start * row_bytes, raw)
    values = flat.view(torch_dtype(header.dtype))
    return values.view(header.shape).T if tensor.transpose else values.view(end - start, tensor.columns), raw

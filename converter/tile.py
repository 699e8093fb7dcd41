"""One tile, from the bytes that were read to those that are written: merge, quantize, measure, write."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from converter.errors import ConverterError, NotFinite
from converter.merge.lora import delta_rows, merge_tile, read_factors
from converter.plan.budget import STRIP_ELEMENTS
from converter.plan.layout import tile_bounds
from converter.quantize.measure import Fidelity, Tally, row_sums
from converter.tensors import as_bytes, refuse_not_finite, torch_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from converter.plan.plan import Plan, TensorPlan
    from converter.quantize.bnb import Quantizer
    from converter.read.checkpoint import Folder
    from converter.seal.production import Target
    from converter.threads import Buffers
    from converter.write.shard import Writer


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


@dataclass(frozen=True)
class TileResult:
    """What is left of a tile when its codes are written."""

    absmax: Tensor | None = None
    """float32, of a quantized tile."""
    sums: np.ndarray[Any, Any] | None = None
    """The sums of its rows, as `measure.row_sums` gives them; None for bytes that were copied."""


class Conversion:
    """A tensor on its way into one output. What goes wrong with it is kept, for other outputs may do without it.

    Its tiles may be converted in any order, by several threads: the one that comes last does what takes all of them.
    """

    def __init__(self, target: Target, quantizer: Quantizer) -> None:
        self.target = target
        self._quantizer = quantizer
        self._factors: tuple[Tensor, Tensor] | None = None
        self._tiles: dict[int, TileResult] = {}
        self._left = len(target.tensor.tiles) - 1
        self._counting = threading.Lock()
        self._made: Fidelity | None = None
        self._failure: ConverterError | None = None
        pair = target.tensor.pair
        if pair is not None and target.adapter is not None:
            try:
                self._factors = read_factors(pair, target.adapter, quantizer.device)
            except ConverterError as exc:
                self._failure = exc

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._quantizer.device

    def convert(self, start: int, end: int, stored: Tensor, buffers: Buffers) -> None:
        """Convert rows `start` to `end` and write them; nothing once something went wrong."""
        target = self.target
        try:
            if self._failure is None:
                self._tiles[start] = convert_rows(
                    target.tensor, start, end, stored, self._factors, self._quantizer, buffers, target.writer
                )
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

    def _finish(self) -> Fidelity:
        """Write what takes the whole tensor: its quant state."""
        import torch

        tensor, tally = self.target.tensor, Tally()
        results = [self._tiles[start] for start, _ in tensor.spans()]
        for result in results:
            if result.sums is not None:
                tally.add_rows(result.sums)
        if tensor.action == "quantize":
            absmax = torch.cat([result.absmax for result in results if result.absmax is not None])
            for name, value in self._quantizer.statistics(tensor.name, absmax, tensor.shape).items():
                self.target.writer.write(name, 0, as_bytes(value))
        self._tiles.clear()
        return tally.fidelity()


def load_kernels(plan: Plan) -> None:
    """Have the kernels ready that a plan needs, before there are threads: where one of several that load them runs out
    of memory, numba's lock may stay locked, and the others wait for it for ever."""
    if not (plan.resources.kernels and plan.recipe.four_bit):
        return
    from converter.quantize import kernels

    quantized, checked = set(), set()
    for tensor in plan.tensors():
        dtype = tensor.source.dtype
        if tensor.action == "quantize":
            quantized.add("uint16" if dtype == "BF16" else "float32")
        elif tensor.is_copy and tensor.checked and dtype in ("BF16", "F16", "F32"):
            checked.add("uint32" if dtype == "F32" else "uint16")
    kernels.load(sorted(quantized), sorted(checked))


def convert_tile(conversions: Sequence[Conversion], start: int, end: int, stored: Tensor, buffers: Buffers) -> None:
    """Convert rows `start` to `end` of a tensor into every output that it goes to; `stored` lies in `buffers`."""
    device = conversions[0].device
    with _own_stream(device):
        if not all(conversion.target.tensor.is_copy for conversion in conversions):
            stored = stored.to(device, non_blocking=True)
        for conversion in conversions:
            conversion.convert(start, end, stored, buffers)


def convert_rows(
    tensor: TensorPlan,
    start: int,
    end: int,
    stored: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    quantizer: Quantizer,
    buffers: Buffers,
    writer: Writer,
) -> TileResult:
    """Convert rows `start` to `end` of a tensor and write them.

    `stored` holds them as the base does; `factors` are A (rank, in_features) and B (out_features, rank) in float32, on
    the quantizer's device. Raises `NotFinite`.
    """
    if tensor.is_copy:
        if tensor.checked:
            refuse_not_finite(tensor.name, stored, kernels=quantizer.kernels)
        writer.write(tensor.name, start * tensor.columns * stored.element_size(), as_bytes(stored))
        return TileResult()
    if tensor.action == "quantize" and quantizer.kernels:
        return _by_kernels(tensor, start, end, stored, factors, quantizer, buffers, writer)
    delta = None
    if tensor.pair is not None and factors is not None:
        delta = delta_rows(factors[0], factors[1][start:end], tensor.pair.scaling)
    weight = stored.to(quantizer.device, non_blocking=True)
    merged = merge_tile(weight, delta, quantizer.recipe.merge_precision, torch_dtype(quantizer.recipe.dtype))
    if tensor.action == "quantize":
        tile = quantizer.tile(tensor.name, merged.values)
        first = start * tensor.columns // (2 if quantizer.recipe.four_bit else 1)
        writer.write(tensor.name, first, as_bytes(tile.packed))
        return TileResult(tile.absmax, row_sums(merged, tile.restored))
    kept = merged.values.to(torch_dtype(tensor.dtype))
    refuse_not_finite(tensor.name, kept)
    first = start * tensor.columns * kept.element_size()
    writer.write(tensor.name, first, as_bytes(kept.T if tensor.transpose else kept))
    return TileResult(None, row_sums(merged, kept.float()))


def _by_kernels(
    tensor: TensorPlan,
    start: int,
    end: int,
    stored: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    quantizer: Quantizer,
    buffers: Buffers,
    writer: Writer,
) -> TileResult:
    import numpy
    import torch

    from converter.quantize import kernels

    recipe, rows, columns = quantizer.recipe, end - start, tensor.columns
    if stored.dtype is torch.float16:
        stored = stored.float()
    flat = stored.contiguous().flatten()
    bits = (flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat).numpy()
    packed = buffers.take("packed", torch.uint8, -(rows * columns // -2))
    absmax = torch.empty(-(rows * columns // -recipe.block_size), dtype=torch.float32)
    sums = numpy.empty((rows, kernels.SUMS))
    rounding = kernels.EXACT
    if recipe.merge_precision == "reference":
        rounding = kernels.BFLOAT16 if recipe.dtype == "bfloat16" else kernels.FLOAT16
    # The delta is made strip by strip, so that it is still in the processor's cache when it is added.
    strips = tile_bounds(rows, columns, block=recipe.block_size, most=STRIP_ELEMENTS)
    for first, last in pairwise(strips):
        values = slice(first * columns, last * columns)
        delta = None
        if tensor.pair is not None and factors is not None:
            delta = buffers.take("delta", torch.float32, last - first, columns)
            torch.mm(factors[1][start + first : start + last], factors[0], out=delta)
        finite = kernels.quantize_rows(
            bits[values],
            None if delta is None else delta.numpy().ravel(),
            tensor.pair.scaling if tensor.pair else 1.0,
            columns,
            quant_type=recipe.quant_type,
            block=recipe.block_size,
            rounding=rounding,
            packed=packed[values.start // 2 : -(values.stop // -2)].numpy(),
            absmax=absmax[values.start // recipe.block_size : -(values.stop // -recipe.block_size)].numpy(),
            sums=sums[first:last],
        )
        if not finite:
            raise NotFinite(f"{tensor.name}: holds a NaN or an infinity")
    writer.write(tensor.name, start * columns // 2, as_bytes(packed))
    return TileResult(absmax, sums if tensor.pair is not None else sums[:, :2])


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """On an accelerator, a queue of work for each tile, so that copies of one overlap the computation of another."""
    import torch

    if device.type != "cuda":
        return nullcontext()
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(device))
    return stream

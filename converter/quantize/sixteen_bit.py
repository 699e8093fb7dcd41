"""Weights that stay floating-point numbers: merged, rounded to the output's dtype, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.quantize.format import BY_TORCH, Encoded, Found, Output, Rows, Shape
from converter.quantize.measure import row_sums
from converter.quantize.strips import kernel_dtypes, kernels_take, strips
from converter.tensors import not_finite, refuse_not_finite, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.checkpoint import Checkpoint
    from converter.recipe import Recipe
    from converter.threads import Buffers

_STORED = ("torch.bfloat16", "torch.float16", "torch.float32")
_KEPT = {"BF16": "BFLOAT16", "F16": "FLOAT16", "F32": "EXACT"}


@dataclass(frozen=True)
class SixteenBit:
    """The merged model in 16 bits; and every weight that a quantized output keeps."""

    recipe: Recipe
    description: str = "16-bit weights"
    tags: tuple[str, ...] = ()
    library: str = "bitsandbytes"

    @property
    def settings(self) -> Mapping[str, str]:
        return {}

    def block(self, columns: int) -> int:
        return 1

    def outputs(self, name: str, shape: Shape) -> tuple[Output, ...]:
        return (Output(name, {"bfloat16": "BF16", "float16": "F16"}[self.recipe.dtype], shape),)

    def config(self, skip_modules: Sequence[str] | None) -> dict[str, Any] | None:
        return None

    def state_bytes(self, rows: int, columns: int) -> int:
        return 0

    def tile_bytes(self, dtype: str, *, kernels: bool) -> float:
        return BY_TORCH

    def encoder(self, device: torch.device, *, kernels: bool = False) -> SixteenBitEncoder:
        return kept_by(device, kernels=kernels)

    def find(self, written: Checkpoint) -> Found:
        return Found()


class SixteenBitEncoder:
    """Rounds merged rows."""

    def load(self, dtypes: Collection[str]) -> None:
        """Nothing is compiled."""

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        merged = rows.merged()
        kept = merged.values.to(torch_dtype(rows.dtype))
        refuse_not_finite(rows.name, kept)
        first = rows.first * kept.element_size()
        return Encoded(((rows.name, first, kept.T if rows.transposed else kept),), sums=row_sums(merged, kept.float()))

    def finish(self, name: str, shape: Shape, scales: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return {}


class KernelEncoder(SixteenBitEncoder):
    """The same bits by a CPU kernel, which adds what an additive change adds while it rounds."""

    def load(self, dtypes: Collection[str]) -> None:
        from converter.quantize import plain_kernels

        plain_kernels.load(kernel_dtypes(dtypes))

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        if str(rows.stored.dtype) not in _STORED or rows.dtype not in _KEPT or not kernels_take(rows):
            return super().encode(rows, buffers)
        import numpy
        import torch

        from converter.quantize import jit, plain_kernels

        count, columns = rows.stored.shape
        kept = buffers.take("kept", torch_dtype(rows.dtype), count, columns)
        bits = kept.view(torch.uint32 if rows.dtype == "F32" else torch.uint16).numpy().ravel()
        sums = numpy.empty((count, jit.SUMS))
        finite = True
        for strip in strips(rows, buffers):
            finite &= plain_kernels.keep_rows(
                strip.source,
                dtype=getattr(jit, _KEPT[rows.dtype]),
                out=bits[strip.first * columns : strip.last * columns],
                sums=sums[strip.first : strip.last],
            )
        if not finite:
            raise not_finite(rows.name, kept.dtype)
        first = rows.first * kept.element_size()
        values = kept.T if rows.transposed else kept
        return Encoded(((rows.name, first, values),), sums=sums if rows.merge is not None else sums[:, :2])


def kept_by(device: torch.device, *, kernels: bool) -> SixteenBitEncoder:
    """The encoder of weights that stay floating-point numbers."""
    return KernelEncoder() if kernels and device.type == "cpu" else SixteenBitEncoder()

"""Weights that stay floating-point numbers: merged, rounded to the output's dtype, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.quantize.format import BY_TORCH, Encoded, Found, Output, Rows, Shape
from converter.quantize.measure import row_sums
from converter.tensors import refuse_not_finite, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.checkpoint import Checkpoint
    from converter.recipe import Recipe
    from converter.threads import Buffers


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
        return SixteenBitEncoder()

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

"""DoRA: every row of W + scaling · B · A is brought to a length of its own. https://arxiv.org/abs/2402.09353"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.merge.change import Merge, MergedTile, Rounding, transform
from converter.merge.lora import Lora, delta_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA on a linear layer or a Conv1D, and the length of each row of the merged weight."""

    magnitude: TensorHeader
    """(out_features,)"""
    is_additive = False
    is_transforming = True

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return *super().parts, self.magnitude

    @property
    def nbytes(self) -> int:
        return super().nbytes + 6 * self.shape[0]

    @property
    def label(self) -> str:
        return f"DoRA, rank {self.rank}, scaling {self.scaling:g}"

    def as_json(self) -> dict[str, Any]:
        return {"dora": self.settings()}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> Merge:
        a, b, magnitude = self.read(folder, device)
        return DoraMerge(a, b, magnitude.flatten(), self.scaling, rounding)


@dataclass(frozen=True)
class DoraMerge:
    """In memory, in float32: `a` (rank, in_features), `b` (out_features, rank), `magnitude` (out_features,)."""

    a: Tensor
    b: Tensor
    magnitude: Tensor
    scaling: float
    rounding: Rounding

    @property
    def inputs(self) -> Tensor:
        return self.a

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        delta = delta_rows(self.a, self.b[start:end], self.scaling)
        return transform(weight, lambda base: dora_rows(base + delta, self.magnitude[start:end]), self.rounding)

    def transform(self, weight: Tensor, start: int, end: int, out: Tensor) -> None:
        import torch

        torch.mm(self.b[start:end], self.a, out=out)
        dora_rows(out.mul_(self.scaling).add_(weight), self.magnitude[start:end])


def dora_rows(merged: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of W + D, brought to the lengths `magnitude` in place: (rows, in_features) and (rows,), float32.

    A row takes part in no other's length, so tiles have the bits of the whole.
    `peft.tuners.lora.variants.DoraLinearVariant.merge_unsafe`
    """
    import torch

    factor = magnitude / torch.linalg.norm(merged, dim=1)
    return merged.mul_(factor.view(-1, 1))

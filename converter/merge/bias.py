"""A bias of lora_B, which is added, scaled, to the layer's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from converter.merge.change import Change, MergedTile, Rounding, add

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class LoraBias(Change):
    """b + scaling · lora_B.bias"""

    bias: TensorHeader
    """(out_features,)"""
    scaling: float

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return (self.bias,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bias.shape

    @property
    def nbytes(self) -> int:
        return 6 * self.bias.shape[0]

    @property
    def label(self) -> str:
        return f"merge, scaling {self.scaling:g}"

    def as_json(self) -> dict[str, Any]:
        return {"lora_bias": {"module": self.module, "scaling": self.scaling}}

    def scaled(self, factor: float) -> Self:
        return replace(self, scaling=self.scaling * factor)

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> LoraBiasMerge:
        [bias] = self.read(folder, device)
        return LoraBiasMerge(bias * self.scaling, rounding)


@dataclass(frozen=True)
class LoraBiasMerge:
    """scaling · lora_B.bias in float32, (out_features,).

    `peft.tuners.lora.layer.Linear.merge`
    """

    delta: Tensor
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        return add(weight, self.delta[start:end].view(weight.shape), self.rounding)

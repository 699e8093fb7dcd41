"""LoRA on linear layers of single experts, where the base has the matrices of all experts in one tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from converter.merge.change import Change, MergedTile, Rounding, add
from converter.merge.experts import Expert
from converter.merge.lora import Lora
from converter.model.architecture import Slice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class ExpertSlices(Change):
    """A weight that holds the matrices of all experts, (experts, rows, columns), some parts of which have LoRA."""

    stacked: tuple[int, ...]
    layers: tuple[tuple[Slice, Lora], ...]
    """Which part, and what is added there; no two of them overlap."""
    is_of_stack = True

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return tuple(part for _, lora in self.layers for part in lora.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stacked

    @property
    def nbytes(self) -> int:
        return sum(lora.nbytes for _, lora in self.layers)

    @property
    def label(self) -> str:
        ranks = sorted({lora.rank for _, lora in self.layers})
        return f"merge, {len(self.layers)} layers of experts, rank {', '.join(map(str, ranks))}"

    def as_json(self) -> dict[str, Any]:
        layers = [lora.settings() | {"expert": at.expert, "first": at.first} for at, lora in self.layers]
        return {"lora_of_experts": {"module": self.module, "layers": layers}}

    def scaled(self, factor: float) -> Self:
        return replace(self, layers=tuple((at, lora.scaled(factor)) for at, lora in self.layers))

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> SlicedMerge:
        rows, layers = self.stacked[1], []
        for at, lora in self.layers:
            a, b = lora.read(folder, device)
            begin = at.expert * rows + at.first
            end = begin + at.shape[1 if at.turned else 0]
            layers.append((begin, end, Expert(a, b, lora.scaling, at.turned)))
        return SlicedMerge(tuple(layers), rounding)


@dataclass(frozen=True)
class SlicedMerge:
    """The factors of all such layers in memory, each with the rows of the weight that it changes."""

    layers: tuple[tuple[int, int, Expert], ...]
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        import torch

        delta = torch.full(weight.shape, -0.0, device=weight.device)  # which leaves zeros of either sign as they are
        for begin, behind, expert in self.layers:
            first, last = max(start, begin), min(end, behind)
            if first < last:
                delta[first - start : last - start] = expert.delta(first - begin, last - begin)
        return add(weight, delta, self.rounding)

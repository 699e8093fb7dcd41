"""LoRA: W + scaling · B · A. https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from converter.merge.change import Change, Merge, MergedTile, Rounding, add

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class Factors(Change):
    """Two factors for one module; the first dimension of A is the rank."""

    a: TensorHeader
    b: TensorHeader
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return self.a, self.b

    @property
    def nbytes(self) -> int:
        # Both in float32, beside what they are read from, which is often half as large.
        return 6 * self.rank * sum(self.shape)

    @property
    def label(self) -> str:
        return f"merge, rank {self.rank}, scaling {self.scaling:g}"

    def settings(self) -> dict[str, Any]:
        return {"module": self.module, "rank": self.rank, "scaling": self.scaling}

    def scaled(self, factor: float) -> Self:
        """As PEFT's `set_scale` has it: the lengths that DoRA learned stay what they are."""
        return replace(self, scaling=self.scaling * factor)


@dataclass(frozen=True)
class Lora(Factors):
    """Delta = scaling · B · A of a linear layer: A is (rank, in_features), B is (out_features, rank)."""

    is_additive = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def as_json(self) -> dict[str, Any]:
        return {"lora": self.settings()}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> Merge:
        a, b = self.read(folder, device)
        return LoraMerge(a, b, self.scaling, rounding)


@dataclass(frozen=True)
class LoraMerge:
    """Factors in memory, in float32: `a` is (rank, in_features), `b` is (out_features, rank)."""

    a: Tensor
    b: Tensor
    scaling: float
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        return add(weight, delta_rows(self.a, self.b[start:end], self.scaling), self.rounding)

    @property
    def inputs(self) -> Tensor:
        return self.a

    def product(self, start: int, end: int, out: Tensor) -> None:
        import torch

        torch.mm(self.b[start:end], self.a, out=out)


def delta_rows(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Some rows of a LoRA delta, scaling · B · A, in float32: the product first, then the scaling, as PEFT does.

    `a` is (rank, in_features), `b` is (rows, rank), both float32. Equal, bit for bit, to the same rows of the whole
    product for tiles of at least `cut.MIN_MERGE_ROWS` rows.
    `peft.tuners.lora.layer.Linear.get_delta_weight`
    """
    return (b @ a).mul_(scaling)

"""LoRA and DoRA on an embedding, whose factors lie the other way round: W + scaling · (B · A)ᵀ.

W is (vocabulary, dimension), A is (rank, vocabulary), B is (dimension, rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.merge.change import Merge, MergedTile, Rounding, add_rounded, transform
from converter.merge.lora import Factors
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class EmbeddingLora(Factors):
    """The two factors for one embedding: A is (rank, vocabulary), B is (dimension, rank)."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[1], self.b.shape[0]

    def as_json(self) -> dict[str, Any]:
        return {"embedding_lora": self.settings()}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> Merge:
        a, b = self.read(folder, device)
        return EmbeddingMerge(a, b, self.scaling, rounding)


@dataclass(frozen=True)
class EmbeddingMerge:
    """Factors in memory, in float32: `a` (rank, vocabulary), `b` (dimension, rank)."""

    a: Tensor
    b: Tensor
    scaling: float
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        return add_rounded(weight, embedding_rows(self.a[:, start:end], self.b, self.scaling), self.rounding)


def embedding_rows(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Rows of an embedding's delta, (tokens, dimension): `a` is (rank, tokens), `b` (dimension, rank), all float32.

    `peft.tuners.lora.layer.Embedding.get_delta_weight`
    """
    return (b @ a).T.mul_(scaling)


@dataclass(frozen=True)
class EmbeddingDora(EmbeddingLora):
    """LoRA on an embedding, and the length of each column of the merged weight, over the whole vocabulary."""

    magnitude: TensorHeader
    """(dimension,)"""

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return *super().parts, self.magnitude

    @property
    def nbytes(self) -> int:
        return super().nbytes + 20 * self.shape[1]

    @property
    def label(self) -> str:
        return f"DoRA, rank {self.rank}, scaling {self.scaling:g}, read twice"

    def as_json(self) -> dict[str, Any]:
        return {"embedding_dora": self.settings()}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> Merge:
        import torch

        a, b, magnitude = self.read(folder, device)
        squares = torch.zeros(self.shape[1], dtype=torch.float64, device=device)
        return EmbeddingDoraMerge(a, b, magnitude.flatten(), self.scaling, rounding, squares)


@dataclass(frozen=True)
class EmbeddingDoraMerge:
    """In memory, in float32: `a` (rank, vocabulary), `b` (dimension, rank), `magnitude` (dimension,).

    All rows are surveyed, in order, before the first is merged.
    `peft.tuners.lora.variants.DoraEmbeddingVariant.merge_unsafe`
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor
    scaling: float
    rounding: Rounding
    squares: Tensor
    """Of the columns of the rows that were surveyed, summed up in float64: (dimension,).

    PEFT sums up in float32, which for a large vocabulary is wrong by 1e-5 and depends on the processor."""

    def survey(self, weight: Tensor, start: int, end: int) -> None:
        """Count rows, in order: one at a time, so that the sum depends on no tiles."""
        if self.rounding.precision == "reference":
            weight = weight.to(torch_dtype(self.rounding.dtype))
        for row in (weight.float() + self._delta(start, end)).double().square_():
            self.squares.add_(row)

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        factor = self.magnitude / self.squares.sqrt().float()
        delta = self._delta(start, end)
        return transform(weight, lambda base: factor * (base + delta), self.rounding)

    def _delta(self, start: int, end: int) -> Tensor:
        return embedding_rows(self.a[:, start:end], self.b, self.scaling)

"""LoRA and DoRA on an embedding, whose factors lie the other way round: W + scaling · (B · A)ᵀ.

W is (vocabulary, dimension), A is (rank, vocabulary), B is (dimension, rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.merge.change import MergedTile, Rounding, add_rounded, read_float32, transform
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class EmbeddingLora:
    """The two factors for one embedding."""

    module: str
    a: TensorHeader
    """(rank, vocabulary)"""
    b: TensorHeader
    """(dimension, rank)"""
    scaling: float
    source: TensorHeader | None = None
    whole: str | None = None
    is_additive: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return self.a, self.b

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[1], self.b.shape[0]

    @property
    def nbytes(self) -> int:
        # Both in float32, beside what they are read from, which is often half as large.
        return 6 * self.rank * sum(self.shape)

    @property
    def label(self) -> str:
        return f"merge, rank {self.rank}, scaling {self.scaling:g}"

    def as_json(self) -> dict[str, Any]:
        return {"embedding_lora": {"module": self.module, "rank": self.rank, "scaling": self.scaling}}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> EmbeddingMerge:
        a, b = (read_float32(part, folder).to(device) for part in self.parts)
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
class EmbeddingDora:
    """LoRA on an embedding, and the length of each column of the merged weight, over the whole vocabulary."""

    lora: EmbeddingLora
    magnitude: TensorHeader
    """(dimension,)"""
    source: TensorHeader | None = None
    whole: str | None = None
    is_additive: bool = False

    @property
    def module(self) -> str:
        return self.lora.module

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return *self.lora.parts, self.magnitude

    @property
    def shape(self) -> tuple[int, int]:
        return self.lora.shape

    @property
    def nbytes(self) -> int:
        return self.lora.nbytes + 20 * self.shape[1]

    @property
    def label(self) -> str:
        return f"DoRA, rank {self.lora.rank}, scaling {self.lora.scaling:g}, read twice"

    def as_json(self) -> dict[str, Any]:
        return {"embedding_dora": self.lora.as_json()["embedding_lora"]}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> EmbeddingDoraMerge:
        import torch

        a, b, magnitude = (read_float32(part, folder).to(device) for part in self.parts)
        squares = torch.zeros(self.shape[1], dtype=torch.float64, device=device)
        return EmbeddingDoraMerge(a, b, magnitude.flatten(), self.lora.scaling, rounding, squares)


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

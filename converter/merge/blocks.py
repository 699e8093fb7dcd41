"""Block-diagonal LoRA: one of the factors holds only the blocks on its diagonal. https://arxiv.org/abs/2510.23346"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.merge.change import MergedTile, Rounding, add_rounded
from converter.merge.lora import Factors, delta_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder


@dataclass(frozen=True)
class BlockLora(Factors):
    """The two factors for one linear layer, one of which is stored as its blocks, one below the other.

    A is (rank, in_features), or (rank, in_features / blocks); B is (out_features, rank), or (out_features, rank /
    blocks).
    """

    blocks_of: str
    """Which factor holds blocks: A, B or neither."""
    blocks: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1] * (self.blocks if self.blocks_of == "A" else 1)

    @property
    def label(self) -> str:
        blocks = f"{self.blocks} blocks, " if self.blocks_of else ""
        return f"merge, rank {self.rank}, {blocks}scaling {self.scaling:g}"

    def as_json(self) -> dict[str, Any]:
        return {"block_lora": self.settings() | {"blocks_of": self.blocks_of, "blocks": self.blocks}}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> BlockMerge:
        a, b = self.read(folder, device)
        if self.blocks_of == "A":
            a = on_the_diagonal(a, self.blocks)
        elif self.blocks_of == "B":
            b = on_the_diagonal(b, self.blocks)
        return BlockMerge(a, b, self.scaling, rounding)


@dataclass(frozen=True)
class BlockMerge:
    """Whole factors in memory, in float32: `a` (rank, in_features), `b` (out_features, rank)."""

    a: Tensor
    b: Tensor
    scaling: float
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        return add_rounded(weight, delta_rows(self.a, self.b[start:end], self.scaling), self.rounding)


def on_the_diagonal(stored: Tensor, blocks: int) -> Tensor:
    """A matrix (rows, columns · blocks) of the blocks that `stored`, (rows, columns), has one below the other.

    `peft.tuners.lora.variants.BlockDiagonalLinear.weight_as_blockdiagonal_matrix`
    """
    import torch

    return torch.block_diag(*stored.chunk(blocks))

"""Block-diagonal LoRA: one of the factors holds only the blocks on its diagonal. https://arxiv.org/abs/2510.23346"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.merge.change import MergedTile, Rounding, add_rounded, read_float32
from converter.merge.lora import delta_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class BlockLora:
    """The two factors for one linear layer, one of which is stored as its blocks, one below the other."""

    module: str
    a: TensorHeader
    """(rank, in_features), or (rank, in_features / blocks)"""
    b: TensorHeader
    """(out_features, rank), or (out_features, rank / blocks)"""
    scaling: float
    blocks_of: str
    """Which factor holds blocks: A, B or neither."""
    blocks: int
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
        return self.b.shape[0], self.a.shape[1] * (self.blocks if self.blocks_of == "A" else 1)

    @property
    def nbytes(self) -> int:
        return 6 * self.rank * sum(self.shape)

    @property
    def label(self) -> str:
        blocks = f"{self.blocks} blocks, " if self.blocks_of else ""
        return f"merge, rank {self.rank}, {blocks}scaling {self.scaling:g}"

    def as_json(self) -> dict[str, Any]:
        settings = {"rank": self.rank, "scaling": self.scaling, "blocks_of": self.blocks_of, "blocks": self.blocks}
        return {"block_lora": {"module": self.module, **settings}}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> BlockMerge:
        a, b = (read_float32(part, folder).to(device) for part in self.parts)
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

"""Rows of an embedding that were trained and take the place of the base's (`trainable_token_indices`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from converter.merge.change import Change, MergedTile, Rounding, transform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class TokenRows(Change):
    """New rows for some tokens. PEFT calls them `trainable_tokens_delta`; they are no delta."""

    rows: TensorHeader
    """(tokens, dimension)"""
    tokens: tuple[int, ...]
    """Which rows they replace; only the adapter's config knows."""
    vocabulary: int

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return (self.rows,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.vocabulary, self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        return 3 * self.rows.nbytes

    @property
    def label(self) -> str:
        return f"replace {len(self.tokens):,} rows"

    def as_json(self) -> dict[str, Any]:
        return {"token_rows": {"module": self.module, "tokens": list(self.tokens)}}

    def scaled(self, factor: float) -> Self:
        """As PEFT has it: rows take the place of others as they are."""
        return self

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> TokenMerge:
        import torch

        tokens = torch.tensor(self.tokens, device=device)
        [rows] = self.read(folder, device)
        return TokenMerge(rows, tokens, rounding)


@dataclass(frozen=True)
class TokenMerge:
    """`rows` are (tokens, dimension) in float32, `tokens` their numbers.

    `peft.tuners.trainable_tokens.layer.TrainableTokensLayer.get_merged_weights`
    """

    rows: Tensor
    tokens: Tensor
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        here = (self.tokens >= start) & (self.tokens < end)
        numbers, rows = self.tokens[here] - start, self.rows[here]
        return transform(weight, lambda base: base.index_copy(0, numbers, rows), self.rounding)

"""LoRA on the experts of a mixture-of-experts layer, whose matrices are one parameter: `target_parameters`.

All factors are stored together: A is (experts · rank, in), one expert below the other; B is (out, experts · rank).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from converter.merge.change import Change, MergedTile, Rounding, add_rounded, read_stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader

_ENOUGH_ROWS = 64
"""Rows of a product that BLAS computes to the same bits as the whole product."""


@dataclass(frozen=True)
class ExpertFactors:
    """The two factors for all experts of one parameter."""

    a: TensorHeader
    """(experts · rank, in)"""
    b: TensorHeader
    """(out, experts · rank)"""
    scaling: float
    experts: int
    grouped: bool = False
    """Whether the columns of B are grouped by expert, as older versions of Unsloth have them, not by rank."""
    turned: bool = False
    """Whether an expert's matrix is (in, out) in the base, so that its delta is (B · A)ᵀ."""

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of one expert's delta."""
        shape = self.b.shape[0], self.a.shape[1]
        return shape[::-1] if self.turned else shape

    @property
    def label(self) -> str:
        return f"merge, rank {self.rank}, scaling {self.scaling:g}"

    def as_json(self) -> dict[str, Any]:
        names = {"rank": self.rank, "scaling": self.scaling, "experts": self.experts}
        return names | {"grouped": self.grouped, "turned": self.turned}

    def split(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the factors by expert: (experts, rank, in) and (out, experts, rank).

        `peft.tuners.lora.layer.ParamWrapper.get_delta_weight`
        """
        by_expert = a.view(self.experts, self.rank, -1)
        if self.grouped:
            return by_expert, b.view(-1, self.experts, self.rank)
        return by_expert, b.view(-1, self.rank, self.experts).transpose(1, 2)


@dataclass(frozen=True)
class StackedExperts(Change):
    """A weight that holds the matrices of all experts, (experts, rows, columns)."""

    factors: ExpertFactors
    is_of_stack = True

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return self.factors.a, self.factors.b

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a parameter that is one matrix: (rows, columns)."""
        return self.factors.matrix if self.factors.experts == 1 else (self.factors.experts, *self.factors.matrix)

    @property
    def nbytes(self) -> int:
        return 3 * sum(part.nbytes for part in self.parts)

    @property
    def label(self) -> str:
        return self.factors.label

    def as_json(self) -> dict[str, Any]:
        return {"experts_lora": {"module": self.module} | self.factors.as_json()}

    def scaled(self, factor: float) -> Self:
        return replace(self, factors=replace(self.factors, scaling=self.factors.scaling * factor))

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> StackedMerge:
        a, b = self.read(folder, device)
        factors = self.factors
        experts = tuple(Expert(*pair, factors.scaling, factors.turned) for pair in _each(*factors.split(a, b)))
        return StackedMerge(experts, factors.matrix[0], rounding)


@dataclass(frozen=True)
class OneExpert(Change):
    """A weight of one expert alone, as most checkpoints have it: some rows of what its delta is in the model."""

    factors: ExpertFactors
    expert: int
    first: int
    """The row of the expert's delta with which the weight begins: where gate and up are one in the model."""
    rows: int

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return self.factors.a, self.factors.b

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.factors.matrix[1]

    @property
    def nbytes(self) -> int:
        # Both are read whole, one after the other; kept is the part of this expert, in float32.
        return max(part.nbytes for part in self.parts) + 4 * self.factors.rank * sum(self.factors.matrix)

    @property
    def label(self) -> str:
        return self.factors.label

    def as_json(self) -> dict[str, Any]:
        place = {"expert": self.expert, "first": self.first}
        return {"experts_lora": {"module": self.module} | self.factors.as_json() | place}

    def scaled(self, factor: float) -> Self:
        return replace(self, factors=replace(self.factors, scaling=self.factors.scaling * factor))

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> OneMerge:
        factors, stored = self.factors, [read_stored(part, folder) for part in self.parts]
        a, b = factors.split(stored[0], stored[1])
        pair = (a[self.expert].float().to(device), b[:, self.expert].float().contiguous().to(device))
        return OneMerge(Expert(*pair, factors.scaling, factors.turned), self.first, rounding)


@dataclass(frozen=True)
class Expert:
    """One expert's factors in float32: `a` (rank, in), `b` (out, rank)."""

    a: Tensor
    b: Tensor
    scaling: float
    turned: bool

    @property
    def rows(self) -> int:
        return int(self.a.shape[1] if self.turned else self.b.shape[0])

    def delta(self, start: int, end: int) -> Tensor:
        """Rows of the delta, with the bits of the whole: the product is of no fewer rows than BLAS needs for that."""
        first = max(0, min(start, self.rows - _ENOUGH_ROWS))
        last = min(self.rows, max(end, first + _ENOUGH_ROWS))
        product = (self.b @ self.a[:, first:last]).T if self.turned else self.b[first:last] @ self.a
        return product[start - first : end - first] * self.scaling


@dataclass(frozen=True)
class StackedMerge:
    """All experts in memory. The weight's rows are those of one expert after the other."""

    experts: tuple[Expert, ...]
    rows: int
    """Of one expert."""
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        import torch

        deltas = [
            self.experts[number].delta(max(0, start - number * self.rows), min(self.rows, end - number * self.rows))
            for number in range(start // self.rows, -(end // -self.rows))
        ]
        return add_rounded(weight, torch.cat(deltas), self.rounding)


@dataclass(frozen=True)
class OneMerge:
    """One expert in memory."""

    expert: Expert
    first: int
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        return add_rounded(weight, self.expert.delta(self.first + start, self.first + end), self.rounding)


def _each(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(a[expert], b[:, expert].contiguous()) for expert in range(a.shape[0])]

"""The factors of one LoRA that stands for several: the formulas of PEFT's `add_weighted_adapter`.

`peft.tuners.lora.model.LoraModel.add_weighted_adapter`, `peft.utils.merge_utils`
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.combination import Combination


class Pair(NamedTuple):
    """One adapter's part in a module, in float32."""

    a: Tensor
    """(rank, in_features); of an embedding (rank, vocabulary)."""
    b: Tensor
    """(out_features, rank); of an embedding (dimension, rank)."""
    scaling: float
    weight: float


def generator_of(seed: int, module: str) -> torch.Generator:
    """What chance drops in a module depends on nothing but the seed and the module's name."""
    import torch

    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def combined_factors(
    pairs: Sequence[Pair], combination: Combination, rank: int, generator: torch.Generator, *, turned: bool
) -> tuple[Tensor, Tensor]:
    """A and B of the result, of a rank; their scaling is 1. `turned`: the delta is (B · A)ᵀ, an embedding's."""
    if combination.kind == "cat":
        return _side_by_side(pairs, rank)
    if combination.is_cut:
        return _cut_down(pairs, combination, rank, generator, turned=turned)
    import torch

    shares = [pair.weight * pair.scaling for pair in pairs]
    roots = torch.tensor([math.sqrt(abs(share)) for share in shares])
    # The sign stands on one side only, or the two would cancel out.
    signed = torch.tensor([math.sqrt(abs(share)) * (1 if share >= 0 else -1) for share in shares])
    a = _mixed([pair.a for pair in pairs], signed, combination, generator)
    return a, _mixed([pair.b for pair in pairs], roots, combination, generator)


def _side_by_side(pairs: Sequence[Pair], rank: int) -> tuple[Tensor, Tensor]:
    """Factors whose product is the weighted sum of the deltas; what is left of the rank is zero."""
    import torch

    a = torch.cat([pair.a * pair.weight * pair.scaling for pair in pairs], dim=0)
    b = torch.cat([pair.b for pair in pairs], dim=1)
    whole_a = a.new_zeros(rank, *a.shape[1:])
    whole_b = b.new_zeros(b.shape[0], rank, *b.shape[2:])
    whole_a[: a.shape[0]], whole_b[:, : b.shape[1]] = a, b
    return whole_a, whole_b


def _cut_down(
    pairs: Sequence[Pair], combination: Combination, rank: int, generator: torch.Generator, *, turned: bool
) -> tuple[Tensor, Tensor]:
    """The best approximation of the combined deltas by factors of a rank."""
    import torch

    products = [pair.b @ pair.a for pair in pairs]
    deltas = [(one.T if turned else one) * pair.scaling for one, pair in zip(products, pairs, strict=True)]
    delta = _mixed(deltas, torch.tensor([pair.weight for pair in pairs]), combination, generator)
    u, s, v = torch.linalg.svd(delta.T if turned else delta, full_matrices=False)
    return v[:rank], u[:, :rank] @ torch.diag(s[:rank])


def _mixed(tensors: Sequence[Tensor], weights: Tensor, combination: Combination, generator: torch.Generator) -> Tensor:
    """The weighted sum of tensors of one shape, which are pruned before if the kind does so."""
    import torch

    stacked = torch.stack([_pruned(tensor, combination, generator) for tensor in tensors])
    weighted = stacked * weights.view(-1, *[1] * (stacked.dim() - 1))
    if not combination.elects:
        return weighted.sum(dim=0)
    signs = stacked.sign()
    balance = (stacked if combination.majority_sign == "total" else signs).sum(dim=0)
    wins = signs == torch.where(balance >= 0, 1, -1)
    return (weighted * wins).sum(dim=0) / torch.clamp(wins.sum(dim=0), min=1.0)


def _pruned(tensor: Tensor, combination: Combination, generator: torch.Generator) -> Tensor:
    """A tensor of whose values a share is left: the largest, or any, which then make up for the others."""
    import torch

    density = combination.density
    if density is None or density >= 1:
        return tensor
    if combination.is_random:
        mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return tensor * mask / density
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)

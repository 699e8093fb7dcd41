"""Weights packed as GPTQ and AWQ checkpoints have them, and what their codes stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies where in a word, from the lowest bits: `awq.modules.linear.gemm.WQLinear_GEMM`."""


class Rounded(NamedTuple):
    codes: torch.Tensor
    """(inputs, outputs)"""
    zeros: torch.Tensor
    """(groups, outputs)"""
    scales: torch.Tensor
    """(groups, outputs) in float16"""
    groups: torch.Tensor
    """(inputs)"""

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs) in float16"""
        difference = (self.codes - self.zeros[self.groups]).half()
        return (self.scales[self.groups] * difference).T.contiguous()


def rounded(weight: torch.Tensor, group: int, *, ordered: bool = True) -> Rounded:
    """A weight (outputs, inputs) in whole numbers of four bits. Not `ordered`: inputs belong to groups in any order."""
    inputs = weight.shape[1]
    groups = torch.arange(inputs) // group
    if not ordered:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    values = weight.float().T
    members = [values[groups == number] for number in range(inputs // group)]
    low, high = (torch.stack([getattr(one, which)(0).values for one in members]) for which in ("min", "max"))
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(1, 15).int()  # the first version of GPTQ can't save a zero of 0
    codes = (values / scales[groups] + zeros[groups]).round().clamp(0, 15).int()
    return Rounded(codes, zeros, scales, groups)


def words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes of a row a word: int32 (rows, columns / 8)."""
    packed = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for place, column in enumerate(order):
        packed |= codes[:, column::8] << 4 * place
    return packed


def gptq(of: Rounded) -> dict[str, torch.Tensor]:
    """The parts of a weight as the first version of GPTQ's format has them."""
    return {
        "qweight": words(of.codes.T).T.contiguous(),
        "qzeros": words(of.zeros - 1),
        "scales": of.scales,
        "g_idx": of.groups.int(),
    }


def awq(of: Rounded) -> dict[str, torch.Tensor]:
    return {"qweight": words(of.codes, AWQ_ORDER), "qzeros": words(of.zeros, AWQ_ORDER), "scales": of.scales}

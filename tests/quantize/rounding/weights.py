"""Weights, and inputs that they get, to be rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from converter import Recipe
from converter.calibration import Calibration
from converter.quantize.rounding.codings import Coding
from converter.quantize.rounding.gptq import Moments

CPU = torch.device("cpu")
TEXT = Calibration("0" * 64)
ONCE = Calibration("0" * 64, scales="format", sweeps=0)
"""GPTQ alone."""
FORMATS: dict[str, dict[str, object]] = {
    "nf4": {},
    "nf4 in blocks of 32, without double quant": {"block_size": 32, "double_quant": False},
    "fp4": {"quant_type": "fp4"},
    "int8": {"quant_type": "int8"},
    "w4a16": {"quant_type": "w4a16", "group_size": 32},
    "w8a16": {"quant_type": "w8a16", "group_size": 64},
}


def recipe_of(name: str, calibration: Calibration = TEXT) -> Recipe:
    choices = {"quant_type": "nf4", "dtype": "bfloat16", "calibration": calibration, **FORMATS[name]}
    return Recipe(**choices)  # type: ignore[arg-type]


def weight(rows: int = 48, columns: int = 192) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)


def inputs(columns: int = 192, tokens: int = 1000) -> Tensor:
    """Inputs that depend on each other, of very different sizes, as those of language models are."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(tokens, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    sizes = torch.rand(columns, generator=generator) ** 4 * 20 + 0.1
    return (mixed + 0.3 * torch.randn(tokens, columns, generator=generator)) * sizes


def moments(x: Tensor) -> Moments:
    return Moments(x.T @ x / len(x))


def spread(coding: Coding, scales: Tensor, shape: torch.Size) -> Tensor:
    """The step of each weight."""
    return coding.steps(scales).repeat_interleave(coding.block(shape[1]))[: shape.numel()].view(shape)

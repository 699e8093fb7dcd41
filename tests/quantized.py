"""Bases that are quantized, as the libraries that quantize them save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from converter import Recipe
from tests.models import load, save_adapter, save_base
from tests.reference import nf4

TOUCHED = ["q_proj", "down_proj"]
KINDS: dict[str, tuple[BitsAndBytesConfig, Recipe]] = {
    "nf4": (nf4(), Recipe(quant_type="nf4")),
    "nf4 single": (nf4(bnb_4bit_use_double_quant=False), Recipe(quant_type="nf4", double_quant=False)),
    "fp4": (nf4(bnb_4bit_quant_type="fp4"), Recipe(quant_type="fp4")),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), Recipe(quant_type="int8")),
}
"""What bitsandbytes makes, and the recipe whose output is in the same settings."""


def save_quantized(
    folder: Path, name: str = "llama", quantization: BitsAndBytesConfig | None = None, **changes: Any
) -> Path:
    """A base as transformers saves it in 4 or 8 bits, and beside it the one that it was made from, `…-16`. The model
    has not run: that would repack its weights."""
    plain = save_base(folder.with_name(folder.name + "-16"), name, **changes)
    load(plain, dtype=torch.bfloat16, quantization_config=quantization or nf4()).save_pretrained(folder)
    return folder


def save_pair(
    place: Path, kind: str = "nf4", *, sizes: dict[str, Any] | None = None, **settings: Any
) -> tuple[Path, Path]:
    """A quantized base and an adapter for some of its layers."""
    base = save_quantized(place / "base", quantization=KINDS[kind][0], **(sizes or {}))
    settings = {"target_modules": TOUCHED, **settings}
    return base, save_adapter(place / "adapter", place / "base-16", "llama", **settings)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.numel() != other.numel():
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))

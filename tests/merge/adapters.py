"""Adapters for one module, saved and opened, and what they are refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from converter.errors import ConversionRefused
from converter.merge.adapter import Adapter
from converter.merge.files import CONFIG, WEIGHTS
from converter.merge.keys import PREFIX
from converter.merge.match import Match, match
from converter.merge.patterns import SECONDS
from converter.model.architecture import Architecture, Kind, Role
from converter.read.folder import LocalFolder

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{MODULE}.lora_A.weight", f"{PREFIX}{MODULE}.lora_B.weight"
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def factors(rank: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {A: torch.ones(rank, 16, dtype=dtype), B: torch.ones(8, rank, dtype=dtype)}


def save(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter for one module; `config` changes a plain LoRA's."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **config}))
    save_file(factors() if tensors is None else tensors, folder / WEIGHTS)
    return folder


def opened(folder: Path, *, seconds: float = SECONDS) -> Adapter:
    return Adapter(LocalFolder(folder), seconds=seconds)


def placed(folder: Path) -> Match:
    """Where an adapter's tensors belong in a base that has MODULE, (8, 16), and an embedding and a head, (4, 16)."""
    shapes = {f"{MODULE}.weight": (8, 16), "model.embed_tokens.weight": (4, 16), "lm_head.weight": (4, 16)}
    kinds: dict[str, Kind] = {"model.embed_tokens.weight": "embedding"}
    roles = {name: Role(name, kinds.get(name, "linear"), quantize=True) for name in shapes}
    ends = frozenset(["model.embed_tokens.weight", "lm_head.weight"])
    return match(opened(folder), Architecture("LlamaForCausalLM", roles, None, embeddings=ends), shapes)


def misplaced(folder: Path, kind: type[ConversionRefused]) -> str:
    """The message with which an adapter is refused when its tensors are given their places."""
    with pytest.raises(kind) as caught:
        placed(folder)
    assert type(caught.value) is kind
    return str(caught.value)


def refusal(folder: Path, kind: type[ConversionRefused], *, seconds: float = SECONDS) -> str:
    """The message with which an adapter is refused, less the folder's name."""
    with pytest.raises(kind) as caught:
        opened(folder, seconds=seconds)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert message.isprintable()
    return message.removeprefix(f"{folder}: ")

"""Tiny bases, adapters of any kind, and what they are merged to: by this tool, and by PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    ViTConfig,
    ViTForImageClassification,
)

from converter import Recipe, convert
from converter.merge.adapter import Adapter
from converter.merge.change import Rounding, Surveying
from converter.plan.decide import make_plan
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from converter.threads import Buffers
from converter.tile import open_tensor, read_tile
from tests.models import load
from tests.reference import tensors_of

FLOAT32 = Rounding("float32", "bfloat16")
REFERENCE = Recipe(quant_type="none", merge_precision="reference", dtype="bfloat16")


def save_tuned(
    folder: Path, base: Path, config: PeftConfig, scale: float = 0.05, dtype: torch.dtype = torch.float32
) -> Any:
    """An adapter that `config` describes, with random values; the model of `dtype` that it was trained on."""
    tuned: Any = get_peft_model(load(base, dtype=dtype), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(tuned.named_parameters()):
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * scale
    with warnings.catch_warnings(action="ignore", category=PeftWarning):  # of biases, which it takes for broken factors
        tuned.save_pretrained(folder)
    return tuned.eval()


def save_gpt_oss(folder: Path, dtype: torch.dtype) -> Path:
    """A random base whose experts are one tensor, turned."""
    layers = ["sliding_attention", "full_attention"]
    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, head_dim=16, num_local_experts=3, num_experts_per_tok=1, layer_types=layers,
    )  # fmt: skip
    config.architectures = ["GptOssForCausalLM"]
    return _save(folder, GptOssForCausalLM, config, dtype)


def save_llama4(folder: Path, dtype: torch.dtype) -> Path:
    """A random base whose experts are one tensor, (in, out), and don't say so."""
    config = Llama4TextConfig(
        hidden_size=64, intermediate_size=96, intermediate_size_mlp=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, head_dim=16, num_local_experts=3, num_experts_per_tok=1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config.architectures = ["Llama4ForCausalLM"]
    return _save(folder, Llama4ForCausalLM, config, dtype)


def save_vit(folder: Path, dtype: torch.dtype) -> Path:
    """A random base that begins with a convolution."""
    config = ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    config.architectures = ["ViTForImageClassification"]
    return _save(folder, ViTForImageClassification, config, dtype)


def _save(folder: Path, kind: Any, config: Any, dtype: torch.dtype) -> Path:
    torch.manual_seed(5)
    model = kind(config)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.normal_(0, 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


def edit_config(adapter: Path, **options: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype, work: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that PEFT's `merge_and_unload` gives."""
    model = PeftModel.from_pretrained(load(base, dtype=dtype), adapter).merge_and_unload()
    model.save_pretrained(work)
    return tensors_of(work)


def merged_by_us(base: Path, adapter: Path, dtype: torch.dtype, work: Path) -> dict[str, Tensor]:
    """The same by this tool: in bfloat16 a converted checkpoint, in float32 what would be rounded to it."""
    if dtype is torch.bfloat16:
        convert(base, adapter, work, REFERENCE)
    else:
        save_exact(base, adapter, work)
    return tensors_of(work)


def save_exact(base: Path, adapter: Path, work: Path) -> Path:
    """A checkpoint of what is merged in float32, before it is rounded."""
    checkpoint, opened = Checkpoint(LocalFolder(base)), Adapter(LocalFolder(adapter))
    plan = make_plan(checkpoint, opened, Recipe(quant_type="none"))
    tensors = {}
    for tensor in plan.tensors():
        folder = opened.folder if tensor.origin == "adapter" else checkpoint.folder
        tile, _ = read_tile(tensor, open_tensor(tensor, folder), 0, tensor.rows, Buffers(pinned=False))
        stored = tile.values()
        merge = None if tensor.change is None else tensor.change.load(opened.folder, torch.device("cpu"), FLOAT32)
        values = stored
        if merge is not None:
            if isinstance(merge, Surveying):
                merge.survey(stored, 0, tensor.rows)
            values = merge(stored, 0, tensor.rows).values
        tensors[tensor.name] = (values.T if tensor.transpose else values).reshape(tensor.source.shape).clone()
    work.mkdir()
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    (work / "config.json").write_text(json.dumps({**plan.config, "dtype": "float32", "torch_dtype": "float32"}))
    return work


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal, bit for bit."""
    names = ours.keys() ^ theirs.keys()
    names |= {name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])}
    return sorted(names)


def says(model: Any) -> Tensor:
    """A model's logits."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 35)[None]).logits

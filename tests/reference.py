"""The usual flow, whose bytes ours must equal: load, merge, save, load quantized, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from tests.models import load


def reference_flow(
    base: Path, adapter: Path | None, work: Path, quantization: BitsAndBytesConfig | None, dtype: torch.dtype
) -> Path:
    """The folder that PEFT and transformers leave behind."""
    merged, out = work / "merged", work / "reference"
    model: Any = load(base, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(merged)
    if quantization is None:
        return merged
    # Beware: a model that has run may have repacked its weights. This one has not.
    load(merged, dtype=dtype, quantization_config=quantization).save_pretrained(out)
    return out


def nf4(**changes: Any) -> BitsAndBytesConfig:
    """The usual settings of QLoRA."""
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return BitsAndBytesConfig(**{**settings, **changes})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def differences(ours: Path, reference: Path) -> list[str]:
    """Tensors that are not equal byte for byte."""
    mine, theirs = tensors_of(ours), tensors_of(reference)
    different = [
        f"{name}: only in {'ours' if name in mine else 'the reference'}" for name in mine.keys() ^ theirs.keys()
    ]
    for name in mine.keys() & theirs.keys():
        one, other = mine[name], theirs[name]
        if one.dtype != other.dtype or one.shape != other.shape:
            different.append(f"{name}: {one.dtype} {list(one.shape)}, reference {other.dtype} {list(other.shape)}")
        elif not torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)):
            count = int((one != other).sum())
            different.append(f"{name}: {count} of {one.numel()} differ")
    return sorted(different)


def logits(folder: Path) -> torch.Tensor:
    """What a model says to a fixed prompt."""
    model = load(folder)
    for module in model.modules():
        # bitsandbytes' fast path for some CPUs takes only weights of certain sizes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(3, 35)[None]).logits
    return result

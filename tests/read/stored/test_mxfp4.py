"""Experts in MXFP4, as GPT-OSS has them, are read as transformers restores them, and converted with their model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from converter import Recipe, Resources, convert, verify
from converter.errors import BadCheckpoint
from converter.read.folder import LocalFolder
from converter.read.stored.stored import is_stored
from converter.threads import Buffers
from tests.folders import change_json
from tests.merge.merges import save_gpt_oss
from tests.models import load
from tests.read.stored.test_scaled import opened, save
from tests.reference import differences, tensors_of

MXFP4 = {"quant_method": "mxfp4"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def parts(experts: int, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    """Random codes, and exponents that make usual weights."""
    generator = torch.Generator().manual_seed(outputs)
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(118, 122, (experts, outputs, inputs // 32), generator=generator).to(torch.uint8)
    return {"weight_blocks": blocks, "weight_scales": scales}


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 2048, 40)])
def test_experts_are_read_as_transformers_restores_them(shape: tuple[int, int, int], tmp_path: Path) -> None:
    stored = parts(*shape)
    expected = convert_moe_packed_tensors(stored["weight_blocks"], stored["weight_scales"])
    save(tmp_path, stored, MXFP4)
    weight, buffers = opened(tmp_path), Buffers(pinned=False)
    rows_of, inputs = weight.open(LocalFolder(tmp_path)), shape[1]

    tiles = [
        rows_of.decode(first, last, rows_of.read(first, last, buffers), buffers).clone()
        for first, last in ((0, inputs), (inputs, shape[0] * inputs))
    ]

    assert is_stored(weight)
    assert (weight.shape, weight.scheme) == (shape, "mxfp4")
    assert torch.equal(torch.cat(tiles).view(shape), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scales": torch.zeros(2, 4, 3, dtype=torch.uint8)}, r"w\.weight_scales: U8 \[2, 4, 3\], expected U8"),
        ({"weight_blocks": torch.zeros(2, 4, 2, 8, dtype=torch.uint8)}, r"w\.weight_blocks: U8 \[2, 4, 2, 8\], expec"),
        ({"weight_scales": torch.full((2, 4, 2), 255, dtype=torch.uint8)}, r"w\.weight_scales: holds a NaN"),
    ],
)
def test_experts_that_can_not_be_meant_are_refused(
    changes: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save(tmp_path, parts(2, 64, 4) | changes, MXFP4)

    with pytest.raises(BadCheckpoint, match=message):
        opened(tmp_path).open(LocalFolder(tmp_path))


def save_pair(place: Path, plain: Path) -> tuple[Path, Path]:
    """A gpt-oss in MXFP4, and what transformers restores of it."""
    packed, restored = {}, {}
    for name, tensor in tensors_of(plain).items():
        if name.endswith(tuple(EXPERTS)):
            made = parts(*tensor.shape)
            packed |= {f"{name}{part.removeprefix('weight')}": value for part, value in made.items()}
            restored[name] = convert_moe_packed_tensors(made["weight_blocks"], made["weight_scales"])
        else:
            packed[name] = restored[name] = tensor
    for folder, tensors in ((place / "base", packed), (place / "same", restored)):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    change_json(place / "base" / "config.json", quantization_config=MXFP4)
    return place / "base", place / "same"


def test_a_gpt_oss_in_mxfp4_is_merged_as_the_model_that_it_stands_for(tmp_path: Path) -> None:
    plain = save_gpt_oss(tmp_path / "plain", torch.bfloat16)
    base, same = save_pair(tmp_path, plain)
    tuned = get_peft_model(
        load(plain), LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS, init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")

    for recipe in (Recipe(quant_type="none"), Recipe()):
        for adapter in (None, tmp_path / "adapter"):
            name = f"{recipe.quant_type}-{adapter is None}"
            small = Resources(tile_weights=(1 << 12, 1 << 12))
            out = convert(base, adapter, tmp_path / f"out-{name}", recipe, small).out

            assert differences(out, convert(same, adapter, tmp_path / f"same-{name}", recipe).out) == []
            assert verify(out, base, adapter).problems == []
            assert isinstance(load(out), GptOssForCausalLM)

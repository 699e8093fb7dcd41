"""An adapter is merged onto what QLoRA trained it on: the base's NF4 codes, dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from converter import Recipe, Resources, convert, verify
from converter.errors import BadRecipe, Unsupported
from tests.folders import change_json, contents
from tests.models import load, save_adapter, save_base
from tests.quantized import save_quantized
from tests.reference import differences, nf4, tensors_of

ONTO = {"quant_type": "none", "merge_onto": "dequantized"}


def flow(base: Path, adapter: Path | None, out: Path, quantization: Any, dtype: torch.dtype) -> Path:
    """What transformers dequantizes of the base in NF4, and PEFT merges into that.

    transformers makes linear layers of GPT-2's Conv1D and saves them so; they are turned back into what GPT-2 loads.
    """
    model: Any = load(base, dtype=dtype, quantization_config=quantization).dequantize()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model = model.to(dtype)
    for name, module in load(base).named_modules():
        if isinstance(module, Conv1D):
            linear = model.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            linear.weight = torch.nn.Parameter(linear.weight.T.contiguous())
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow), pytest.param("gpt_neox", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"bnb_4bit_use_double_quant": False}, {"double_quant": False}),
        ({"bnb_4bit_compute_dtype": torch.float16}, {"dtype": "float16"}),
    ],
    ids=["double quant", "single quant", "float16"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_output_is_what_peft_merges_into_the_dequantized_base(
    name: str, changes: dict[str, Any], settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name, dtype)
    adapter = save_adapter(tmp_path / "adapter", base, name)
    # As of an adapter that was trained on the quantized base, whose layers are all linear.
    change_json(adapter / "adapter_config.json", fan_in_fan_out=False)
    half = torch.float16 if settings.get("dtype") == "float16" else torch.bfloat16
    recipe = Recipe(**ONTO | {"dtype": "bfloat16"} | settings, merge_precision="reference")

    out = convert(base, adapter, tmp_path / "out", recipe).out

    assert differences(out, flow(base, adapter, tmp_path / "expected", nf4(**changes), half)) == []
    assert differences(out, convert(base, adapter, tmp_path / "plain", Recipe(quant_type="none")).out) != []


@pytest.mark.parametrize(("name", "layer"), [("llama", "layers.0.self_attn.q_proj"), ("gpt2", "h.0.attn.c_attn")])
def test_tiles_change_no_byte_and_the_output_is_verified(name: str, layer: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name, sharded=True)
    adapter = save_adapter(tmp_path / "adapter", base, name)
    recipe = Recipe(**ONTO)

    whole = convert(base, adapter, tmp_path / "whole", recipe)
    out = convert(base, adapter, tmp_path / "out", recipe, Resources(threads=1, tile_weights=(1 << 12, 1 << 12))).out

    assert contents(out) == contents(whole.out)
    assert verify(out, base, adapter).problems == []
    [tensor] = [tensor for tensor in whole.plan.tensors() if tensor.name.endswith(f"{layer}.weight")]
    assert tensor.shape == tensors_of(base)[tensor.name].shape
    assert tensor.source.shape == (tensor.shape[::-1] if name == "gpt2" else tensor.shape)


def test_other_formats_and_bases_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="`merge_onto` dequantized is for output in 16 bits: give `quant_type` none"):
        Recipe(merge_onto="dequantized")
    with pytest.raises(BadRecipe, match="`merge_onto` x: expected one of base, dequantized"):
        Recipe(merge_onto="x")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="the base is quantized already, and is merged onto as it is"):
        convert(save_quantized(tmp_path / "base"), None, tmp_path / "out", Recipe(**ONTO))


def test_the_model_says_what_the_adapter_was_trained_to_say_on_the_quantized_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    trained = PeftModel.from_pretrained(load(base, dtype=torch.bfloat16, quantization_config=nf4()), adapter)
    prompt = torch.arange(3, 35)[None]

    def distance(recipe: Recipe) -> float:
        out = convert(base, adapter, tmp_path / f"onto {recipe.merge_onto}", recipe).out
        with torch.no_grad():
            said, expected = load(out)(input_ids=prompt).logits, trained(input_ids=prompt).logits
        return float((said - expected).float().norm() / expected.float().norm())

    assert distance(Recipe(**ONTO)) < distance(Recipe(quant_type="none")) / 4

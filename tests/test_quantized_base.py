"""Bases that bitsandbytes quantized: what the adapter leaves alone is copied, what it changes is quantized again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
import transformers
from peft import PeftModel

from converter import Recipe, Resources, convert, plan_conversion, verify
from tests.folders import contents
from tests.models import load, save_adapter
from tests.quantized import KINDS, TOUCHED, same_bytes, save_pair, save_quantized
from tests.reference import tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module")


def of_a_touched_weight(name: str) -> bool:
    return any(f".{module}." in name for module in TOUCHED)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The state dict that PEFT's merge leaves in the quantized model."""
    model: Any = load(base)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    state: dict[str, torch.Tensor] = merged.state_dict()
    return state


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_the_adapter_leaves_alone_is_copied_byte_for_byte(kind: str, tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, kind)

    convert(base, adapter, tmp_path / "out", KINDS[kind][1])

    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed
    assert all(of_a_touched_weight(name) for name in changed)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_reference_equals_what_peft_merges_into_quantized_layers(kind: str, tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, kind)
    recipe = Recipe(**KINDS[kind][1].as_json() | {"merge_precision": "reference", "keep": ()})

    convert(base, adapter, tmp_path / "out", recipe)

    expected, ours = merged_by_peft(base, adapter), tensors_of(tmp_path / "out")
    assert ours.keys() <= expected.keys() | {name for name in ours if name.endswith("weight_format")}
    assert [name for name in ours if name in expected and not same_bytes(ours[name], expected[name])] == []
    if kind != "int8":
        state = next(name for name in ours if "q_proj.weight.quant_state" in name)
        assert json.loads(bytes(ours[state].tolist()))["dtype"] == "float32"


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_adapter_survives_where_rounding_would_lose_it(kind: str, tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, kind, scale=0.0001 if kind == "int8" else 0.001)
    recipe = KINDS[kind][1]
    nearest = Recipe(**recipe.as_json() | {"rounding": "nearest", "keep": ()})

    kept = convert(base, adapter, tmp_path / "kept", recipe)
    lost = convert(base, adapter, tmp_path / "lost", nearest)

    def survival(report: Any) -> list[float]:
        return [one.survival for one in report.fidelity.values() if one.survival is not None]

    assert kept.plan.recipe.rounding == "adapter"
    assert min(survival(kept)) > 0.6
    assert max(survival(lost)) < 0.15


def test_an_adapter_of_dora_survives_too(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, "nf4", scale=0.001, use_dora=True)

    kept = convert(base, adapter, tmp_path / "kept")
    lost = convert(base, adapter, tmp_path / "lost", Recipe(rounding="nearest"))

    for name, fidelity in kept.fidelity.items():
        if fidelity.survival is not None:
            assert fidelity.survival > 2 * (lost.fidelity[name].survival or 0.0), name
            assert fidelity.survival > 0.5, name


@pytest.mark.parametrize("kind", list(KINDS))
def test_transformers_loads_the_output(kind: str, tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, kind)
    convert(base, adapter, tmp_path / "out", KINDS[kind][1])

    model = load(tmp_path / "out")

    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    own = json.loads((base / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == own


def test_a_quantized_base_becomes_16_bits_as_bitsandbytes_dequantizes_it(tmp_path: Path) -> None:
    base = save_quantized(tmp_path / "base")

    convert(base, None, tmp_path / "out", Recipe(quant_type="none"))

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    ours = tensors_of(tmp_path / "out")
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            expected = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(ours[f"{name}.weight"], expected), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("kind", list(KINDS))
def test_by_default_the_output_is_in_what_the_base_is_in(kind: str, tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, kind)
    recipe = KINDS[kind][1]

    plan = plan_conversion(base, adapter).plan

    settings = (plan.recipe.quant_type, plan.recipe.double_quant, plan.recipe.block_size)
    assert settings == (recipe.quant_type, recipe.double_quant, recipe.block_size)
    assert {tensor.action for tensor in plan.tensors()} == {"copy", "quantize", "keep"}


@pytest.mark.parametrize("asked", [Recipe(block_size=128), Recipe(double_quant=False), Recipe(quant_type="nf4")])
def test_settings_that_are_asked_for_are_not_those_of_the_base(asked: Recipe, tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, "fp4")

    found = plan_conversion(base, adapter, recipe=asked).plan.recipe

    assert (found.quant_type, found.double_quant, found.block_size) == ("nf4", asked.double_quant, asked.block_size)


def test_other_settings_quantize_every_weight_again(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, "fp4")

    report = convert(base, adapter, tmp_path / "out", Recipe(quant_type="nf4"))

    states = [name for name in tensors_of(tmp_path / "out") if "quant_state" in name]
    assert states
    assert all(name.endswith("bitsandbytes__nf4") for name in states)
    assert any("all its weights are quantized again" in note for note in report.plan.notes)


def test_tiles_and_threads_change_no_byte(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path)
    one = Resources(threads=1, memory=None, tile_weights=(1, 4096))

    convert(base, adapter, tmp_path / "one", Recipe(), one)
    convert(base, adapter, tmp_path / "other", Recipe(), Resources(threads=2))

    assert {t.tiles for t in plan_conversion(base, adapter, None, Recipe(), one).plan.tensors()} != set()
    assert tensors_equal(tmp_path / "one", tmp_path / "other")


def tensors_equal(one: Path, other: Path) -> bool:
    return {k: v for k, v in contents(one).items() if k.endswith(".safetensors")} == {
        k: v for k, v in contents(other).items() if k.endswith(".safetensors")
    }


def test_without_kernels_the_bytes_are_the_same(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path)

    convert(base, adapter, tmp_path / "one", Recipe(), Resources(threads=1))
    convert(base, adapter, tmp_path / "other", Recipe(), Resources(threads=1, kernels=False))

    assert tensors_equal(tmp_path / "one", tmp_path / "other")


def test_verify_makes_the_output_again_from_the_quantized_base(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path)
    convert(base, adapter, tmp_path / "out", Recipe())

    found = verify(tmp_path / "out", base, adapter)

    assert found.problems == []
    assert found.recomputed > 0


def test_the_same_conversion_again_has_nothing_to_do(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path)
    convert(base, adapter, tmp_path / "out", Recipe())

    assert convert(base, adapter, tmp_path / "out", Recipe()).nothing_to_do


def test_a_conv1d_of_a_quantized_base_is_merged_the_right_way_round(tmp_path: Path) -> None:
    base = save_quantized(tmp_path / "base", "gpt2")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base-16", "gpt2", target_modules=["c_attn"])

    convert(base, adapter, tmp_path / "four", Recipe(merge_precision="reference"))
    convert(base, adapter, tmp_path / "sixteen", Recipe(quant_type="none"))

    expected, ours = merged_by_peft(base, adapter), tensors_of(tmp_path / "four")
    assert [name for name in ours if name in expected and not same_bytes(ours[name], expected[name])] == []
    assert tensors_of(tmp_path / "sixteen")["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)
    assert load(tmp_path / "sixteen") is not None

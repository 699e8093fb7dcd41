"""Equality with the usual flow, byte for byte, and that the result loads and says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from converter import Recipe, convert
from tests.architectures import save_tiny, save_tiny_adapter
from tests.models import ARCHITECTURES, load, save_adapter, save_base
from tests.reference import differences, logits, nf4, reference_flow, tensors_of

BF16 = torch.bfloat16
REFERENCE = Recipe(merge_precision="reference", dtype="bfloat16")


SOME = ("llama", "gpt2", "mixtral")
"""Linear layers, Conv1D and experts: the dtype of the base matters to none more than to the others."""
OTHER_DTYPES = [
    pytest.param(dtype, name, marks=() if name in SOME else pytest.mark.slow)
    for dtype in (torch.float32, torch.float16)
    for name in ARCHITECTURES
]


@pytest.mark.parametrize(("dtype", "name"), [*((BF16, name) for name in ARCHITECTURES), *OTHER_DTYPES], ids=str)
def test_the_output_equals_the_usual_flows_for_every_architecture_and_base_dtype(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name, dtype, sharded=dtype is BF16)
    adapter = save_adapter(tmp_path / "adapter", base, name)
    reference = reference_flow(base, adapter, tmp_path, nf4(), BF16)

    out = convert(base, adapter, tmp_path / "out", REFERENCE).out

    assert differences(out, reference) == []
    assert torch.equal(logits(out), logits(reference))


def test_what_stays_in_float32_is_merged_in_float32_as_peft_does_it(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "t5")  # whose `wo` stays in float32 in a float16 model
    adapter = save_tiny_adapter(tmp_path / "adapter", base, "t5")
    reference = reference_flow(base, adapter, tmp_path, nf4(bnb_4bit_compute_dtype=torch.float16), torch.float16)

    out = convert(base, adapter, tmp_path / "out", Recipe(merge_precision="reference", dtype="float16")).out

    assert differences(out, reference) == []
    assert any(tensor.dtype == torch.float32 for name, tensor in tensors_of(out).items() if name.endswith("wo.weight"))


@pytest.mark.parametrize(
    ("recipe", "quantization"),
    [
        ({"double_quant": False}, nf4(bnb_4bit_use_double_quant=False)),
        ({"quant_type": "fp4"}, nf4(bnb_4bit_quant_type="fp4")),
        ({"quant_type": "fp4", "double_quant": False}, nf4(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)),
        ({"quant_type": "int8"}, BitsAndBytesConfig(load_in_8bit=True)),
        ({"quant_type": "none"}, None),
    ],
    ids=["nf4 single", "fp4", "fp4 single", "int8", "none"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_the_output_equals_the_usual_flows_for_every_kind_of_quantization(
    name: str, recipe: dict[str, Any], quantization: BitsAndBytesConfig | None, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name)
    adapter = save_adapter(tmp_path / "adapter", base, name)
    reference = reference_flow(base, adapter, tmp_path, quantization, BF16)

    out = convert(base, adapter, tmp_path / "out", Recipe(merge_precision="reference", **recipe)).out

    assert differences(out, reference) == []
    assert torch.equal(logits(out), logits(reference))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 16}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
        {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
        {"target_modules": r".*\.layers\.1\..*_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm"], "target_modules": "all-linear"},
        {"target_modules": ["lm_head", "q_proj"]},
        {"r": 3, "lora_alpha": 7.5, "fan_in_fan_out": False},
    ],
    ids=str,
)
def test_the_output_equals_the_usual_flows_for_every_option_of_lora(settings: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    adapter = save_adapter(tmp_path / "adapter", base, "qwen2", **settings)
    reference = reference_flow(base, adapter, tmp_path, nf4(), BF16)

    out = convert(base, adapter, tmp_path / "out", REFERENCE).out

    assert differences(out, reference) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_in_sixteen_bits_give_what_the_usual_flow_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama", dtype)
    reference = reference_flow(base, adapter, tmp_path, nf4(), BF16)

    out = convert(base, adapter, tmp_path / "out", REFERENCE).out

    assert differences(out, reference) == []


def test_a_float16_recipe_gives_what_the_usual_flow_gives_in_float16(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float16)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    reference = reference_flow(base, adapter, tmp_path, nf4(bnb_4bit_compute_dtype=torch.float16), torch.float16)

    out = convert(base, adapter, tmp_path / "out", Recipe(merge_precision="reference")).out

    assert differences(out, reference) == []


def test_without_an_adapter_the_base_is_quantized_as_transformers_does_it(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", sharded=True)
    reference = reference_flow(base, None, tmp_path, nf4(), BF16)

    out = convert(base, None, tmp_path / "out").out

    assert differences(out, reference) == []


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_of_which_one_side_was_trained_is_untied_as_peft_does_it(module: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3")
    adapter = save_adapter(tmp_path / "adapter", base, "qwen3", modules_to_save=[module])
    reference = reference_flow(base, adapter, tmp_path, nf4(), BF16)

    out = convert(base, adapter, tmp_path / "out", REFERENCE).out

    assert differences(out, reference) == []
    assert load(out).config.tie_word_embeddings is False
    assert torch.equal(logits(out), logits(reference))


def test_lora_on_a_tied_head_leaves_the_embedding_alone_where_the_usual_flow_changes_both(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3")
    adapter = save_adapter(tmp_path / "adapter", base, "qwen3", target_modules=["lm_head"])

    out = convert(base, adapter, tmp_path / "out", Recipe(quant_type="none")).out

    from peft import PeftModel

    unmerged = PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter)
    prompt = torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = unmerged(input_ids=prompt).logits
        ours = load(out, dtype=torch.float32)(input_ids=prompt).logits
    assert torch.equal(tensors_of(out)["model.embed_tokens.weight"], tensors_of(base)["model.embed_tokens.weight"])
    # bfloat16 has eight bits of mantissa: the merged head differs from the exact one by as much.
    assert float((ours - expected).abs().max()) < 0.01 * float(expected.abs().max())


def test_the_default_precision_quantizes_the_float32_sum(tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    base = save_base(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    a, b = (
        tensors_of(adapter)[f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight"] for half in ("A", "B")
    )
    total = tensors_of(base)["model.layers.0.mlp.up_proj.weight"] + (b @ a) * 2.0

    out = convert(base, adapter, tmp_path / "out").out

    packed, state = quantize_4bit(total, blocksize=64, compress_statistics=True, quant_type="nf4")
    written = tensors_of(out)
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight"], packed)
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight.absmax"], state.absmax)
    assert load(out).model.layers[0].mlp.up_proj.weight.quant_state.dtype is BF16


def test_two_lines_load_what_was_written(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    out = convert(tiny_base, tiny_adapter, tmp_path / "out").out

    model = AutoModelForCausalLM.from_pretrained(out)

    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert model.model.layers[0].mlp.up_proj.weight.quant_type == "nf4"


def test_blocks_that_run_across_rows_equal_the_usual_flows(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", intermediate_size=100, hidden_size=40)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    reference = reference_flow(base, adapter, tmp_path, nf4(), BF16)

    out = convert(base, adapter, tmp_path / "out", REFERENCE).out

    assert differences(out, reference) == []

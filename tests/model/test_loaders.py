"""The rules of loaders that are not asked, on configs and tensors as we write them and as others do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from converter.model.answers import check_loaders, describe
from converter.model.version_4 import misread
from converter.plan.config import output_config
from converter.plan.rope import with_old_keys
from converter.recipe import Recipe
from tests.architectures import save_tiny
from tests.model.test_architecture import shapes_of
from tests.models import ARCHITECTURES, make_model

LAYER = "model.layers.0"
Checkpoint = tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]


def written(model: Any, recipe: Recipe = Recipe("nf4", dtype="bfloat16"), keep: tuple[str, ...] = ()) -> Checkpoint:
    """Config, shapes and quantized weights of what we make of a model, in one format."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return of(json.loads(model.config.to_json_string(use_diff=False)), shapes, recipe, keep)


def of(config: dict[str, Any], shapes: Any, recipe: Recipe, keep: tuple[str, ...] = ()) -> Checkpoint:
    library = "compressed-tensors" if recipe.quant_type == "w4a16" else "bitsandbytes"
    quantize = recipe.quant_type != "none"
    architecture = describe(config, shapes, quantize=quantize, dtype="bfloat16", keep=keep, library=library)
    quantized = {name for name, role in architecture.roles.items() if role.quantize}
    spelled, _ = with_old_keys(config)
    return output_config(spelled, recipe, architecture, vocabulary=None, untied=False), shapes, quantized


def saved(name: str, folder: Path) -> Any:
    """Config and shapes of a tiny model as transformers 5 saves it."""
    save_tiny(folder, name)
    return json.loads((folder / "config.json").read_text()), shapes_of(folder)


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "none", "w4a16"])
def test_a_plain_decoder_is_taken_by_every_loader_whose_rules_are_known(quant_type: Any) -> None:
    found = check_loaders(*written(make_model("llama"), Recipe(quant_type, dtype="bfloat16")))

    others = ["vLLM", "SGLang"] if quant_type == "w4a16" else ["transformers 4.57", "vLLM", "SGLang"]
    assert found == {loader: [] for loader in ("transformers 5", *others)}


def test_positions_that_version_4_would_not_find_are_said() -> None:
    config, shapes, quantized = written(make_model("llama"))
    del config["rope_theta"]

    found = check_loaders(config, shapes, quantized)

    assert found["transformers 4.57"] == ["config.json has its rope parameters in the words of transformers 5 only"]
    assert found["transformers 5"] == []


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("granitemoehybrid", "config.json names its kinds of layers in the words of transformers 5"),
        ("csm", "config.json says tie_word_embeddings, which it refuses for this model type"),
        ("dbrx", "attn_config in config.json has keys that it refuses"),
    ],
)
def test_what_transformers_5_saves_and_version_4_refuses_is_said_of_a_model_type(model_type: str, why: str) -> None:
    saved_by_5, _ = with_old_keys(json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False)))

    assert why in list(misread(saved_by_5))


def test_layers_that_were_named_by_version_4_are_read_by_it() -> None:
    assert list(misread({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]})) == []


def test_a_class_that_a_loader_lacks_is_said(tmp_path: Path) -> None:
    config, shapes = saved("t5", tmp_path)

    found = check_loaders(*of(config, shapes, Recipe("none", dtype="bfloat16")))

    assert found["transformers 4.57"] == []
    assert found["vLLM"] == ["version 0.32 has no T5ForConditionalGeneration of its own"]
    assert found["SGLang"] == ["version 0.5.23 has no T5ForConditionalGeneration"]


def test_gpt2_is_served_in_16_bits_and_not_in_4() -> None:
    sixteen, four = (check_loaders(*written(make_model("gpt2"), Recipe(kind, dtype="bfloat16")))
                     for kind in ("none", "nf4"))  # fmt: skip

    assert sixteen["vLLM"] == sixteen["SGLang"] == []
    assert four["vLLM"] == ["version 0.32 loads no bitsandbytes for GPT2LMHeadModel"]
    assert four["SGLang"] == ["version 0.5.23 loads no bitsandbytes for GPT2LMHeadModel"]
    assert four["transformers 4.57"] == []


def test_a_model_type_that_came_later_is_not_for_version_4() -> None:
    config, shapes, quantized = written(make_model("llama"))

    found = check_loaders(config | {"model_type": "ministral3"}, shapes, quantized)

    assert found["transformers 4.57"] == ["it has no model type ministral3"]


# Experts


def test_experts_in_16_bits_are_for_transformers_only(tmp_path: Path) -> None:
    found = check_loaders(*of(*saved("mixtral", tmp_path), Recipe("nf4", dtype="bfloat16")))

    expert = f"{LAYER}.block_sparse_moe.experts.0.w1"
    assert found["transformers 5"] == found["transformers 4.57"] == []
    assert found["vLLM"] == [f"{expert}: in 16 bits, it makes 4 bits of all experts (24 layers of experts)"]
    assert found["SGLang"] == ["version 0.5.23 loads no bitsandbytes for MixtralForCausalLM"]


def four_bit_experts(folder: Path, **changes: Any) -> Checkpoint:
    """A Mixtral as transformers 4.57 quantizes it: all but the head."""
    config, shapes = saved("mixtral", folder)
    config, shapes, _ = of(config, shapes, Recipe("nf4", dtype="bfloat16"))
    config["quantization_config"] |= {"llm_int8_skip_modules": ["lm_head"], **changes}
    ends = ("embed_tokens.weight", "lm_head.weight")
    return config, shapes, {name for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(ends)}


def test_what_version_4_made_of_experts_is_for_version_4_and_vllm(tmp_path: Path) -> None:
    config, shapes, quantized = four_bit_experts(tmp_path)

    found = check_loaders(config, shapes, quantized)

    assert found["transformers 4.57"] == []
    assert found["vLLM"] == []
    assert any(problem.endswith("quantized here, not by transformers") for problem in found["transformers 5"])


def test_experts_that_are_not_whole_blocks_are_not_for_vllm(tmp_path: Path) -> None:
    config, shapes, quantized = four_bit_experts(tmp_path)
    expert, linear = f"{LAYER}.block_sparse_moe.experts.0.w1", f"{LAYER}.self_attn.o_proj"

    found = check_loaders(config, shapes, quantized, {f"{expert}.weight", f"{linear}.weight"})

    joins = "its last block is not whole, it joins the scales of experts (1 layers of experts)"
    assert found["transformers 4.57"] == []
    assert found["vLLM"] == [f"{expert}: {joins}"]


def test_experts_in_fp4_would_be_read_as_nf4(tmp_path: Path) -> None:
    found = check_loaders(*four_bit_experts(tmp_path, bnb_4bit_quant_type="fp4"))

    assert found["vLLM"] == [f"{LAYER}.block_sparse_moe.experts.0.w1: it reads experts as NF4, whatever they are in"]


def test_experts_in_one_tensor_are_not_for_vllm_beside_bitsandbytes(tmp_path: Path) -> None:
    found = check_loaders(*of(*saved("granitemoe", tmp_path), Recipe("nf4", dtype="bfloat16")))

    tensor = f"{LAYER}.block_sparse_moe.input_linear.weight"
    assert found["vLLM"][0] == f"{tensor}: it takes a tensor for each expert, in NF4"
    assert found["transformers 4.57"] == []


def test_experts_that_were_saved_in_one_tensor_are_not_for_version_4() -> None:
    model = make_model("qwen2_moe")
    config = json.loads(model.config.to_json_string(use_diff=False))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    found = check_loaders(*of(config, shapes, Recipe("none", dtype="bfloat16")))

    assert found["transformers 4.57"][0] == f"{LAYER}.mlp.experts.gate_up_proj: it takes a tensor for each expert"
    assert found["vLLM"] == []


def test_a_gate_of_shared_experts_is_not_quantized_in_vllm(tmp_path: Path) -> None:
    found = check_loaders(*of(*saved("qwen2_moe", tmp_path), Recipe("nf4", dtype="bfloat16")))

    assert f"{LAYER}.mlp.shared_expert_gate: quantized, it takes it in 16 bits only" in found["vLLM"]


# The list of kept modules


@pytest.mark.parametrize(("keep", "others"), [("q_proj", "k_proj, v_proj"), ("up_proj", "gate_proj")])
def test_a_part_of_what_servers_fuse_is_not_kept_by_them(keep: str, others: str) -> None:
    found = check_loaders(*written(make_model("llama"), keep=(keep,)))

    assert found["transformers 5"] == found["transformers 4.57"] == []
    assert found["vLLM"][0].endswith(f".{keep}: in 16 bits, it is fused with {others} and taken for 4 bits")
    assert found["SGLang"][0].endswith(f".{keep}: in 16 bits, it is fused with {others} and taken for codes")


def test_a_layer_that_is_kept_whole_is_named_as_servers_name_it() -> None:
    config, shapes, quantized = written(make_model("llama"), keep=("*self_attn.*", "*layers.1.mlp*"))
    skip = config["quantization_config"]["llm_int8_skip_modules"]

    assert {f"{LAYER}.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"} <= set(skip)
    assert f"{LAYER}.mlp.gate_up_proj" not in skip
    assert all(problems == [] for problems in check_loaders(config, shapes, quantized).values())

    config["quantization_config"]["llm_int8_skip_modules"] = [name for name in skip if "qkv_proj" not in name]

    lacks = "in 16 bits, the list of kept modules lacks this name, so it is taken for 4 bits"
    assert check_loaders(config, shapes, quantized)["vLLM"][0] == f"{LAYER}.self_attn.qkv_proj: {lacks}"


QWEN_2_VL = {
    "text_config": {key: value for key, value in ARCHITECTURES["qwen2"][2].items() if "token_id" not in key}
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}},
    "vision_config": {"depth": 2, "hidden_size": 64, "embed_dim": 64, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2},
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253,
}  # fmt: skip


@pytest.mark.parametrize("on_the_hub", [True, False])
def test_the_list_has_the_spelling_of_each_server_for_models_with_images(on_the_hub: bool) -> None:
    config = CONFIG_MAPPING["qwen2_vl"](**QWEN_2_VL)
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if on_the_hub:
        shapes = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): shape
            for name, shape in shapes.items()
        }
    stated = json.loads(config.to_json_string(use_diff=False))

    output, _, quantized = of(stated, shapes, Recipe("nf4", dtype="bfloat16"), keep=("*visual*", "mlp.down_proj"))

    skip = set(output["quantization_config"]["llm_int8_skip_modules"])
    assert {"visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv_proj"} <= skip
    text = "layers.0.mlp.down_proj"
    assert {f"model.language_model.{text}", f"language_model.model.{text}", f"model.{text}"} <= skip
    found = check_loaders(output, shapes, quantized)
    assert found == {loader: [] for loader in ("transformers 5", "transformers 4.57", "vLLM", "SGLang")}


def test_a_quantized_head_is_for_no_server() -> None:
    config, shapes, quantized = written(make_model("llama"))

    found = check_loaders(config, shapes, quantized | {"lm_head.weight"})

    assert found["vLLM"] == found["SGLang"] == ["lm_head.weight: quantized, it takes no quantized head"]


def test_codes_in_another_dtype_are_for_no_server() -> None:
    config, shapes, quantized = written(make_model("llama"))
    config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16"

    found = check_loaders(config, shapes, quantized)

    assert found["vLLM"] == found["SGLang"] == ["its 4-bit codes are not stored in uint8"]


def test_a_quantized_layer_that_the_list_names_is_found() -> None:
    config, shapes, quantized = written(make_model("llama"))
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "o_proj"]

    found = check_loaders(config, shapes, quantized)

    assert found["vLLM"][0] == f"{LAYER}.self_attn.o_proj: quantized, but the list of kept modules names it"
    assert found["transformers 4.57"][0] == f"{LAYER}.self_attn.o_proj: quantized, it would keep it"


# compressed-tensors


def test_parts_of_a_fused_layer_must_be_in_one_scheme_for_both_servers() -> None:
    found = check_loaders(*written(make_model("llama"), Recipe("w4a16", dtype="bfloat16"), keep=("k_proj",)))

    said = f"{LAYER}.self_attn: q_proj, k_proj, v_proj are quantized in part, it fuses them"
    assert found["vLLM"][0] == found["SGLang"][0] == said.replace("q_proj, k_proj", "k_proj, q_proj")


def test_experts_that_are_quantized_one_by_one_are_taken(tmp_path: Path) -> None:
    found = check_loaders(*of(*saved("qwen3_moe", tmp_path), Recipe("w4a16", dtype="bfloat16")))

    assert found == {"transformers 5": [], "vLLM": [], "SGLang": []}


def test_experts_in_one_tensor_would_be_taken_for_codes(tmp_path: Path) -> None:
    found = check_loaders(*of(*saved("granitemoe", tmp_path), Recipe("w4a16", dtype="bfloat16")))

    tensor = f"{LAYER}.block_sparse_moe.input_linear.weight"
    assert found["vLLM"][0] == f"{tensor}: in 16 bits, it expects experts to be quantized"

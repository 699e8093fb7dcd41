"""The config.json of an output: the base's own, with only what must change, and in words that each version reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, BitsAndBytesConfig

from converter.errors import Unsupported
from converter.model.architecture import Architecture
from converter.model.ask import reads_alike
from converter.model.version_4 import misread
from converter.plan.config import config_of, output_config
from converter.plan.rope import in_words_of_all_versions, with_old_keys
from converter.quantize.bnb import quantization_config
from converter.read.checkpoint import Checkpoint
from converter.recipe import Recipe
from tests.folders import MemoryFolder, shard_bytes
from tests.models import SMALL

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 12_345.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "gemma3": ("gemma3_text", {"head_dim": 16}),
    "gemma3 scaled": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9_999.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox_japanese": (
        "gpt_neox_japanese",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}},
    ),
    "gpt_oss": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}}),
    "qwen2_vl": ("qwen2_vl_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
    "qwen3_vl": ("qwen3_vl_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.75}}),
    "phi3 long": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


def edited(config: dict[str, Any], skip: tuple[str, ...] | None = None, **changes: Any) -> dict[str, Any]:
    """An output's config."""
    settings: dict[str, Any] = {"vocabulary": None, "untied": False, **changes}
    recipe = settings.pop("recipe", Recipe("nf4", dtype="bfloat16"))
    return output_config(with_old_keys(config)[0], recipe, Architecture("X", {}, skip), **settings)


@pytest.mark.parametrize("name", ROPES)
def test_transformers_reads_the_same_positions_from_the_output_as_from_the_base(name: str, tmp_path: Path) -> None:
    model_type, settings = ROPES[name]
    CONFIG_MAPPING[model_type](**{**SMALL, **settings}).save_pretrained(tmp_path / "base")
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "out").mkdir()

    (tmp_path / "out" / "config.json").write_text(json.dumps(edited(base)))

    read = [AutoConfig.from_pretrained(tmp_path / folder) for folder in ("base", "out")]
    assert read[0].rope_parameters
    assert {key: read[1].rope_parameters[key] for key in read[0].rope_parameters} == read[0].rope_parameters


@pytest.mark.parametrize(
    ("rope", "model_type", "old"),
    [
        ({"rope_type": "default", "rope_theta": 5.0}, "llama", {"rope_theta": 5.0}),
        (
            LLAMA3,
            "llama",
            {"rope_theta": 500_000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "gemma3_text",
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5},
            "gpt_neox",
            {"rope_theta": 9.0, "partial_rotary_factor": 0.5, "rotary_emb_base": 9.0, "rotary_pct": 0.5},
        ),
    ],
    ids=["default", "llama3", "gemma3", "gpt_neox"],
)
def test_positions_are_given_in_version_4s_spelling_too(rope: Any, model_type: str, old: dict[str, Any]) -> None:
    base = {"model_type": model_type, "rope_parameters": rope}

    config = edited(base)

    assert {key: config[key] for key in old} == old
    assert config["rope_parameters"] == rope
    assert set(config) == {*base, *old, "dtype", "torch_dtype", "quantization_config"}


@pytest.mark.parametrize("old", [{"rope_theta": 5.0, "rope_scaling": None}, {"rope_theta": 5.0}])
def test_a_config_in_version_4s_spelling_stays_in_it(old: dict[str, Any]) -> None:
    config = edited({"model_type": "llama", **old})

    assert set(config) == {"model_type", *old, "dtype", "torch_dtype", "quantization_config"}


def test_everything_else_stays_as_it_is() -> None:
    base = {
        "model_type": "own",
        "b": [1, {"c": None}],
        "a": 1e-05,
        "transformers_version": "4.1",
        "auto_map": {"x": "y"},
    }

    config = edited(base)

    assert {key: config[key] for key in base} == base
    assert list(config)[: len(base)] == list(base)


def test_the_bases_config_is_not_changed() -> None:
    base = {"model_type": "gemma3", "text_config": {"dtype": "float32", "vocab_size": 3, "rope_parameters": LLAMA3}}
    before = copy.deepcopy(base)

    edited(base, vocabulary=7, untied=True)

    assert base == before


@pytest.mark.parametrize("spelled", [{"dtype": "float32"}, {"torch_dtype": "float32"}, {}])
def test_the_dtype_is_given_in_both_spellings(spelled: dict[str, str]) -> None:
    config = edited({"model_type": "llama", **spelled}, recipe=Recipe("nf4", dtype="float16"))

    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")


def test_the_text_part_of_a_config_gets_what_it_has_already() -> None:
    text = {"torch_dtype": "float32", "vocab_size": 256, "tie_word_embeddings": True}

    config = edited({"model_type": "x", "text_config": text}, vocabulary=260, untied=True)

    assert config["text_config"] == {
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "vocab_size": 260,
        "tie_word_embeddings": False,
    }
    assert config["tie_word_embeddings"] is False
    assert "vocab_size" not in config


def test_a_text_part_without_dtype_or_vocabulary_gets_none() -> None:
    config = edited({"model_type": "x", "text_config": {"a": 1}, "vocab_size": 3}, vocabulary=4, untied=True)

    assert config["text_config"] == {"a": 1}
    assert config["vocab_size"] == 4


def test_tying_and_vocabulary_stay_where_the_adapter_leaves_them() -> None:
    config = edited({"model_type": "llama", "vocab_size": 3, "tie_word_embeddings": True})

    assert (config["vocab_size"], config["tie_word_embeddings"]) == (3, True)


def test_a_model_in_sixteen_bits_has_no_quantization_config() -> None:
    assert "quantization_config" not in edited({"model_type": "llama"}, recipe=Recipe("none", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe("nf4"), {"load_in_4bit": True}),
        (Recipe("fp4", double_quant=False), {"load_in_4bit": True}),
        (Recipe("int8"), {"load_in_8bit": True}),
    ],
    ids=["nf4", "fp4", "int8"],
)
@pytest.mark.parametrize("skip", [None, ("lm_head", "a.b")])
def test_the_quantization_config_says_what_transformers_own_would_say(
    skip: tuple[str, ...] | None, recipe: Recipe, expected: dict[str, bool]
) -> None:
    names = None if skip is None else list(skip)
    options: dict[str, Any] = {**expected, "llm_int8_skip_modules": names}
    if recipe.four_bit:
        options["bnb_4bit_quant_type"] = recipe.quant_type
        options["bnb_4bit_use_double_quant"] = recipe.double_quant
        options["bnb_4bit_compute_dtype"] = torch.bfloat16
    theirs = BitsAndBytesConfig(**options).to_dict()

    ours = quantization_config(recipe.resolved("BF16"), skip)

    assert ours == {key: theirs[key] for key in ours}
    assert BitsAndBytesConfig.from_dict(dict(ours)).to_dict() == theirs


# Rope by layer type


FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR, PLAIN = {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}, {"rope_type": "default", "rope_theta": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("model_type", "full", "sliding", "old"),
    [
        ("gemma3n_text", PLAIN, {**PLAIN, "rope_theta": 5.0}, {"rope_theta": 3.0, "rope_local_base_freq": 5.0}),
        ("modernbert", PLAIN, {**PLAIN, "rope_theta": 5.0}, {"global_rope_theta": 3.0, "local_rope_theta": 5.0}),
        (
            "modernbert",
            LINEAR,
            {**LINEAR, "rope_theta": 5.0},
            {
                "global_rope_theta": 7.0,
                "local_rope_theta": 5.0,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
        ),
        (
            "olmo3",
            LINEAR,
            {**PLAIN, "rope_theta": 7.0},
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ("exaone4", LINEAR, LINEAR, {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameters_by_layer_type_get_the_old_keys_of_their_family(
    model_type: str, full: dict[str, Any], sliding: dict[str, Any], old: dict[str, Any]
) -> None:
    base = {"model_type": model_type, "rope_parameters": {FULL: full, SLIDING: sliding}}

    spelled, complete = with_old_keys(base)

    assert complete
    assert spelled == {**base, **old}


@pytest.mark.parametrize(
    ("model_type", "full", "sliding"),
    [
        ("gemma3_text", LINEAR, LINEAR),
        ("modernbert", YARN, PLAIN),
        ("olmo3", LINEAR, PLAIN),
        ("gemma4_text", {**PLAIN, "rope_type": "proportional"}, PLAIN),
        ("llama", LINEAR, PLAIN),
    ],
)
def test_what_version_4_has_no_words_for_gets_none(
    model_type: str, full: dict[str, Any], sliding: dict[str, Any]
) -> None:
    base = {"model_type": model_type, "rope_parameters": {FULL: full, SLIDING: sliding}}

    spelled, complete = with_old_keys(base)

    assert not complete
    assert spelled == base


def test_the_language_model_of_a_config_gets_the_keys_of_its_own_family() -> None:
    text = {"model_type": "gemma3_text", "rope_parameters": {FULL: PLAIN, SLIDING: {**PLAIN, "rope_theta": 5.0}}}

    spelled, complete = with_old_keys({"model_type": "gemma3", "text_config": text})

    assert complete
    assert spelled["text_config"] == {**text, "rope_theta": 3.0, "rope_local_base_freq": 5.0}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 3.0,
    "short_factor": [1.0],
    "long_factor": [2.0],
    "original_max_position_embeddings": 32,
}


# `make loaders` compares what both versions compute from such configs.
@pytest.mark.parametrize(
    ("model_type", "rope", "scaling"),
    [
        ("mllama_text_model", PLAIN, {"rope_type": "default"}),
        ("qwen3_vl_text", PLAIN, {"rope_type": "default"}),
        ("qwen3_vl_text", {**PLAIN, "mrope_section": [2, 3, 3]}, {"rope_type": "default", "mrope_section": [2, 3, 3]}),
        ("gpt_oss", PLAIN, {"rope_type": "default"}),
        ("apertus", PLAIN, {"rope_type": "default"}),
        ("qwen2_vl_text", PLAIN, {"rope_type": "default", "mrope_section": [16, 24, 24]}),
        (
            "qwen2_5_vl_text",
            {**PLAIN, "mrope_section": [2, 3, 3]},
            {"rope_type": "default", "mrope_section": [2, 3, 3]},
        ),
        ("glm4v_text", LINEAR, {"rope_type": "linear", "factor": 4.0, "mrope_section": [8, 12, 12]}),
        ("phi3", LONGROPE, {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        ("phimoe", LONGROPE, {"type": "longrope"} | {k: v for k, v in LONGROPE.items() if k != "rope_theta"}),
        ("olmo2", LINEAR, {"type": "linear", "factor": 4.0}),
        ("olmoe", LINEAR, {"rope_type": "linear", "factor": 4.0}),
        ("chameleon", {**LINEAR, "rope_type": "dynamic"}, {"type": "dynamic", "factor": 4.0}),
        ("llama4_text", LLAMA3, {key: value for key, value in LLAMA3.items() if key != "rope_theta"}),
        ("llama", PLAIN, None),
    ],
)
def test_each_family_gets_the_scaling_that_version_4_understands(
    model_type: str, rope: dict[str, Any], scaling: Any
) -> None:
    base = {"model_type": model_type, "rope_parameters": rope}

    spelled, complete = with_old_keys(base)

    assert complete
    assert spelled.get("rope_scaling") == scaling
    assert spelled["rope_theta"] == rope["rope_theta"]
    assert list(misread(base)) == ["config.json has its rope parameters in the words of transformers 5 only"]
    assert list(misread(spelled)) == []


@pytest.mark.parametrize(
    ("model_type", "rope"), [("nemotron", LINEAR), ("llama4_text", YARN), ("olmo", YARN), ("chameleon", LLAMA3)]
)
def test_a_scaling_that_version_4_lacks_in_a_family_is_left_out_and_said(model_type: str, rope: dict[str, Any]) -> None:
    base = {"model_type": "whole", "text_config": {"model_type": model_type, "rope_parameters": rope}}

    spelled, complete = with_old_keys(base)

    assert (spelled, complete) == (base, False)
    assert list(misread(spelled)) == ["config.json has its rope parameters in the words of transformers 5 only"]


def test_the_length_that_longrope_starts_from_is_given_where_version_4_looks_for_it() -> None:
    spelled, _ = with_old_keys({"model_type": "llama", "max_position_embeddings": 128, "rope_parameters": LONGROPE})

    assert spelled["original_max_position_embeddings"] == 32


def test_parts_within_parts_are_spelled_too() -> None:
    def config(text: dict[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "qwen2_5_omni",
            "thinker_config": {"model_type": "qwen2_5_omni_thinker", "text_config": text},
        }

    text = {"model_type": "qwen2_5_omni_text", "rope_parameters": PLAIN}

    spelled, _ = with_old_keys(config(text))

    scaling = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    assert spelled == config({**text, "rope_theta": 3.0, "rope_scaling": scaling})


def test_the_number_of_qwen3s_experts_is_given_to_version_4_too() -> None:
    config = {"model_type": "qwen3_moe", "num_local_experts": 4, "rope_parameters": {"rope_theta": 1e4}}

    spelled, complete = with_old_keys(config)

    assert (spelled["num_experts"], spelled["num_local_experts"], complete) == (4, 4, True)
    assert "num_experts" not in with_old_keys(config | {"model_type": "mixtral"})[0]


def test_a_second_spelling_that_transformers_reads_otherwise_is_left_out_and_said() -> None:
    # Version 5's Gemma 3 takes a rope_scaling that stands there already for that of its full attention.
    base = {
        **SMALL,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "layer_types": [SLIDING, FULL],
        "rope_parameters": {FULL: {**PLAIN, "rope_type": "default"}, SLIDING: PLAIN},
    }
    assert in_words_of_all_versions(base, known=True) == ({**base, "rope_theta": 3.0, "rope_local_base_freq": 3.0}, [])

    scaled = {**base, "rope_parameters": {FULL: LINEAR, SLIDING: LINEAR}}

    same, notes = in_words_of_all_versions(scaled, known=True)

    assert same == scaled
    assert notes == ["config.json has its rope parameters in the words of transformers 5: earlier versions miss them"]


def test_transformers_says_whether_it_reads_two_configs_alike() -> None:
    base = {**SMALL, "model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}

    assert reads_alike(base, {**base, "rope_theta": 5.0, "something_else": 1})
    assert not reads_alike(base, {**base, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert not reads_alike(base, {**base, "hidden_size": 128})


# A quantization that is left over


def base_of(config: dict[str, Any], **dtypes: str) -> Checkpoint:
    """A base of one element a tensor: name → dtype, with __ for dots."""
    sizes = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "BOOL": 1}
    header, end = {}, 0
    for name, dtype in (dtypes or {"a__weight": "BF16"}).items():
        span = [end, end + sizes[dtype]]
        header[name.replace("__", ".")] = {"dtype": dtype, "shape": [1], "data_offsets": span}
        end = span[1]
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": shard_bytes(header, bytes(end))}
    return Checkpoint(MemoryFolder(files, "BASE"))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_4bit": True}}, "None"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": FP8}}, "fp8"),
        ({"quantization_config": "strange"}, "None"),
    ],
    ids=str,
)
def test_a_quantization_that_no_tensor_has_is_left_out_and_said(config: dict[str, Any], method: str) -> None:
    base = base_of({"model_type": "llama", **config}, a__weight="BF16", b__bias="F32", mask="BOOL", positions="I64")

    found, notes = config_of(base, trust_remote_code=False)

    assert notes == [f"config.json says that the base is quantized ({method}), but no tensor is: left out"]
    assert "quantization_config" not in json.dumps(found)
    assert "compression_config" not in found
    assert found["model_type"] == "llama"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a__weight", "F8_E4M3"),
        ("a__weight", "U8"),
        ("a__weight", "I8"),
        ("a__qweight", "I32"),
        ("a__weight_packed", "I32"),
        ("a__weight_scale_inv", "F32"),
        ("a__weight_scale", "BF16"),
        ("a__SCB", "F32"),
        ("a__weight__absmax", "F32"),
    ],
)
def test_a_base_that_is_quantized_is_refused_with_the_tensor_that_shows_it(name: str, dtype: str) -> None:
    base = base_of({"quantization_config": FP8}, b__weight="BF16", **{name: dtype})

    with pytest.raises(Unsupported) as caught:
        config_of(base, trust_remote_code=True)

    assert str(caught.value) == (
        f"BASE: the base is quantized already (fp8; see {name.replace('__', '.')}); give the 16-bit model that it was "
        "made from"
    )


@pytest.mark.parametrize("value", [None, {}, False])
def test_an_empty_quantization_config_says_nothing(value: object) -> None:
    found, notes = config_of(base_of({"quantization_config": value, "text_config": None}), trust_remote_code=False)

    assert notes == []
    assert "quantization_config" not in found


def test_a_base_that_names_code_of_its_own_is_refused_unless_allowed() -> None:
    base = base_of({"auto_map": {"AutoConfig": "configuration.Config"}})

    assert config_of(base, trust_remote_code=True) == (base.config, [])
    with pytest.raises(Unsupported) as caught:
        config_of(base, trust_remote_code=False)

    assert str(caught.value) == (
        "BASE: config.json names Python code of the base (auto_map); with `trust_remote_code` its files are copied, "
        "and still never run"
    )


@pytest.mark.parametrize("text", ["strange", 7, ["x"]])
def test_a_text_config_that_is_no_mapping_is_not_looked_into(text: object) -> None:
    base = base_of({"text_config": text})

    assert config_of(base, trust_remote_code=False) == (base.config, [])

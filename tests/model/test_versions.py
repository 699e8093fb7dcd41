"""What we rely on in transformers, PEFT and bitsandbytes: the name of a test that fails says what has changed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.utils import unpack_tensor_to_dict
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from converter.merge.options import UNDERSTOOD
from converter.recipe import BLOCK_SIZES
from tests.models import make_model

REFUSED_OPTIONS = """
    megatron_config alora_invocation_tokens use_qalora layer_replication arrow_config
"""
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# transformers


def test_transformers_get_modules_to_not_convert_takes_model_skips_and_float32_modules() -> None:
    assert parameters_of(HfQuantizer.get_modules_to_not_convert)[:3] == [
        "model",
        "skip_modules",
        "keep_in_fp32_modules",
    ]


def test_transformers_keeps_the_head_by_default_and_only_the_listed_modules_else() -> None:
    model = make_model("llama")

    found = [sorted(HfQuantizer.get_modules_to_not_convert(model, skip, None)) for skip in (None, [], ["a"])]

    assert found == [["lm_head"], [], ["a"]]


def test_transformers_adds_float32_modules_to_the_kept_ones() -> None:
    model = make_model("llama")

    assert sorted(HfQuantizer.get_modules_to_not_convert(model, ["a"], ["wo"])) == ["a", "wo"]


@pytest.mark.parametrize(
    ("module", "pattern", "converted"),
    [
        ("model.layers.1.mlp", "model.layers.1.mlp", False),
        ("model.layers.1.mlp.up", "model.layers.1", False),
        ("model.layers.11.mlp.up", "model.layers.1", True),
        ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate", True),
        ("model.decoder.fc1", "fc1", False),
        ("model.decoder.xfc1", "fc1", False),
        ("model.layers.1.mlp.up", "mlp", True),
    ],
)
def test_transformers_should_convert_module_reads_a_kept_module_as_a_beginning_or_an_end(
    module: str, pattern: str, converted: bool
) -> None:
    assert should_convert_module(module, [pattern]) is converted


def test_transformers_replace_with_bnb_linear_replaces_linear_itself_and_not_what_derives_from_it() -> None:
    class Derived(nn.Linear):
        pass

    with torch.device("meta"):
        model = nn.ModuleDict({"plain": nn.Linear(64, 64), "derived": Derived(64, 64), "kept": nn.Linear(64, 64)})

    replaced = replace_with_bnb_linear(model, ["kept"], BitsAndBytesConfig(load_in_4bit=True), pre_quantized=True)

    assert {name: type(module).__name__ for name, module in replaced.items()} == {
        "plain": "Linear4bit",
        "derived": "Derived",
        "kept": "Linear",
    }


def test_transformers_rename_source_key_takes_renamings_converters_prefix_and_state() -> None:
    names = parameters_of(rename_source_key)[:5]

    assert names == ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]


def test_transformers_rename_source_key_gives_the_parameter_and_the_converter() -> None:
    model = make_model("mixtral")
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    found = [
        rename_source_key(name, renamings, converters, model.base_model_prefix, model.state_dict())
        for name in ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "layers.0.self_attn.q_proj.weight")
    ]

    assert found[0][0] == "model.layers.0.mlp.experts.gate_up_proj"
    assert found[0][1] is not None
    assert found[1] == ("model.layers.0.self_attn.q_proj.weight", None)


def test_transformers_renames_the_head_of_gpt_neox() -> None:
    model = make_model("gpt_neox")
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]

    renamed, _ = rename_source_key("embed_out.weight", renamings, [], model.base_model_prefix, model.state_dict())

    assert renamed == "lm_head.weight"


def test_transformers_dot_natural_key_orders_layers_by_number() -> None:
    assert sorted(["a.10.b", "a.9.b"], key=dot_natural_key) == ["a.9.b", "a.10.b"]


def test_transformers_dtype_plan_names_what_stays_in_float32() -> None:
    model = make_model("llama")
    model._keep_in_fp32_modules_strict = {"q_proj"}
    plan = model._get_dtype_plan(torch.bfloat16)

    pattern = build_glob_alternation(list(plan))[0]

    assert pattern.search("model.layers.0.self_attn.q_proj.weight") is not None
    assert pattern.search("model.layers.0.self_attn.k_proj.weight") is None


def test_transformers_all_tied_weights_keys_map_the_shared_to_the_shown() -> None:
    assert make_model("qwen3").all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_transformers_knows_the_usual_class_of_a_model_type() -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM"


# PEFT


def test_peft_lora_config_has_no_option_that_was_never_judged() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    judged = set(REFUSED_OPTIONS.split()) | set(UNDERSTOOD)

    assert sorted(fields - judged) == []
    assert len(fields) == 42


def test_peft_still_has_the_options_that_we_refuse_or_read() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}

    gone = (set(REFUSED_OPTIONS.split()) | set(UNDERSTOOD)) - fields

    # Unsloth's own, about stacked experts; and what PEFT had before 0.4.
    assert sorted(gone) == ["lora_B_layout", "merge_weights"]


def test_no_option_is_both_refused_and_understood() -> None:
    assert set(REFUSED_OPTIONS.split()) & set(UNDERSTOOD) == set()


def test_peft_linear_get_delta_weight_is_the_product_and_then_the_scaling() -> None:
    torch.manual_seed(0)
    wrapped: Any = get_peft_model(
        nn.Sequential(nn.Linear(33, 70)), LoraConfig(r=3, lora_alpha=7, target_modules=["0"], init_lora_weights=False)
    ).base_model.model[0]  # type: ignore[arg-type]
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight

    delta = wrapped.get_delta_weight("default")

    assert torch.equal(delta, (b @ a) * (7 / 3))


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 7 / 3), (True, 7 / math.sqrt(3))])
def test_peft_scaling_is_alpha_over_rank_or_over_its_root(use_rslora: bool, scaling: float) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_rslora=use_rslora)

    wrapped: Any = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model[0]  # type: ignore[arg-type]

    assert wrapped.scaling["default"] == scaling


def test_peft_adapters_of_a_sixteen_bit_model_are_float32() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))

    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["0"])).base_model.model[0]  # type: ignore[arg-type]

    assert wrapped.lora_A["default"].weight.dtype == torch.float32


def test_peft_get_pattern_key_takes_the_first_pattern_at_the_end_of_a_path() -> None:
    patterns = ["up", "layers.1.q", "q", "^model.v"]

    found = [get_pattern_key(patterns, name) for name in ("layers.1.q", "layers.2.q", "xq", "model.v", "a.model.v")]

    assert found == ["layers.1.q", "q", "xq", "^model.v", "a.model.v"]


def test_peft_check_target_module_exists_takes_a_config_and_a_path() -> None:
    assert parameters_of(check_target_module_exists) == ["config", "key"]


# bitsandbytes


def test_bitsandbytes_nf4_codes_are_the_sixteen_known_values() -> None:
    code = functional.get_4bit_type("nf4", device="cpu")

    assert code.tolist() == NF4


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_quant_state_as_dict_has_the_known_keys_in_the_known_order(double: bool) -> None:
    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64).bfloat16()
    _, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")

    nested = ["nested_absmax", "nested_quant_map"] if double else []
    packed = state.as_dict(packed=True)

    assert list(packed) == ["absmax", "quant_map", *nested, "quant_state.bitsandbytes__nf4"]
    assert {key: value.dtype for key, value in packed.items() if key != "quant_map"} == {
        "absmax": torch.uint8 if double else torch.float32,
        **dict.fromkeys(nested, torch.float32),
        "quant_state.bitsandbytes__nf4": torch.uint8,
    }


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_packed_quant_state_is_the_known_json(double: bool) -> None:
    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64).bfloat16()
    _, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    packed = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]

    text = bytes(packed.tolist()).decode()

    expected = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    if double:
        expected |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": state.offset.item()}
    assert text == json.dumps(expected)
    assert list(json.loads(text)) == list(expected)
    assert unpack_tensor_to_dict(packed) == expected


@pytest.mark.parametrize("block_size", [16, *BLOCK_SIZES, 8192, 48])
def test_bitsandbytes_quantize_4bit_accepts_the_known_block_sizes_only(block_size: int) -> None:
    accepted = True
    try:
        functional.quantize_4bit(torch.ones(8192), blocksize=block_size, quant_type="nf4")
    except (ValueError, RuntimeError, AssertionError):
        accepted = False

    assert accepted == (block_size in BLOCK_SIZES)


def test_bitsandbytes_packs_the_first_of_two_values_into_the_high_half() -> None:
    packed, state = functional.quantize_4bit(torch.tensor([1.0, -1.0] * 32), blocksize=64, quant_type="nf4")

    assert set(packed.flatten().tolist()) == {0xF0}
    assert state.absmax.tolist() == [1.0]


def test_huggingface_hub_makes_its_clients_by_a_factory_that_can_be_had_and_set() -> None:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    made: list[Any] = []
    try:
        set_client_factory(lambda: made.append(before()) or made[-1])
        assert _http.get_session() is made[0]
    finally:
        set_client_factory(before)

    assert set(made[0].event_hooks) >= {"request", "response"}


def test_what_was_read_of_an_answer_is_kept_where_its_client_looks_for_it() -> None:
    from huggingface_hub.errors import HfHubHTTPError

    client = inspect.getmodule(HfHubHTTPError.__bases__[0])
    assert client is not None
    httpx = __import__(client.__name__.partition(".")[0])
    answer = httpx.Response(200, stream=httpx.ByteStream(b"much"))

    answer._content = b"cut"

    assert (answer.content, answer.read()) == (b"cut", b"cut")

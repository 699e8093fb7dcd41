"""Which layers a config of compressed-tensors means: held to compressed-tensors itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.utils.match import match_named_modules
from transformers import PreTrainedModel

from converter.errors import BadCheckpoint
from converter.model.answers import check_output, describe
from converter.model.linear_layers import modules_to_ignore, tensors_expected
from converter.model.meta_model import Names, meta_model
from tests.models import ARCHITECTURES, make_model


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    return config


def described(name: str) -> tuple[PreTrainedModel, Names]:
    """The model of an architecture, and the names of what it saves."""
    model = make_model(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    built = meta_model(config_of(model), shapes, "bfloat16")
    assert built is not None
    return built, Names(built, shapes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_layers_that_loading_expects_are_those_that_the_library_matches(name: str) -> None:
    model, names = described(name)
    for ignored in ([], ["lm_head"], ["re:.*mlp.*", "lm_head"], ["re:lm_.*", "model.layers.0.self_attn.q_proj"]):
        theirs = {module for module, _ in match_named_modules(model, ["Linear"], ignored)}

        ours = tensors_expected(model, names, ignored)

        assert {names.tensor_of[f"{module}.weight"] for module in theirs} == ours


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ignored_layers_are_those_that_the_library_lists(name: str) -> None:
    model, names = described(name)
    linear = [module for module, layer in model.named_modules() if type(layer) is torch.nn.Linear]
    quantized = set(linear[::2])
    for module in quantized:
        layer = model.get_submodule(module)
        layer.quantization_scheme = preset_name_to_scheme("W4A16", ["Linear"])
        layer.quantization_status = QuantizationStatus.COMPRESSED

    ours = modules_to_ignore(model, names, quantized)

    theirs = QuantizationConfig.from_pretrained(model)
    assert (theirs.ignore if theirs is not None else list(ours)) == list(ours)


def test_gates_with_one_output_and_the_head_are_kept_and_experts_are_not() -> None:
    model = make_model("qwen2_moe")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if ".experts." not in key}
    experts = [f"model.layers.{n}.mlp.experts.{e}" for n in range(2) for e in range(4)]
    shapes |= {f"{expert}.{part}_proj.weight": (64, 64) for expert in experts for part in ("gate", "up", "down")}

    found = describe(config_of(model), shapes, quantize=True, dtype="bfloat16", library="compressed-tensors")

    quantized = {name for name, role in found.roles.items() if role.quantize}
    assert {f"{expert}.up_proj.weight" for expert in experts} <= quantized
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in quantized
    assert found.skip_modules == (
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.shared_expert_gate",
        "lm_head",
    )
    assert not quantized & {f"{module}.weight" for module in found.skip_modules}


@pytest.mark.parametrize(
    ("ignored", "message"), [(5, "is not a list of names"), (["re:("], "can't be understood"), ([1], "not a list")]
)
def test_a_list_of_ignored_layers_that_cannot_be_understood_is_refused(ignored: object, message: str) -> None:
    model = make_model("llama")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    config = config_of(model) | {"quantization_config": {"quant_method": "compressed-tensors", "ignore": ignored}}

    with pytest.raises(BadCheckpoint, match=message):
        check_output(config, shapes, [])

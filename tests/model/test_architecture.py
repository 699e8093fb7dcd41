"""What transformers makes of a checkpoint, asked of a model without weights, against what it really does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import CONFIG_MAPPING, BitsAndBytesConfig

from converter.errors import BadCheckpoint, BadRecipe, ConversionRefused, Unsupported
from converter.model.answers import check_output, describe
from converter.model.architecture import Architecture
from converter.model.meta_model import class_of, meta_model
from converter.plan.config import output_config
from converter.recipe import Recipe
from tests.models import ARCHITECTURES, SMALL, make_model

MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": ("falcon", "FalconForCausalLM", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "bloom": ("bloom", "BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}),
    "bert classifier": ("bert", "BertForSequenceClassification", SMALL),
    "llama classifier": ("llama", "LlamaForSequenceClassification", {**SMALL, "pad_token_id": 0}),
    "t5": (
        "t5",
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 256},
    ),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM", {**SMALL, "num_local_experts": 4, "head_dim": 16}),
}
EVERY = [*ARCHITECTURES, *MORE]


@dataclass(frozen=True)
class Base:
    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def describe(self, **changes: Any) -> Architecture:
        settings: dict[str, Any] = {"quantize": True, "dtype": "bfloat16", **changes}
        return describe(self.config, self.shapes, **settings)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Saved models by name, each made once."""
    made: dict[str, Base] = {}

    def give(name: str) -> Base:
        if name not in made:
            folder = tmp_path_factory.mktemp("architecture") / "base"
            saved(name).to(torch.bfloat16).save_pretrained(folder)
            made[name] = Base(folder, json.loads((folder / "config.json").read_text()), shapes_of(folder))
        return made[name]

    return give


def saved(name: str) -> Any:
    if name in ARCHITECTURES:
        return make_model(name)
    model_type, class_name, settings = MORE[name]
    config = CONFIG_MAPPING[model_type](**settings)
    config.architectures = [class_name]
    return getattr(transformers, class_name)(config)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def loaded(base: Base, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    model_class = getattr(transformers, base.config["architectures"][0])
    return model_class.from_pretrained(base.folder, dtype=dtype, **settings)


def modules_loaded_as_four_bits(base: Base, skip: list[str] | None) -> set[str]:
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    model = loaded(base, quantization_config=quantization)
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def quantized(architecture: Architecture) -> set[str]:
    """Checkpoint names of the weights that are quantized."""
    return {name for name, role in architecture.roles.items() if role.quantize}


def modules_of(architecture: Architecture) -> set[str]:
    """The same as modules, by transformers' names."""
    return {str(architecture.roles[name].parameter).removesuffix(".weight") for name in quantized(architecture)}


def written(base: Base, architecture: Architecture) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]:
    """Config, shapes and quantized weights of an output, as `check_output` takes them."""
    config = output_config(
        base.config, Recipe(quant_type="nf4", dtype="bfloat16"), architecture, vocabulary=None, untied=False
    )
    turned = {name for name in quantized(architecture) if architecture.roles[name].kind == "conv1d"}
    shapes = {name: shape[::-1] if name in turned else shape for name, shape in base.shapes.items()}
    return config, shapes, quantized(architecture)


# What is quantized


@pytest.mark.parametrize("name", EVERY)
def test_the_weights_to_quantize_are_those_that_transformers_quantizes(name: str, bases: Any) -> None:
    base = bases(name)

    architecture = base.describe()

    assert modules_of(architecture) == modules_loaded_as_four_bits(base, None)


@pytest.mark.parametrize("name", EVERY)
def test_the_list_of_kept_modules_makes_transformers_quantize_the_same_weights(name: str, bases: Any) -> None:
    base = bases(name)
    architecture = base.describe()
    skip = None if architecture.skip_modules is None else list(architecture.skip_modules)

    assert modules_of(architecture) == modules_loaded_as_four_bits(base, skip)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "mixtral"])
def test_modules_that_are_kept_on_request_are_kept_by_transformers_too(name: str, bases: Any) -> None:
    base = bases(name)
    every = base.describe()
    one = min(quantized(every)).removesuffix(".weight")

    architecture = base.describe(keep=[one])

    assert quantized(every) - quantized(architecture) == {f"{one}.weight"}
    assert modules_loaded_as_four_bits(base, list(architecture.skip_modules)) == modules_of(architecture)


@pytest.mark.parametrize("name", EVERY)
def test_an_output_as_planned_has_nothing_that_a_loader_would_object_to(name: str, bases: Any) -> None:
    base = bases(name)

    assert check_output(*written(base, base.describe())) == []


def test_nothing_is_quantized_where_nothing_is_wanted(bases: Any) -> None:
    architecture = bases("llama").describe(quantize=False)

    assert (quantized(architecture), architecture.skip_modules) == (set(), None)


@pytest.mark.parametrize("name", ["t5", "llama", "bert classifier"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_weights_that_stay_in_float32_are_those_that_transformers_leaves_in_float32(
    dtype: str, name: str, bases: Any
) -> None:
    base = bases(name)
    state = loaded(base, getattr(torch, dtype)).state_dict()

    architecture = base.describe(dtype=dtype)

    ours = {role.parameter for role in architecture.roles.values() if role.float32}
    assert ours == {name for name in ours | set(state) if state[name].dtype == torch.float32}


def test_t5_has_weights_that_stay_in_float32(bases: Any) -> None:
    architecture = bases("t5").describe(dtype="float16")

    assert any(role.float32 for role in architecture.roles.values())


# Names


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("llama", {}),
        ("qwen3", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("gpt2", {"lm_head.weight": "transformer.wte.weight"}),
        ("opt", {"lm_head.weight": "model.decoder.embed_tokens.weight"}),
    ],
)
def test_tensors_that_the_checkpoint_shares_are_known(name: str, tied: dict[str, str], bases: Any) -> None:
    assert bases(name).describe().tied == tied


@pytest.mark.parametrize(
    ("name", "embeddings"),
    [
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("qwen3", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("gpt_neox", {"gpt_neox.embed_in.weight", "embed_out.weight"}),
        ("bert classifier", {"bert.embeddings.word_embeddings.weight"}),
    ],
)
def test_embedding_and_head_are_known_by_the_checkpoints_names(name: str, embeddings: set[str], bases: Any) -> None:
    assert bases(name).describe().embeddings == embeddings


def test_a_tensor_is_found_by_either_name(bases: Any) -> None:
    architecture = bases("gpt_neox").describe()

    found = [architecture.tensor_of(name) for name in ("embed_out.weight", "lm_head.weight", "nothing.weight")]

    assert found == ["embed_out.weight", "embed_out.weight", None]
    assert architecture.module_names("embed_out.weight") == ("embed_out", "lm_head")


def test_an_expert_that_loading_stacks_has_its_own_name_only(bases: Any) -> None:
    architecture = bases("mixtral").describe()
    expert = "model.layers.0.block_sparse_moe.experts.1.w1"

    assert architecture.module_names(f"{expert}.weight") == (expert,)
    assert architecture.tensor_of("model.layers.0.mlp.experts.gate_up_proj") is None
    assert architecture.roles[f"{expert}.weight"].kind == "linear"


def test_a_base_model_saved_without_its_prefix_is_understood(bases: Any) -> None:
    base = bases("gpt2")
    shapes = {name.removeprefix("transformer."): shape for name, shape in base.shapes.items()}

    architecture = describe(base.config, shapes, quantize=True, dtype="bfloat16")

    assert architecture.roles["h.0.attn.c_attn.weight"].parameter == "transformer.h.0.attn.c_attn.weight"
    assert len(quantized(architecture)) == len(quantized(base.describe()))


def test_a_tensor_that_the_model_does_not_have_is_described_as_such(bases: Any) -> None:
    base = bases("llama")
    shapes = {**base.shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}

    architecture = describe(base.config, shapes, quantize=True, dtype="bfloat16")

    role = architecture.roles["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert (role.parameter, role.kind, role.quantize) == (None, "other", False)


def test_without_a_class_in_the_config_the_model_types_own_is_taken(bases: Any) -> None:
    base = bases("llama")
    config = {key: value for key, value in base.config.items() if key != "architectures"}

    architecture = describe(config, base.shapes, quantize=True, dtype="bfloat16")

    assert architecture.class_name == "LlamaForCausalLM"


def test_describing_changes_neither_config_nor_shapes(bases: Any) -> None:
    base = bases("llama")
    before = copy.deepcopy((base.config, base.shapes))

    base.describe(keep=["down_proj"])

    assert (base.config, base.shapes) == before


# Keeping


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("down_proj", 2),
        ("mlp.down_proj", 2),
        ("model.layers.1.mlp.down_proj", 1),
        ("*.mlp.*", 6),
        ("model.layers.0.*", 7),
        ("*layers.[1].self_attn.?_proj", 4),
    ],
)
def test_a_pattern_keeps_modules_by_glob_by_path_or_by_its_last_parts(pattern: str, count: int, bases: Any) -> None:
    base = bases("llama")

    architecture = base.describe(keep=[pattern])

    assert len(quantized(base.describe())) - len(quantized(architecture)) == count


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # the second ties its head, and has no tensor for it
@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens", "*norm"])
def test_a_pattern_for_what_is_kept_anyway_changes_nothing(name: str, pattern: str, bases: Any) -> None:
    base = bases(name)
    assert base.describe(keep=[pattern]) == base.describe()


def test_patterns_add_up(bases: Any) -> None:
    architecture = bases("llama").describe(keep=["down_proj", "model.layers.0.*"])

    assert len(quantized(architecture)) == 14 - 8


@pytest.mark.parametrize("pattern", ["nothing", "own_proj", "layers.0", "model.layers.9.*", "", "down_proj.weight"])
@pytest.mark.parametrize("remote_code", [False, True])
def test_a_pattern_that_keeps_nothing_is_refused(pattern: str, remote_code: bool, bases: Any) -> None:
    base = bases("llama")
    config = {**base.config, "model_type": "nobody_has_it"} if remote_code else base.config

    with pytest.raises(BadRecipe) as caught:
        describe(config, base.shapes, quantize=True, dtype="bfloat16", keep=[pattern], remote_code=remote_code)

    assert str(caught.value).startswith(f"`keep` {pattern}: matches no module; ")
    if pattern == "own_proj":
        assert str(caught.value).endswith("; did you mean down_proj or o_proj or mlp.down_proj?")
    if pattern == "":
        assert str(caught.value).endswith("; one of them is v_proj")


# Layers whose weights the model reads itself


MAMBA: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", {**SMALL, "state_size": 16, "time_step_rank": 64}),
    "falcon_mamba": ("FalconMambaForCausalLM", {**SMALL, "state_size": 16, "time_step_rank": 64}),
    "jamba": (
        "JambaForCausalLM",
        {
            **SMALL,
            "num_key_value_heads": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 64,
            "use_mamba_kernels": False,
        },
    ),
}


@pytest.mark.parametrize("name", MAMBA)
def test_layers_whose_weights_a_model_reads_itself_stay_in_16_bits(name: str, tmp_path: Path) -> None:
    class_name, settings = MAMBA[name]
    config = CONFIG_MAPPING[name](**settings)
    config.architectures = [class_name]
    getattr(transformers, class_name)(config).to(torch.bfloat16).save_pretrained(tmp_path)
    base = Base(tmp_path, json.loads((tmp_path / "config.json").read_text()), shapes_of(tmp_path))

    architecture = base.describe()

    kept = {tensor for tensor in base.shapes if tensor.endswith(".dt_proj.weight")}
    assert kept
    assert architecture.read_directly == kept
    assert not kept & quantized(architecture)
    assert any(tensor.endswith(".x_proj.weight") for tensor in quantized(architecture))
    assert architecture.skip_modules is not None
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(architecture.skip_modules))
    model = loaded(base, quantization_config=quantization)
    with torch.no_grad():
        assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_most_models_call_all_their_layers(name: str, bases: Any) -> None:
    assert bases(name).describe().read_directly == frozenset()


def test_what_is_kept_anyway_may_be_named_to_be_kept(tmp_path: Path) -> None:
    class_name, settings = MAMBA["mamba"]
    model = getattr(transformers, class_name)(CONFIG_MAPPING["mamba"](**settings))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [class_name]}

    by_itself = describe(config, shapes, quantize=True, dtype="bfloat16")
    named = describe(config, shapes, quantize=True, dtype="bfloat16", keep=["dt_proj"])

    assert named == by_itself


# Classes and configs as they are found


@pytest.mark.parametrize(
    ("model_type", "architectures", "expected"),
    [
        ("llama", ["LlamaForCausalLM"], "LlamaForCausalLM"),
        ("llama", ["LLaMAForCausalLM"], "LlamaForCausalLM"),
        ("falcon", ["RWForCausalLM"], "FalconForCausalLM"),
        ("gpt2", ["MyLMHeadModel"], "GPT2LMHeadModel"),
        ("gpt2", None, "GPT2LMHeadModel"),
        ("gpt2", [], "GPT2LMHeadModel"),
        ("bert", ["OwnForSequenceClassification"], "BertForSequenceClassification"),
        ("qwen2_vl", ["Qwen2VLOwnForConditionalGeneration"], "Qwen2VLForConditionalGeneration"),
        ("llama", ["NoSuchModel"], None),
        ("llama", ["OwnForTelepathy"], None),
        ("bert", ["OwnForConditionalGeneration"], None),
        ("no_such_type", ["LlamaForCausalLM"], None),
        ("llama", [5], None),
    ],
)
def test_a_class_is_the_one_that_is_named_or_that_of_the_model_type_for_the_same_purpose(
    model_type: str, architectures: list[Any] | None, expected: str | None
) -> None:
    assert class_of({"model_type": model_type, "architectures": architectures}) == expected


def test_a_model_with_code_of_its_own_is_not_taken_for_the_one_of_its_type() -> None:
    config = {"model_type": "llama", "architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "own.Own"}}

    assert class_of(config) is None


@pytest.mark.parametrize("infinity", [float("inf"), {"__float__": "Infinity"}])
def test_infinity_is_read_in_both_spellings(infinity: object) -> None:
    settings = {**SMALL, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}
    config = {**settings, "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}

    model = meta_model({**config, "time_step_limit": [0.0, infinity]}, {}, "bfloat16")

    assert model is not None
    assert list(model.config.time_step_limit) == [0.0, float("inf")]


def test_a_number_that_is_none_is_refused() -> None:
    config = {**SMALL, "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}

    with pytest.raises(BadCheckpoint, match="can't build Mamba2ForCausalLM"):
        meta_model({**config, "time_step_limit": [0.0, {"__float__": "NaN"}]}, {}, "bfloat16")


# What is refused


def refusal(base: Base, kind: type[ConversionRefused], shapes: Any = None, **config: Any) -> str:
    with pytest.raises(kind) as caught:
        describe({**base.config, **config}, base.shapes if shapes is None else shapes, quantize=True, dtype="bfloat16")
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.isprintable()
    assert len(message) < 300
    return message


def test_a_missing_tensor_is_named(bases: Any) -> None:
    base = bases("llama")
    shapes = {name: shape for name, shape in base.shapes.items() if "layers.1.mlp" not in name}

    assert refusal(base, BadCheckpoint, shapes) == (
        "model.layers.1.mlp.down_proj.weight: LlamaForCausalLM needs it and the base lacks it (3 missing)"
    )


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama", "model.norm.weight", "norm.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w2.weight", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_two_tensors_for_one_parameter_are_named(bases: Any, name: str, first: str, second: str) -> None:
    base = bases(name)
    shapes = base.shapes | {second: base.shapes[first]}

    said = refusal(base, BadCheckpoint, shapes)

    assert " is the same parameter of " in said
    assert {first, second} <= set(said.replace(":", "").split())


def test_a_layer_whose_experts_are_missing_is_named(bases: Any) -> None:
    base = bases("mixtral")
    shapes = {name: shape for name, shape in base.shapes.items() if "layers.1.block_sparse_moe.experts" not in name}

    assert refusal(base, BadCheckpoint, shapes) == (
        "model.layers.1.mlp.experts.down_proj: MixtralForCausalLM needs it and the base lacks it (2 missing)"
    )


def test_a_tensor_of_another_shape_is_named(bases: Any) -> None:
    base = bases("llama")
    shapes = {**base.shapes, "model.norm.weight": (65,)}

    assert refusal(base, BadCheckpoint, shapes) == "model.norm.weight: shape [65], but the config makes it [64]"


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers 10,000,000,000,000,000,000,000,000,000,0"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers 1,000,000,000"),
        ({"vision_config": {"depth": 5000}}, "depth 5,000"),
        ({"model_type": "whisper", "encoder_layers": 10**9}, "encoder_layers 1,000,000,000"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer 1,000,000,000"),
        ({"model_type": "jamba", "num_experts": 10**9}, "num_experts 1,000,000,000"),
        ({"num_labels": 10**9}, "num_labels 1,000,000,000"),
    ],
    ids=str,
)
def test_an_absurd_count_is_refused_before_a_model_is_built(changes: dict[str, Any], option: str, bases: Any) -> None:
    base = bases("llama")

    assert refusal(base, BadCheckpoint, **changes) == (
        f"config.json: {option}, but the checkpoint has only {len(base.shapes)} tensors"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["NobodyForTelepathy"]}, "no 'NobodyForTelepathy' of model type 'llama'"),
        ({"architectures": ["AutoModel"]}, "no 'AutoModel' of model type 'llama'"),
        ({"architectures": ["LlamaConfig"]}, "no 'LlamaConfig' of model type 'llama'"),
        ({"architectures": ["torch"]}, "no 'torch' of model type 'llama'"),
        ({"architectures": [7]}, "no 7 of model type 'llama'"),
        ({"model_type": "nobody_has_it"}, "no 'LlamaForCausalLM' of model type 'nobody_has_it'"),
        ({"model_type": None}, "no 'LlamaForCausalLM' of model type None"),
        ({"model_type": ["llama"]}, "no 'LlamaForCausalLM' of model type ['llama']"),
    ],
    ids=str,
)
def test_a_class_that_transformers_does_not_have_is_refused(changes: dict[str, Any], named: str, bases: Any) -> None:
    message = refusal(bases("llama"), Unsupported, **changes)

    assert message == f"config.json: transformers {transformers.__version__} has {named}"


@pytest.mark.parametrize("name", ["PreTrainedModel", "LlamaPreTrainedModel"])
def test_a_class_without_weights_is_refused(name: str, bases: Any) -> None:
    message = refusal(bases("llama"), Unsupported, architectures=[name])

    assert message == f"config.json: {name} is a class without weights"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 1.5},
        {"pad_token_id": 10**9},
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000}},
        {"layer_types": ["nonsense"] * 2},
        {"dtype": "nonsense"},
        {"text_config": {"hidden_size": 64}},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["Qwen2ForCausalLM"]},
    ],
    ids=str,
)
def test_a_config_of_which_no_model_can_be_built_is_refused_in_one_line(changes: dict[str, Any], bases: Any) -> None:
    base = bases("llama")
    name = changes.get("architectures", ["LlamaForCausalLM"])[0]

    message = refusal(base, BadCheckpoint, **changes)

    assert message.startswith(f"config.json: transformers can't build {name} from it: ")
    assert not message.endswith(": ")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"vocab_size": 10**12},
        {"head_dim": 10**12},
        {"num_key_value_heads": 10**12},
        {"intermediate_size": 64},
    ],
    ids=str,
)
def test_sizes_that_the_tensors_do_not_have_are_refused(changes: dict[str, Any], bases: Any) -> None:
    assert ", but the config makes it [" in refusal(bases("llama"), BadCheckpoint, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "somebody/kernel"},
        {"attn_implementation": "somebody/kernel"},
        {"experts_implementation": "somebody/kernel"},
        {"use_kernels": True},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"_name_or_path": "somebody/model"},
    ],
    ids=str,
)
def test_code_and_kernels_that_a_config_names_are_not_looked_for(changes: dict[str, Any], bases: Any) -> None:
    base = bases("llama")

    architecture = describe({**base.config, **changes}, base.shapes, quantize=True, dtype="bfloat16")

    assert len(quantized(architecture)) == 14


# A class that transformers doesn't have


@pytest.fixture
def unknown(bases: Any) -> Base:
    base = bases("llama")
    return Base(base.folder, {**base.config, "model_type": "own", "architectures": ["OwnForCausalLM"]}, base.shapes)


ENDS = ("embed_tokens", "lm_head")


def test_without_a_list_of_what_to_keep_an_unknown_class_is_refused_with_the_names_to_choose_from(
    unknown: Base,
) -> None:
    with pytest.raises(BadRecipe) as caught:
        unknown.describe(remote_code=True)

    said = str(caught.value)
    assert said.startswith("transformers has no OwnForCausalLM, and the base's own code is not run")
    assert "Name all that are not with `keep`" in said
    names = ["lm_head", "model.embed_tokens", "model.layers.*.mlp.down_proj", "model.layers.*.self_attn.q_proj"]
    assert [name for name in names if f"{name}," not in f"{said},"] == []
    assert "norm" not in said, "vectors are never quantized"


def test_a_long_list_of_names_to_choose_from_is_cut_short(unknown: Base) -> None:
    shapes = {f"block_{number}.weight": (64, 64) for number in range(100)}

    with pytest.raises(BadRecipe, match=r"block_\d+ and 60 more$"):
        describe(unknown.config, shapes, quantize=True, dtype="bfloat16", remote_code=True)


def test_every_matrix_of_an_unknown_class_that_is_not_kept_is_quantized(unknown: Base, bases: Any) -> None:
    architecture = unknown.describe(remote_code=True, keep=ENDS)

    assert not architecture.known
    assert architecture.class_name == "OwnForCausalLM"
    assert quantized(architecture) == quantized(bases("llama").describe())
    assert architecture.skip_modules == ("lm_head", "model.embed_tokens")


def test_nothing_is_taken_from_the_names_of_an_unknown_class(unknown: Base) -> None:
    shapes = {"net.wte.weight": (64, 64), "net.norm.weight": (64, 64), "net.router.weight": (4, 64)}

    architecture = describe(
        unknown.config, shapes, quantize=True, dtype="bfloat16", remote_code=True, keep=["net.router"]
    )

    assert quantized(architecture) == {"net.wte.weight", "net.norm.weight"}
    assert architecture.skip_modules == ("net.router",)


def test_experts_of_an_unknown_class_are_kept_as_one(unknown: Base) -> None:
    experts = {f"model.layers.0.mlp.experts.{number}.w1.weight": (64, 64) for number in range(2)}

    architecture = describe(
        unknown.config,
        {**unknown.shapes, **experts},
        quantize=True,
        dtype="bfloat16",
        remote_code=True,
        keep=[*ENDS, "*.experts.*"],
    )

    assert architecture.skip_modules == ("lm_head", "model.embed_tokens", "model.layers.0.mlp.experts")


def test_an_unknown_class_in_16_bits_needs_no_list(unknown: Base) -> None:
    architecture = unknown.describe(remote_code=True, quantize=False)

    assert quantized(architecture) == set()
    assert architecture.skip_modules is None


def test_a_known_class_is_asked_of_transformers_whatever_was_allowed(bases: Any) -> None:
    assert bases("llama").describe(remote_code=True).known


# The static check of an output


def test_modules_that_loading_replaces_are_refused_by_name() -> None:
    settings = {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 128}
    config = CONFIG_MAPPING["llama4_text"](**settings, num_local_experts=2, moe_layers=[1])
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stated = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["Llama4ForCausalLM"]}
    architecture = describe(stated, shapes, quantize=True, dtype="bfloat16")
    output = output_config(
        stated, Recipe(quant_type="nf4", dtype="bfloat16"), architecture, vocabulary=None, untied=False
    )

    problems = check_output(output, shapes, quantized(architecture))

    assert problems == [
        "model.layers.1.feed_forward.experts: loading a quantized checkpoint puts SequentialLlama4TextExperts in the "
        "place of Llama4TextExperts, and finds no tensors for it; use `quant_type` none"
    ]
    in_16_bits = {key: value for key, value in output.items() if key != "quantization_config"}
    assert check_output(in_16_bits, shapes, []) == []


@pytest.fixture
def output(bases: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]:
    base = bases("llama")
    return written(base, base.describe())


UP = "model.layers.0.mlp.up_proj.weight"


def test_a_weight_that_should_be_quantized_and_is_not_is_found(output: Any) -> None:
    config, shapes, names = output

    assert check_output(config, shapes, names - {UP}) == [f"{UP}: not quantized here, but by transformers"]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_quantized_and_should_not_be_is_found(name: str, output: Any) -> None:
    config, shapes, names = output

    assert check_output(config, shapes, names | {name}) == [f"{name}: quantized here, not by transformers"]


def test_a_lost_tensor_is_found(output: Any) -> None:
    config, shapes, names = output
    del shapes["model.norm.weight"]

    assert check_output(config, shapes, names) == ["model.norm.weight: missing"]


def test_a_tensor_of_another_shape_is_found(output: Any) -> None:
    config, shapes, names = output
    shapes[UP] = (64, 128)

    assert check_output(config, shapes, names) == [f"{UP}: shape [64, 128], transformers expects [128, 64]"]


def test_a_conv1d_that_was_quantized_without_being_turned_is_found(bases: Any) -> None:
    base = bases("gpt2")
    config, shapes, names = written(base, base.describe())
    name = "transformer.h.0.attn.c_attn.weight"
    shapes[name] = shapes[name][::-1]

    assert check_output(config, shapes, names) == [f"{name}: shape [64, 192], transformers expects [192, 64]"]


def test_quantized_weights_without_a_word_in_the_config_are_found(output: Any) -> None:
    config, shapes, names = output
    del config["quantization_config"]

    assert len(check_output(config, shapes, names)) == len(names)


def test_a_list_of_kept_modules_that_was_lost_is_found(bases: Any) -> None:
    base = bases("llama")
    config, shapes, names = written(base, base.describe(keep=["down_proj"]))
    config["quantization_config"]["llm_int8_skip_modules"] = None

    assert len(check_output(config, shapes, names)) == 2


@pytest.mark.parametrize(
    ("listed", "name"), [(["A", 5], "A"), ([5], "5"), ([], "unknown"), (5, "unknown"), ({"0": "A"}, "unknown")]
)
def test_a_class_that_is_not_ours_has_whatever_name_the_config_gives_it(listed: Any, name: str) -> None:
    config = {"model_type": "nobody's", "architectures": listed}

    found = describe(config, {"layer.weight": (64, 64)}, quantize=False, dtype="bfloat16", remote_code=True)

    assert found.class_name == name

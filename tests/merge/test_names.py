"""The names that people's adapters have: one rule explains them all, or they are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.errors import AdapterMismatch, BadAdapter, Unsupported
from converter.merge.adapter import Adapter
from converter.merge.files import CONFIG, WEIGHTS
from converter.merge.keys import PREFIX
from converter.merge.match import Match, match
from converter.merge.names import Names
from converter.model.answers import describe, parameters
from converter.model.architecture import Architecture, Role
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from tests.models import save_adapter, save_base

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "head_dim": 16,
}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama") / "base", "llama")


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `llama` as PEFT saves it."""
    folder = tmp_path_factory.mktemp("llama") / "adapter"
    return save_adapter(folder, llama, "llama", target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language base, whose language part transformers 5 calls otherwise than the file on disk."""
    config = transformers.Gemma3Config(
        text_config=SMALL, vision_config={**VISION, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("gemma") / "base"
    transformers.Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return folder


def written(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter with these tensors, named without PEFT's prefix unless they have it."""
    folder.mkdir()
    prefixed = {name if "base_model" in name else PREFIX + name: value for name, value in tensors.items()}
    save_file(prefixed, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **config}))
    return folder


def pairs(modules: Mapping[str, tuple[int, int]], rank: int = 8) -> dict[str, Tensor]:
    """Random factors for modules, by their (out_features, in_features)."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, Tensor] = {}
    for module, (rows, columns) in modules.items():
        found[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
        found[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return found


def renamed(adapter: Path, to: Path, rename: Callable[[str], str], **config: Any) -> Path:
    to.mkdir()
    save_file({rename(key): value for key, value in load_file(adapter / WEIGHTS).items()}, to / WEIGHTS)
    (to / CONFIG).write_text(json.dumps(json.loads((adapter / CONFIG).read_text()) | config))
    return to


def placed(base: Path, adapter: Path) -> Match:
    checkpoint = Checkpoint(LocalFolder(base))
    shapes = {tensor.name: tensor.shape for tensor in checkpoint}
    architecture = describe(checkpoint.config, shapes, quantize=False, dtype="bfloat16")

    def ask(names: list[str]) -> Mapping[str, str]:
        return parameters(checkpoint.config, shapes, names, dtype="bfloat16")

    return match(Adapter(LocalFolder(adapter)), architecture, shapes, ask)


def merged_by_hand(base: Path, pairs: Mapping[str, Tensor], module: str, tensor: str) -> Tensor:
    """What a tensor of the base becomes with the factors of a module, in bfloat16."""
    weight = load_file(base / "model.safetensors")[tensor].float()
    delta = (pairs[f"{module}.lora_B.weight"] @ pairs[f"{module}.lora_A.weight"]) * 2.0
    return (weight + delta).bfloat16()


# What wrappers leave in names

WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile, all": lambda key: f"_orig_mod.{key}",
    "torch.compile, inside PEFT": lambda key: key.replace("model.model.", "model._orig_mod.model."),
    "torch.compile, each layer": lambda key: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", key),
    "DistributedDataParallel": lambda key: f"module.{key}",
    "DistributedDataParallel inside PEFT": lambda key: key.replace("model.model.", "model.module.model."),
    "DistributedDataParallel, in the middle": lambda key: key.replace("layers.", "module.layers."),
    "FSDP": lambda key: key.replace("layers.", "_fsdp_wrapped_module.layers."),
    "checkpointing": lambda key: re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", key),
    "without PEFT's prefix": lambda key: key.removeprefix(PREFIX),
    "the adapter's name": lambda key: re.sub(r"(lora_.)\.", r"\1.default.", key),
    "another name": lambda key: re.sub(r"(lora_.)\.", r"\1.policy.", key),
    "several at once": lambda key: "module._orig_mod." + re.sub(r"(lora_.)\.", r"\1.default.", key),
}


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_what_wrappers_leave_in_names_changes_no_places(
    rename: Callable[[str], str], llama: Path, plain: Path, tmp_path: Path
) -> None:
    expected = {
        tensor: (change.shape, change.as_json()["lora"]["scaling"])
        for tensor, change in placed(llama, plain).deltas.items()
    }

    found = placed(llama, renamed(plain, tmp_path / "adapter", rename))

    assert {
        tensor: (change.shape, change.as_json()["lora"]["scaling"]) for tensor, change in found.deltas.items()
    } == expected


def test_names_of_which_some_lack_pefts_prefix_are_refused(llama: Path, plain: Path, tmp_path: Path) -> None:
    mixed = renamed(plain, tmp_path / "adapter", lambda key: key.removeprefix(PREFIX) if "layers.1" in key else key)

    with pytest.raises(BadAdapter, match=rf"layers\.1\..* does not begin with {PREFIX}, as .*layers\.0.* does$"):
        placed(llama, mixed)


def test_two_adapters_in_one_file_are_refused(llama: Path, plain: Path, tmp_path: Path) -> None:
    def rename(key: str) -> str:
        return re.sub(r"(lora_.)\.", r"\1.one." if "layers.1" in key else r"\1.two.", key)

    with pytest.raises(BadAdapter, match=r"holds several adapters, 'one' and 'two'; save one of them alone$"):
        placed(llama, renamed(plain, tmp_path / "adapter", rename))


# Other classes than the base's


@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {r"^layers\.0": 8}}, {"target_modules": r"layers\.\d.*_proj"}]
)
def test_an_adapter_of_the_model_without_its_head_fits_the_model_with_it(
    options: dict[str, Any], llama: Path, plain: Path, tmp_path: Path
) -> None:
    bare = renamed(
        plain, tmp_path / "adapter", lambda key: key.replace("model.model.model.", "model.model."), **options
    )

    found = placed(llama, bare)

    assert {tensor: change.module for tensor, change in found.deltas.items()} == {
        f"model.layers.{layer}.{leaf}.weight": f"layers.{layer}.{leaf}"
        for layer in (0, 1)
        for leaf in ("self_attn.q_proj", "mlp.down_proj")
    }


def test_an_adapter_of_the_model_without_its_head_that_lost_a_layer_is_refused(
    llama: Path, plain: Path, tmp_path: Path
) -> None:
    bare = renamed(plain, tmp_path / "bare", lambda key: key.replace("model.model.model.", "model.model."))
    lost = {key: value for key, value in load_file(bare / WEIGHTS).items() if "layers.1.mlp" not in key}
    save_file(lost, bare / WEIGHTS)

    with pytest.raises(
        BadAdapter, match=r"^layers\.1\.mlp\.down_proj: target_modules names it, but the adapter's file"
    ):
        placed(llama, bare)


def test_an_adapter_of_the_model_with_its_head_fits_the_model_without_it(
    plain: Path, tmp_path: Path, llama: Path
) -> None:
    config = transformers.AutoConfig.from_pretrained(llama)
    transformers.AutoModel.from_config(config).bfloat16().save_pretrained(tmp_path / "bare")

    found = placed(tmp_path / "bare", plain)

    assert {tensor: change.module for tensor, change in found.deltas.items()} == {
        f"layers.{layer}.{leaf}.weight": f"model.layers.{layer}.{leaf}"
        for layer in (0, 1)
        for leaf in ("self_attn.q_proj", "mlp.down_proj")
    }


TEXT_ONLY = "model.layers.{}.self_attn.q_proj"
SPELLINGS = [
    TEXT_ONLY,
    "layers.{}.self_attn.q_proj",
    "language_model.model.layers.{}.self_attn.q_proj",
    "model.language_model.layers.{}.self_attn.q_proj",
    "language_model.layers.{}.self_attn.q_proj",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_adapter_of_text_is_merged_into_the_language_part_of_a_vision_language_base(
    spelling: str, gemma: Path, tmp_path: Path
) -> None:
    on_disk = [name for name in load_file(gemma / "model.safetensors") if re.search("language.*q_proj", name)]
    tensors = pairs({spelling.format(layer): (64, 64) for layer in (0, 1)})
    adapter = written(tmp_path / "adapter", tensors, target_modules=["q_proj"])

    report = converter.convert(gemma, adapter, tmp_path / "out", converter.Recipe(quant_type="none"))

    made = load_file(report.out / "model.safetensors")
    for layer in (0, 1):
        [name] = [name for name in on_disk if f"layers.{layer}." in name]
        assert torch.equal(made[name], merged_by_hand(gemma, tensors, spelling.format(layer), name))
    changed = {n for n, was in load_file(gemma / "model.safetensors").items() if not torch.equal(made[n], was)}
    assert changed == set(on_disk)


def test_an_adapter_of_text_expects_nothing_of_the_vision_tower(gemma: Path, tmp_path: Path) -> None:
    tensors = pairs({TEXT_ONLY.format(layer): (64, 64) for layer in (0, 1)})
    norms = {
        f"model.layers.{layer}.self_attn.{leaf}.weight": torch.ones(16)
        for layer in (0, 1)
        for leaf in ("q_norm", "k_norm")
    }
    adapter = written(
        tmp_path / "adapter", tensors | norms, target_modules=["q_proj"], modules_to_save=["q_norm", "k_norm"]
    )

    found = placed(gemma, adapter)

    assert len(found.deltas) == 2
    assert all("language" in name for name in found.replacements)
    assert len(found.replacements) == 4


# Names of other versions of transformers


def test_names_of_an_older_version_are_explained_by_transformers_own_conversions(tmp_path: Path) -> None:
    config = transformers.Qwen2VLConfig(
        text_config={**SMALL, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "embed_dim": 64, "num_heads": 4, "hidden_size": 64, "patch_size": 14},
    )
    base = tmp_path / "base"
    transformers.Qwen2VLForConditionalGeneration(config).bfloat16().save_pretrained(base)
    # As transformers 4.57 saved it, or 5 does when asked to: the names of the running model.
    disk = load_file(base / "model.safetensors")
    running = {
        re.sub(
            r"^visual", "model.visual", re.sub(r"^model\.(?!language_model|visual)", "model.language_model.", name)
        ): value
        for name, value in disk.items()
    }
    save_file(running, base / "model.safetensors", metadata={"format": "pt"})
    layers = [f"layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    old = {f"model.{layer}": (64, 64) for layer in layers} | {"visual.blocks.0.attn.proj": (64, 64)}
    adapter = written(tmp_path / "adapter", pairs(old), target_modules=["q_proj", "proj"])

    assert {tensor: change.module for tensor, change in placed(base, adapter).deltas.items()} == {
        **{f"model.language_model.{layer}.weight": f"model.{layer}" for layer in layers},
        "model.visual.blocks.0.attn.proj.weight": "visual.blocks.0.attn.proj",
    }


# Names that are no linear layer's


def test_a_router_that_was_a_linear_layer_when_it_was_trained_is_merged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    gates = [name for name in load_file(base / "model.safetensors") if name.endswith(".gate.weight")]
    tensors = pairs({name.removesuffix(".weight"): (4, 64) for name in gates}, rank=2)
    adapter = written(tmp_path / "adapter", tensors, r=2, lora_alpha=4, target_modules="all-linear")

    report = converter.convert(base, adapter, tmp_path / "out", converter.Recipe(quant_type="none"))

    made = load_file(report.out / "model.safetensors")
    assert len(gates) == 2
    for name in gates:
        assert torch.equal(made[name], merged_by_hand(base, tensors, name.removesuffix(".weight"), name))


def test_a_parameter_that_is_neither_weight_nor_bias_is_saved_whole(tmp_path: Path) -> None:
    base = saved_mamba(tmp_path / "base")
    disk = load_file(base / "model.safetensors")
    mixer = {name: torch.full_like(value, 0.5) for name, value in disk.items() if "layers.1.mixer." in name}
    assert {name.rpartition(".")[2] for name in mixer} > {"A_log", "D", "dt_bias"}
    adapter = written(tmp_path / "adapter", mixer, modules_to_save=["layers.1.mixer"], target_modules=[])

    report = converter.convert(base, adapter, tmp_path / "out", converter.Recipe(quant_type="none"))

    made = load_file(report.out / "model.safetensors")
    assert all(torch.equal(made[name], mixer.get(name, value)) for name, value in disk.items())


def saved_mamba(folder: Path) -> Path:
    config = transformers.Mamba2Config(
        hidden_size=64,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
        num_hidden_layers=2,
        vocab_size=256,
        time_step_limit=(0.0, 10.0),
    )
    torch.manual_seed(3)
    transformers.Mamba2ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


# What PEFT saves of modules_to_save where the vocabulary grew

HEAD = "lm_head"


def with_head(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    return written(folder, tensors, modules_to_save=[HEAD], target_modules=[])


@pytest.mark.parametrize(
    "names", [["modules_to_save.weight"], ["modules_to_save.default.weight"], ["weight", "modules_to_save.weight"]]
)
@pytest.mark.parametrize("original", [True, False])
def test_a_saved_module_is_found_under_each_name_that_peft_gives_it(
    names: list[str], original: bool, llama: Path, tmp_path: Path
) -> None:
    tensors = {f"{HEAD}.{name}": torch.ones(256, 64) for name in names}
    if original:
        tensors[f"{HEAD}.original_module.weight"] = torch.zeros(256, 64)

    found = placed(llama, with_head(tensors, tmp_path / "adapter"))

    assert {name: tensor.name for name, tensor in found.replacements.items()} == {
        "lm_head.weight": PREFIX + f"{HEAD}.{names[0]}"
    }


def test_a_saved_module_of_which_two_copies_differ_is_refused(llama: Path, tmp_path: Path) -> None:
    tensors = {f"{HEAD}.weight": torch.ones(256, 64), f"{HEAD}.modules_to_save.weight": torch.zeros(256, 64)}

    with pytest.raises(BadAdapter) as caught:
        placed(llama, with_head(tensors, tmp_path / "adapter"))

    assert str(caught.value) == (
        f"{tmp_path / 'adapter'}: {PREFIX + HEAD + '.weight'!r} and {PREFIX + HEAD + '.modules_to_save.weight'!r} are "
        "the same tensor, but they differ"
    )


def test_what_a_saved_module_took_the_place_of_is_refused_alone(llama: Path, tmp_path: Path) -> None:
    alone = with_head({f"{HEAD}.original_module.weight": torch.zeros(256, 64)}, tmp_path / "adapter")

    with pytest.raises(BadAdapter, match=r"original_module\.weight': what took its place is not in the file$"):
        placed(llama, alone)


# What has no place


@pytest.mark.parametrize(
    ("task", "mapping", "expected"),
    [
        ("SEQ_CLS", None, "LlamaForSequenceClassification: save AutoModelForSequenceClassification.from_pretrained"),
        ("TOKEN_CLS", None, "LlamaForTokenClassification: save AutoModelForTokenClassification.from_pretrained"),
        (None, {"base_model_class": "MyClassifier"}, "MyClassifier: save AutoModelForSequenceClassification.from_pr"),
    ],
)
def test_of_a_head_that_the_base_lacks_the_class_is_named_and_how_to_get_it(
    task: str | None, mapping: object, expected: str, llama: Path, tmp_path: Path
) -> None:
    tensors = {"score.weight": torch.ones(3, 64)} | pairs({"model.layers.0.self_attn.q_proj": (64, 64)})
    options = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": task, "auto_mapping": mapping}
    adapter = written(tmp_path / "adapter", tensors, **options)

    with pytest.raises(AdapterMismatch) as caught:
        placed(llama, adapter)

    message = str(caught.value)
    assert message.startswith("score.weight: in the adapter, but the base has no such tensor; it is the head of ")
    assert expected in message
    assert message.endswith("(BASE, num_labels=3) with save_pretrained(FOLDER), and give FOLDER as `base`")


def test_a_value_head_is_refused_as_one(llama: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", {"v_head.summary.weight": torch.ones(1, 64)}, target_modules=[])

    with pytest.raises(
        AdapterMismatch, match="it is a value head of reinforcement learning, which no merged model has"
    ):
        placed(llama, adapter)


def test_a_head_that_neither_the_adapter_nor_the_base_has_is_refused_with_the_task(llama: Path, tmp_path: Path) -> None:
    tensors = pairs({f"model.layers.{layer}.self_attn.q_proj": (64, 64) for layer in (0, 1)})
    options = {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    adapter = written(tmp_path / "adapter", tensors, **options)

    with pytest.raises(BadAdapter) as caught:
        placed(llama, adapter)

    assert str(caught.value) == (
        f"{adapter}: modules_to_save names classifier, score, but neither the adapter's file nor the base has such a "
        "module: the head of LlamaForSequenceClassification (task_type SEQ_CLS) was lost when the adapter was saved; "
        "save it again from the model that was trained"
    )


# What the model does not use


def with_a_layer_too_many(llama: Path, to: Path) -> Path:
    shutil.copytree(llama, to)
    tensors = load_file(to / "model.safetensors")
    unused = {name.replace("layers.1.", "layers.2."): t for name, t in tensors.items() if "layers.1." in name}
    save_file(tensors | {name: tensor.clone() for name, tensor in unused.items()}, to / "model.safetensors")
    return to


@pytest.mark.parametrize("zero", [True, False])
def test_what_the_model_does_not_use_may_be_left_as_it_was_but_not_changed(
    zero: bool, llama: Path, tmp_path: Path
) -> None:
    base = with_a_layer_too_many(llama, tmp_path / "base")
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    tensors = pairs(dict.fromkeys(modules, (64, 64)))
    if zero:
        tensors[f"{modules[2]}.lora_B.weight"].zero_()
    adapter = written(tmp_path / "adapter", tensors, target_modules=["q_proj"])

    if zero:
        found = placed(base, adapter)
        assert set(found.deltas) == {f"{module}.weight" for module in modules[:2]}
        assert found.notes == [f"{modules[2]}: LlamaForCausalLM does not use it, and the adapter left it as it was"]
    else:
        with pytest.raises(Unsupported) as caught:
            placed(base, adapter)
        assert str(caught.value) == (
            f"{modules[2]}: the adapter changes it, but LlamaForCausalLM does not use it: nothing would change"
        )


# Two rules


def two_towers() -> Architecture:
    """A base in which the same names lie in two places."""
    names = [f"{tower}.layers.0.{leaf}.weight" for tower in ("model", "model.language_model") for leaf in ("q", "k")]
    embedding = "model.language_model.embed_tokens.weight"
    roles = {name: Role(name, "linear", quantize=True) for name in [*names, embedding]}
    return Architecture("Odd", roles, None, embeddings=frozenset([embedding]))


def test_names_that_two_rules_explain_are_refused_as_ambiguous() -> None:
    with pytest.raises(AdapterMismatch) as caught:
        Names(two_towers(), ["layers.0.q"], [], lambda _: {})

    assert str(caught.value) == (
        "layers.0.q: in the base this may be model.layers.0.q or model.language_model.layers.0.q; give the adapter's "
        "tensors the names that they have there"
    )


def test_names_that_are_the_bases_own_need_no_other_rule() -> None:
    names = Names(two_towers(), ["model.layers.0.q", "model.language_model.layers.0.k"], [], lambda _: {})

    assert names.left == []
    assert names.tensor("model.layers.0.q.weight") == "model.layers.0.q.weight"


def test_one_rule_must_explain_all_names() -> None:
    names = Names(two_towers(), ["model.layers.0.q", "quux.layers.0.k"], [], lambda _: {})

    assert names.left == ["quux.layers.0.k"]

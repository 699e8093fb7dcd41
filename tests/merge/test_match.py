"""Where each tensor of an adapter belongs; and which adapters belong nowhere, in which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.errors import AdapterMismatch, BadAdapter, ConversionRefused, Unsupported
from converter.merge.adapter import Adapter
from converter.merge.files import CONFIG, WEIGHTS
from converter.merge.keys import PREFIX
from converter.merge.match import Match, match
from converter.model.answers import describe
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from tests.models import save_adapter, save_base

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Bases and adapters by architecture and settings, each made once."""
    made: dict[str, Path] = {}

    def once(key: str, make: Callable[[Path], Path]) -> Path:
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp("match") / "model")
        return made[key]

    def give(name: str, **settings: Any) -> tuple[Path, Path]:
        base = once(name, lambda folder: save_base(folder, name))
        return base, once(f"{name} {settings}", lambda folder: save_adapter(folder, base, name, **settings))

    return give


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit(adapter: Path, to: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """A copy of an adapter whose tensors, named without PEFT's prefix, `change` has changed."""
    copied(adapter, to)
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(adapter / WEIGHTS).items()}
    change(tensors)
    save_file({PREFIX + name: value.contiguous() for name, value in tensors.items()}, to / WEIGHTS)
    whole = {**json.loads((to / CONFIG).read_text()), **config}
    (to / CONFIG).write_text(json.dumps(whole))
    return to


def unchanged(_: dict[str, Tensor]) -> None:
    """For `edit`: the tensors stay, the config changes."""


def matched(base: Path, adapter: Path, **settings: Any) -> Match:
    checkpoint = Checkpoint(LocalFolder(base))
    shapes = {tensor.name: tensor.shape for tensor in checkpoint}
    architecture = describe(checkpoint.config, shapes, quantize=True, dtype="bfloat16", **settings)
    return match(Adapter(LocalFolder(adapter)), architecture, shapes)


def refusal(base: Path, adapter: Path, kind: type[ConversionRefused]) -> str:
    with pytest.raises(kind) as caught:
        matched(base, adapter)
    assert type(caught.value) is kind
    return str(caught.value)


def pair(name: str, rank: int = 8, outputs: int = 64, inputs: int = 64) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, inputs), f"{name}.lora_B.weight": torch.ones(outputs, rank)}


# What is accepted


def test_every_delta_is_given_to_the_tensor_it_was_trained_for(folders: Any) -> None:
    base, adapter = folders("llama")

    found = matched(base, adapter)

    assert len(found.deltas) == 2 * 7
    assert all(name == f"{delta.module}.weight" for name, delta in found.deltas.items())
    assert (found.replacements, found.untied, found.vocabulary, found.notes) == ({}, {}, None, [])


@pytest.mark.parametrize("prefixed", [True, False], ids=["with transformer.", "without"])
def test_an_adapter_fits_a_gpt2_base_in_either_spelling(prefixed: bool, folders: Any, tmp_path: Path) -> None:
    saved, adapter = folders("gpt2")
    base = copied(saved, tmp_path / "base")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(base / WEIGHTS_OF_BASE).items()}
    prefix = "transformer." if prefixed else ""
    save_file({prefix + name: value for name, value in tensors.items()}, base / WEIGHTS_OF_BASE)

    found = matched(base, adapter)

    expected = {f"{prefix}h.{layer}.{m}.weight" for layer in (0, 1) for m in GPT2_MODULES}
    assert set(found.deltas) == expected


def test_an_adapter_in_the_checkpoints_spelling_fits_too(folders: Any, tmp_path: Path) -> None:
    saved, plain = folders("gpt2")
    base = copied(saved, tmp_path / "base")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(base / WEIGHTS_OF_BASE).items()}
    save_file(tensors, base / WEIGHTS_OF_BASE)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    adapter = edit(plain, tmp_path / "adapter", rename)

    assert set(matched(base, adapter).deltas) == {f"h.{n}.{m}.weight" for n in (0, 1) for m in GPT2_MODULES}


WEIGHTS_OF_BASE = "model.safetensors"
GPT2_MODULES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("spelling", ["lm_head", "embed_out"], ids=["transformers 5", "the checkpoint's"])
def test_lora_on_the_head_of_gpt_neox_is_given_to_embed_out(spelling: str, folders: Any, tmp_path: Path) -> None:
    base, plain = folders("gpt_neox", target_modules=["lm_head", "query_key_value"])

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("lm_head", spelling)] = tensors.pop(name)

    adapter = edit(plain, tmp_path / "adapter", rename, target_modules=[spelling, "query_key_value"])

    assert matched(base, adapter).deltas["embed_out.weight"].module == spelling


def test_experts_that_transformers_stacks_get_their_deltas_and_ranks_one_by_one(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("mixtral")
    experts = [f"model.layers.{layer}.block_sparse_moe.experts.{e}.w1" for layer in (0, 1) for e in range(4)]
    adapter = edit(
        plain,
        tmp_path / "adapter",
        lambda tensors: [tensors.update(pair(name, rank=2, outputs=128)) for name in experts],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "w1"],
        rank_pattern={"w1": 2},
    )

    found = matched(base, adapter)

    assert {name: delta.rank for name, delta in found.deltas.items() if "experts" in name} == {
        f"{name}.weight": 2 for name in experts
    }


def test_an_adapter_that_lost_one_expert_is_refused(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("mixtral")
    experts = [f"model.layers.{layer}.block_sparse_moe.experts.{e}.w1" for layer in (0, 1) for e in range(4)]
    adapter = edit(
        plain,
        tmp_path / "adapter",
        lambda tensors: [tensors.update(pair(name, outputs=128)) for name in experts[:-1]],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "w1"],
    )

    assert refusal(base, adapter, BadAdapter) == (
        f"{experts[-1]}: target_modules names it, but the adapter's file has no tensors for it"
    )


def test_a_saved_module_replaces_the_bases_tensors(folders: Any) -> None:
    base, adapter = folders("llama", modules_to_save=["lm_head", "embed_tokens"])

    found = matched(base, adapter)

    assert set(found.replacements) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert (found.untied, found.vocabulary) == ({}, None)


def test_norms_that_were_saved_whole_replace_the_bases(folders: Any) -> None:
    base, adapter = folders("llama", modules_to_save=["norm"], target_modules=["q_proj"])

    found = matched(base, adapter)

    # PEFT takes the end of a path for a name: input_layernorm and post_attention_layernorm are meant, too.
    assert len(found.replacements) == 5
    assert all(name.endswith("norm.weight") for name in found.replacements)


@pytest.mark.parametrize(("bias", "count"), [("all", 6), ("lora_only", 4)])
def test_trained_biases_replace_the_bases(bias: str, count: int, folders: Any) -> None:
    base, adapter = folders("qwen2", bias=bias, target_modules=["q_proj", "v_proj"])

    found = matched(base, adapter)

    assert len(found.replacements) == count
    assert all(name.endswith(".bias") for name in found.replacements)


def test_layers_that_the_config_leaves_out_are_not_lost(folders: Any) -> None:
    base, adapter = folders("llama", target_modules=["q_proj"], layers_to_transform=[1])

    assert set(matched(base, adapter).deltas) == {f"{Q1}.weight"}


def test_kinds_of_module_without_any_tensor_are_not_lost(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")

    def without_mlp(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]

    adapter = edit(plain, tmp_path / "adapter", without_mlp)

    assert all("self_attn" in name for name in matched(base, adapter).deltas)


@pytest.mark.parametrize("target", [None, "all-linear", "All-Linear"])
def test_without_a_list_of_targets_the_file_says_what_is_touched(
    target: str | None, folders: Any, tmp_path: Path
) -> None:
    base, plain = folders("llama")
    adapter = edit(plain, tmp_path / "adapter", unchanged, target_modules=target)

    assert len(matched(base, adapter).deltas) == 14


def test_a_resized_vocabulary_in_the_adapters_file_is_the_new_vocabulary(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")
    adapter = edit(
        plain,
        tmp_path / "adapter",
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": torch.ones(260, 64), "lm_head.weight": torch.ones(260, 64) * 2}
        ),
    )

    found = matched(base, adapter)

    assert found.vocabulary == 260
    assert {name: tensor.shape for name, tensor in found.replacements.items()} == {
        "model.embed_tokens.weight": (260, 64),
        "lm_head.weight": (260, 64),
    }


def test_a_smaller_vocabulary_is_accepted_too(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("qwen3")
    adapter = edit(
        plain, tmp_path / "adapter", lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(200, 64)})
    )

    found = matched(base, adapter)

    assert (found.vocabulary, found.untied) == (200, {})


def test_a_delta_on_a_resized_head_has_the_new_rows(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")
    changes = {
        "model.embed_tokens.weight": torch.ones(260, 64),
        "lm_head.base_layer.weight": torch.ones(260, 64) * 2,
        **pair("lm_head", outputs=260),
    }
    targets = ["lm_head", *json.loads((plain / CONFIG).read_text())["target_modules"]]
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(changes), target_modules=targets)

    found = matched(base, adapter)

    assert (found.vocabulary, found.deltas["lm_head.weight"].shape) == (260, (260, 64))


# Tied embeddings


def test_lora_on_a_tied_head_gives_it_a_tensor_of_its_own(folders: Any) -> None:
    base, adapter = folders("qwen3", target_modules=["lm_head", "q_proj"])

    found = matched(base, adapter)

    assert found.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" in found.deltas
    assert found.notes == [
        "lm_head.weight gets a tensor of its own: the base shares model.embed_tokens.weight, the adapter differs"
    ]


@pytest.mark.parametrize(
    ("module", "replaced"), [("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")]
)
def test_a_tied_embedding_of_which_one_side_was_saved_is_untied(module: str, replaced: str, folders: Any) -> None:
    base, adapter = folders("qwen3", modules_to_save=[module])

    found = matched(base, adapter)

    assert found.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(found.replacements) == {replaced}


def test_two_equal_copies_of_a_tied_embedding_stay_tied(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("qwen3")
    both = {"model.embed_tokens.weight": torch.ones(260, 64), "lm_head.weight": torch.ones(260, 64)}
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(both))

    found = matched(base, adapter)

    assert set(found.replacements) == {"model.embed_tokens.weight"}
    assert (found.untied, found.vocabulary, found.notes) == ({}, 260, [])


def test_two_different_copies_of_a_tied_embedding_are_untied(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("qwen3")
    both = {"model.embed_tokens.weight": torch.ones(256, 64), "lm_head.weight": torch.zeros(256, 64)}
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(both))

    found = matched(base, adapter)

    assert found.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(found.replacements) == set(both)


@pytest.fixture
def doubled(folders: Any, tmp_path: Path) -> Path:
    """A base whose config ties the head to the embedding, and which has both."""
    base = copied(folders("qwen3")[0], tmp_path / "doubled")
    tensors = load_file(base / WEIGHTS_OF_BASE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / WEIGHTS_OF_BASE)
    return base


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_a_head_that_the_base_has_beside_the_embedding_is_not_tied_where_the_adapter_makes_the_two_differ(
    settings: Any, doubled: Path, folders: Any, tmp_path: Path
) -> None:
    _, adapter = folders("qwen3", **settings)

    report = converter.convert(doubled, adapter, tmp_path / "out")

    assert json.loads((report.out / "config.json").read_text())["tie_word_embeddings"] is False
    assert report.plan.notes[0] == (
        "lm_head.weight and model.embed_tokens.weight, which the base's config ties, are not tied any more: they differ"
    )


def test_a_head_that_the_base_has_beside_the_embedding_stays_tied_where_the_adapter_leaves_them_equal(
    doubled: Path, folders: Any, tmp_path: Path
) -> None:
    _, plain = folders("qwen3")
    both = {"model.embed_tokens.weight": torch.ones(256, 64), "lm_head.weight": torch.ones(256, 64)}

    assert not matched(doubled, plain).parted
    assert not matched(doubled, edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(both))).parted


def test_a_tied_head_alone_that_was_resized_is_refused(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("qwen3")
    adapter = edit(
        plain,
        tmp_path / "adapter",
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(260, 64)}),
        modules_to_save=["lm_head"],
    )

    assert refusal(base, adapter, AdapterMismatch) == (
        "the adapter resizes the vocabulary of one embedding only: rows are lm_head.weight 260, "
        "model.embed_tokens.weight 256"
    )


def test_an_adapter_that_was_never_trained_is_noted(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")

    def reset(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    adapter = edit(plain, tmp_path / "adapter", reset)

    assert matched(base, adapter).notes == [
        "every lora_B of the adapter is zero: it was never trained, and changes nothing"
    ]


def test_an_adapter_with_one_trained_layer_is_not_called_untrained(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")

    def reset(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name and Q1 not in name:
                tensor.zero_()

    adapter = edit(plain, tmp_path / "adapter", reset)

    assert matched(base, adapter).notes == []


# What is refused


@pytest.mark.parametrize(
    ("module", "nearest"),
    [
        ("model.layers.7.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ("model.layers.1.self_attn.qproj", "model.layers.1.self_attn.q_proj"),
    ],
)
def test_a_delta_for_a_module_that_the_base_does_not_have_is_refused_with_the_nearest_name(
    module: str, nearest: str, folders: Any, tmp_path: Path
) -> None:
    base, plain = folders("llama")
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(pair(module)))

    assert refusal(base, adapter, AdapterMismatch) == (
        f"{module}: in the adapter, but the base has no such module; the nearest name there is {nearest}"
    )


def test_a_delta_for_a_module_that_nothing_resembles_is_refused(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(pair("quux")))

    assert refusal(base, adapter, AdapterMismatch) == (
        "quux: in the adapter, but the base has no such module; nothing there has a similar name"
    )


def test_two_spellings_of_one_module_are_refused(folders: Any, tmp_path: Path) -> None:
    saved, plain = folders("gpt2")
    base = copied(saved, tmp_path / "base")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(base / WEIGHTS_OF_BASE).items()}
    save_file(tensors, base / WEIGHTS_OF_BASE)
    module = "h.0.attn.c_attn"
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(pair(module, outputs=192)))

    message = refusal(base, adapter, BadAdapter)

    assert message in {
        f"{prefix}{module}: the adapter has two deltas for {module}.weight" for prefix in ("", "transformer.")
    }


def test_two_spellings_of_one_replacement_are_refused(folders: Any, tmp_path: Path) -> None:
    saved, plain = folders("gpt2")
    base = copied(saved, tmp_path / "base")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(base / WEIGHTS_OF_BASE).items()}
    save_file(tensors, base / WEIGHTS_OF_BASE)
    both = {f"{prefix}wte.weight": torch.ones(256, 64) for prefix in ("", "transformer.")}
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(both))

    message = refusal(base, adapter, BadAdapter)

    assert message in {f"{name}: the adapter has two tensors for wte.weight" for name in both}


@pytest.mark.parametrize(
    ("module", "kind", "shape"),
    [("model.embed_tokens", "embedding", (256, 64)), ("model.layers.0.input_layernorm", "other", (64, 64))],
)
def test_lora_on_what_is_not_a_linear_layer_is_refused(
    module: str, kind: str, shape: tuple[int, int], folders: Any, tmp_path: Path
) -> None:
    base, plain = folders("llama")
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(pair(module, 8, *shape)))

    assert refusal(base, adapter, Unsupported) == (
        f"{module}: LoRA on a module of kind {kind!r}; this tool merges linear layers, Conv1D and convolutions "
        "without groups or dilation"
    )


def test_a_delta_that_the_config_does_not_name_is_refused(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama", target_modules=["q_proj"])
    module = "model.layers.1.mlp.up_proj"
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(pair(module, outputs=128)))

    assert refusal(base, adapter, AdapterMismatch) == (
        f"{module}: the adapter has a delta for it, but its target_modules don't name it"
    )


def test_a_delta_that_the_config_excludes_is_refused(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")
    adapter = edit(plain, tmp_path / "adapter", unchanged, exclude_modules=["layers.1.self_attn.q_proj"])

    assert refusal(base, adapter, AdapterMismatch).startswith(f"{Q1}: the adapter has a delta for it, but its target_m")


@pytest.mark.parametrize(
    ("name", "shape"), [("model.norm.weight", (64,)), ("model.layers.0.self_attn.q_proj.weight", (64, 64))]
)
def test_a_replacement_that_the_config_does_not_explain_is_refused(
    name: str, shape: tuple[int, ...], folders: Any, tmp_path: Path
) -> None:
    base, plain = folders("llama")
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update({name: torch.ones(shape)}))

    assert refusal(base, adapter, AdapterMismatch) == (
        f"{name}: in the adapter's file, but neither modules_to_save nor bias says that it replaces the base's"
    )


def test_biases_are_refused_where_the_config_trains_none(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("qwen2", bias="all", target_modules=["q_proj", "v_proj"])
    adapter = edit(plain, tmp_path / "adapter", unchanged, bias="none")

    assert "neither modules_to_save nor bias says" in refusal(base, adapter, AdapterMismatch)


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (64, 32), (128, 64)])
def test_a_delta_of_another_shape_is_refused(outputs: int, inputs: int, folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")
    changed = pair(Q0, outputs=outputs, inputs=inputs)
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(changed))

    assert refusal(base, adapter, AdapterMismatch) == (
        f"{Q0}: lora_B·lora_A is [{outputs}, {inputs}], the base's weight [64, 64]: "
        "was the adapter trained on another base?"
    )


def test_the_delta_of_a_conv1d_is_compared_the_other_way_round(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("gpt2")
    module = "transformer.h.0.attn.c_attn"
    turned = pair(module, outputs=64, inputs=192)
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update(turned))

    assert refusal(base, adapter, AdapterMismatch) == (
        f"{module}: lora_B·lora_A is [64, 192], the base's weight [192, 64]: was the adapter trained on another base?"
    )


@pytest.mark.parametrize("shape", [(256, 32), (256,), (256, 64, 1)], ids=str)
def test_a_replacement_of_another_shape_is_refused(shape: tuple[int, ...], folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama", modules_to_save=["lm_head"])
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update({"lm_head.weight": torch.ones(shape)}))

    assert refusal(base, adapter, AdapterMismatch) == (
        f"lm_head.weight: {list(shape)} in the adapter, [256, 64] in the base"
    )


@pytest.mark.parametrize("resized", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_that_grew_on_one_side_only_is_refused(resized: str, folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama")
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.update({resized: torch.ones(260, 64)}))
    rows = {"lm_head.weight": 256, "model.embed_tokens.weight": 256, resized: 260}

    listed = ", ".join(f"{name} {count}" for name, count in sorted(rows.items()))
    assert refusal(base, adapter, AdapterMismatch) == (
        f"the adapter resizes the vocabulary of one embedding only: rows are {listed}"
    )


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], r".*\.(q|v)_proj", "all-linear"], ids=str)
def test_an_adapter_that_lost_a_layer_is_refused(target: object, folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama", target_modules=["q_proj", "v_proj"])

    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q1}.lora_A.weight"], tensors[f"{Q1}.lora_B.weight"]

    adapter = edit(plain, tmp_path / "adapter", lose, target_modules=target)

    assert refusal(base, adapter, BadAdapter) == (
        f"{Q1}: target_modules names it, but the adapter's file has no tensors for it"
    )


def test_an_adapter_that_lost_a_module_which_it_should_save_whole_is_refused(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("llama", modules_to_save=["lm_head"])
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.__delitem__("lm_head.weight"))

    assert refusal(base, adapter, BadAdapter) == (
        "lm_head.weight: modules_to_save names it, but the adapter's file doesn't have it"
    )


def test_a_tied_head_that_should_be_saved_whole_and_is_not_is_refused(folders: Any, tmp_path: Path) -> None:
    base, plain = folders("qwen3", modules_to_save=["lm_head"])
    adapter = edit(plain, tmp_path / "adapter", lambda tensors: tensors.__delitem__("lm_head.weight"))

    assert refusal(base, adapter, BadAdapter) == (
        "lm_head.weight: modules_to_save names it, but the adapter's file doesn't have it"
    )


def gpt2_without_prefix(saved: Path, to: Path) -> Path:
    """A base of GPT-2 whose tensors lack `transformer.`, as the published one's do."""
    base = copied(saved, to)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(base / WEIGHTS_OF_BASE).items()}
    save_file(tensors, base / WEIGHTS_OF_BASE)
    return base


def test_a_pattern_means_the_names_of_the_adapters_own_file(folders: Any, tmp_path: Path) -> None:
    saved, plain = folders("gpt2")
    base = gpt2_without_prefix(saved, tmp_path / "base")
    adapter = edit(plain, tmp_path / "adapter", unchanged, alpha_pattern={"^transformer.h.0.attn.c_attn": 3})

    found = matched(base, adapter)

    assert found.deltas["h.0.attn.c_attn.weight"].as_json()["lora"]["scaling"] == 3 / 8


def test_patterns_that_know_another_name_than_the_files_are_refused(folders: Any, tmp_path: Path) -> None:
    saved, plain = folders("gpt2")
    base = gpt2_without_prefix(saved, tmp_path / "base")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    adapter = edit(plain, tmp_path / "adapter", rename, alpha_pattern={"^transformer.h.0.attn.c_attn": 3})

    assert refusal(base, adapter, AdapterMismatch) == (
        "h.0.attn.c_attn: rank_pattern or alpha_pattern differ between its names "
        "['h.0.attn.c_attn', 'transformer.h.0.attn.c_attn']"
    )

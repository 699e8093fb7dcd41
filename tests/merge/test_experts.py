"""LoRA on experts, whether adapter and base have them one by one or all in one tensor."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import Recipe, Resources, convert
from converter.errors import AdapterMismatch, BadAdapter, ConversionRefused, Unsupported
from converter.merge.keys import PREFIX
from tests.merge.merges import (
    REFERENCE,
    different,
    edit_config,
    save_exact,
    save_gpt_oss,
    save_llama4,
    save_tuned,
    says,
)
from tests.merge.test_kinds import EXPERTS, lora
from tests.models import load, save_base
from tests.reference import tensors_of

MAKERS = {"gpt_oss": save_gpt_oss, "llama4": save_llama4}
LAYERS = {"mixtral": ["w1", "w3", "w2"], "qwen2_moe": ["gate_proj", "up_proj", "down_proj"]}
"""Of one expert: gate and up, which transformers 5 has in one parameter, then down."""
SCALING = 12 / 8


def save_model(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    return MAKERS[name](folder, dtype) if name in MAKERS else save_base(folder, name, dtype)


def save_stacked(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same base with all experts in one tensor."""
    load(base, dtype=dtype).save_pretrained(folder, save_original_format=False)
    return folder


def pair(outputs: int, inputs: int, seed: int, rank: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, inputs), (outputs, rank))
    a, b = (torch.randn(shape, generator=generator) * 0.05 for shape in shapes)
    return a, b


def save_with(folder: Path, base: Path, pairs: dict[str, tuple[Tensor, Tensor]], **options: Any) -> Path:
    """An adapter for q_proj, and for these modules, which no model of transformers 5 has."""
    save_tuned(folder, base, lora(target_modules=["q_proj"]))
    file = folder / "adapter_model.safetensors"
    found = load_file(file)
    for module, (a, b) in pairs.items():
        found |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file(found, file)
    edit_config(folder, target_modules=["q_proj", *sorted({name.rpartition(".")[2] for name in pairs})])
    edit_config(folder, **options)
    return folder


def pairs_of(base: Path, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA for some linear layers of every expert of a base that has a tensor for each."""
    names = [name.removesuffix(".weight") for name in sorted(tensors_of(base)) if ".experts." in name]
    tensors = tensors_of(base)
    chosen = [name for name in names if name.rpartition(".")[2] in layers]
    return {name: pair(*tensors[f"{name}.weight"].shape, seed) for seed, name in enumerate(chosen)}


def stacked(tensors: dict[str, Tensor], layers: list[str], prefix: str) -> Tensor:
    """What transformers 5 makes of the matrices of some layers of all experts."""
    names = [[f"{prefix}.{expert}.{layer}.weight" for layer in layers] for expert in range(4)]
    return torch.stack([torch.cat([tensors[name] for name in one]) for one in names])


@pytest.mark.parametrize("on_disk", ["one by one", "in one tensor"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "llama4"])
def test_target_parameters_are_merged_to_what_was_trained_however_the_base_lies_on_disk(
    name: str, on_disk: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", name)
    if on_disk == "in one tensor":
        base = save_stacked(base, tmp_path / "stacked")
    inside = "feed_forward" if name == "llama4" else "mlp"
    parameters = [f"{inside}.experts.gate_up_proj", f"{inside}.experts.down_proj"]
    tuned = save_tuned(tmp_path / "adapter", base, lora(target_modules=["q_proj"], target_parameters=parameters))
    trained = says(tuned)

    ours = load(save_exact(base, tmp_path / "adapter", tmp_path / "ours"))

    theirs = PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
    assert different(ours.state_dict(), theirs.state_dict()) == []
    torch.testing.assert_close(says(ours), trained, rtol=1e-4, atol=1e-5)
    assert (trained - says(load(base))).abs().max() > 1e-3


@pytest.mark.parametrize("layers", [["w1", "w2", "w3"], ["w1", "w3"], ["w3"]], ids=" ".join)
def test_lora_on_single_experts_is_merged_alike_however_the_base_lies_on_disk(
    layers: list[str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.float32)
    pairs = pairs_of(base, layers)
    adapter = save_with(tmp_path / "adapter", base, pairs, use_rslora=True, alpha_pattern={"w1": 20})

    apart = tensors_of(save_exact(base, adapter, tmp_path / "apart"))

    together = tensors_of(save_exact(save_stacked(base, tmp_path / "stacked"), adapter, tmp_path / "together"))
    before = tensors_of(base)
    for module, (a, b) in pairs.items():
        scaling = (20 if module.endswith("w1") else 12) / 8**0.5
        assert torch.equal(apart[f"{module}.weight"], before[f"{module}.weight"] + (b @ a) * scaling)
    for layer in (0, 1):
        on_disk, loaded = (f"model.layers.{layer}.{owner}.experts" for owner in ("block_sparse_moe", "mlp"))
        for own, parts in (("gate_up_proj", ["w1", "w3"]), ("down_proj", ["w2"])):
            assert torch.equal(together[f"{loaded}.{own}"], stacked(apart, parts, on_disk))


@pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys did not match:RuntimeWarning"
)  # of PEFT's own conversion
def test_lora_on_single_experts_is_merged_to_pefts_bits_where_it_understands_them(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.float32)
    adapter = save_with(tmp_path / "adapter", base, pairs_of(base, LAYERS["mixtral"]))
    trained = PeftModel.from_pretrained(load(base), adapter).eval()
    said = says(trained)

    ours = load(save_exact(save_stacked(base, tmp_path / "stacked"), adapter, tmp_path / "ours"))

    torch.testing.assert_close(says(ours), said, rtol=1e-4, atol=1e-5)
    assert different(ours.state_dict(), trained.merge_and_unload().state_dict()) == []
    assert (says(load(base)) - said).abs().max() > 0.01


def test_lora_on_single_experts_that_peft_drops_is_merged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe", torch.float32)
    pairs = pairs_of(base, LAYERS["qwen2_moe"])
    adapter = save_with(tmp_path / "adapter", base, pairs)

    ours = tensors_of(save_exact(save_stacked(base, tmp_path / "stacked"), adapter, tmp_path / "ours"))

    expected = tensors_of(base)
    for module, (a, b) in pairs.items():
        expected[f"{module}.weight"] += (b @ a) * SCALING
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp.experts"
        for own, parts in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
            assert torch.equal(ours[f"{prefix}.{own}"], stacked(expected, parts, prefix))


def test_experts_that_unsloth_took_apart_are_merged_into_those_of_gpt_oss(tmp_path: Path) -> None:
    base = save_gpt_oss(tmp_path / "base", torch.float32)
    shapes = {"gate_up_projs": (192, 64), "down_projs": (64, 96)}  # of the linear layers that it makes
    pairs = {
        f"model.layers.{layer}.mlp.experts.{name}.{expert}": pair(*shape, 10 * layer + expert)
        for layer in (0, 1)
        for name, shape in shapes.items()
        for expert in (0, 1, 2)
    }
    named = r"(?:.*\.q_proj|.*\.experts\.(?:gate_up|down)_projs\.\d+)"
    adapter = save_with(tmp_path / "adapter", base, pairs, target_modules=named)

    ours = tensors_of(save_exact(base, adapter, tmp_path / "ours"))

    expected = tensors_of(base)
    for module, (a, b) in pairs.items():
        name, expert = module.rsplit(".", 1)
        expected[name.removesuffix("s")][int(expert)] += (b @ a).T * SCALING
    assert all(torch.equal(ours[name], value) for name, value in expected.items() if ".experts." in name)


def test_tiles_and_threads_leave_the_bytes_as_they_are(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.bfloat16)
    together = save_stacked(base, tmp_path / "stacked", torch.bfloat16)
    adapter = save_with(tmp_path / "adapter", base, pairs_of(base, LAYERS["mixtral"]))

    convert(base, adapter, tmp_path / "apart", REFERENCE)
    convert(together, adapter, tmp_path / "whole", REFERENCE, Resources(threads=1))
    convert(together, adapter, tmp_path / "tiles", REFERENCE, Resources(threads=2, tile_weights=(4096, 8192)))

    assert different(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "tiles")) == []
    one, other = (load(tmp_path / name).state_dict() for name in ("apart", "whole"))
    assert different(one, other) == []
    assert different(one, load(base).state_dict()) != []


def test_what_no_expert_of_the_adapter_changes_keeps_its_bits(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.float32)
    together = save_stacked(base, tmp_path / "stacked")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors = tensors_of(together)
    tensors[name][2, :, :5] = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0])
    save_file(tensors, together / "model.safetensors", metadata={"format": "pt"})
    module = "model.layers.1.block_sparse_moe.experts.3.w1"
    adapter = save_with(tmp_path / "adapter", base, {module: pair(128, 64, 1)}, target_modules=f"{module}|.*q_proj")

    convert(together, adapter, tmp_path / "out", REFERENCE)

    before, after = tensors[name].bfloat16(), tensors_of(tmp_path / "out")[name]
    changed = (before.view(torch.int16) != after.view(torch.int16)).any(dim=2)
    assert changed[3, :128].any()
    changed[3, :128] = False
    assert not changed.any()


def test_half_the_scale_is_half_of_each_delta(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.float32)
    together = save_stacked(base, tmp_path / "stacked")
    pairs = pairs_of(base, ["w1"])
    whole = save_with(tmp_path / "whole", base, pairs)
    half = shutil.copytree(whole, tmp_path / "half")
    edit_config(half, lora_alpha=6)

    convert(together, whole, tmp_path / "scaled", Recipe(quant_type="none", scale=0.5))
    convert(together, half, tmp_path / "out", Recipe(quant_type="none"))

    assert different(tensors_of(tmp_path / "scaled"), tensors_of(tmp_path / "out")) == []


def lost(pairs: dict[str, Any]) -> None:
    del pairs["model.layers.1.block_sparse_moe.experts.2.w1"]


def too_wide(pairs: dict[str, Any]) -> None:
    pairs["model.layers.1.block_sparse_moe.experts.2.w1"] = pair(160, 64, 1)


def of_another_rank(pairs: dict[str, Any]) -> None:
    pairs["model.layers.1.block_sparse_moe.experts.2.w1"] = pair(128, 64, 1, rank=4)


REFUSED: dict[str, tuple[Any, type[ConversionRefused], str]] = {
    "one is lost": (lost, BadAdapter, "target_modules names it, but the adapter's file has no tensors for it"),
    "too wide": (too_wide, AdapterMismatch, "lora_B·lora_A is [160, 64], the base's layer [128, 64]"),
    "another rank": (of_another_rank, BadAdapter, "rank 4 in the file, 8 in adapter_config.json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_expert_that_does_not_fit_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    change, error, message = REFUSED[kind]
    base = save_base(tmp_path / "base", "mixtral")
    pairs = pairs_of(base, ["w1"])
    change(pairs)
    adapter = save_with(tmp_path / "adapter", base, pairs)

    with pytest.raises(error, match=r"layers\.1\.\w+\.experts\.2\.w1: " + re.escape(message)):
        convert(save_stacked(base, tmp_path / "stacked"), adapter, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_dora_on_one_expert_of_a_stack_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    adapter = save_with(tmp_path / "adapter", base, pairs_of(base, ["w2"]))
    file = adapter / "adapter_model.safetensors"
    module = "model.layers.0.block_sparse_moe.experts.0.w2"
    save_file({**load_file(file), f"{PREFIX}{module}.lora_magnitude_vector": torch.ones(64)}, file)

    with pytest.raises(
        Unsupported, match=r"experts\.0\.w2: lora_magnitude_vector: not merged into a tensor that holds"
    ):
        convert(save_stacked(base, tmp_path / "stacked"), adapter, tmp_path / "out")


def test_another_tuner_on_one_expert_of_a_stack_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    save_tuned(tmp_path / "adapter", base, LoHaConfig(r=4, alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    old, new = "layers.0.self_attn.q_proj", "layers.0.block_sparse_moe.experts.0.w1"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)
    edit_config(tmp_path / "adapter", target_modules=["q_proj", "w1"])

    with pytest.raises(Unsupported, match=r"experts\.0\.w1: only LoRA is merged into one expert of a tensor"):
        convert(save_stacked(base, tmp_path / "stacked"), tmp_path / "adapter", tmp_path / "out")


def test_experts_of_which_the_base_has_no_more_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    pairs = pairs_of(base, ["w1"])
    pairs["model.layers.0.block_sparse_moe.experts.4.w1"] = pair(128, 64, 1)
    adapter = save_with(tmp_path / "adapter", base, pairs)

    with pytest.raises(AdapterMismatch, match=r"experts\.4\.w1: in the adapter, but the base has no such module"):
        convert(save_stacked(base, tmp_path / "stacked"), adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "layout", "said"),
    [("unsloth/some", None, True), ("unsloth/some", "rank_major", False), ("some", None, False)],
)
def test_an_adapter_of_unsloth_that_does_not_say_its_layout_gets_a_note(
    named: str, layout: str | None, said: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe")
    save_tuned(tmp_path / "adapter", base, lora(target_modules=["q_proj"], target_parameters=EXPERTS))
    edit_config(tmp_path / "adapter", base_model_name_or_path=named, lora_B_layout=layout)

    notes = convert(base, tmp_path / "adapter", tmp_path / "out").plan.notes

    assert any("Unsloth grouped the columns of lora_B by expert" in note for note in notes) is said


def test_a_parameter_of_experts_that_target_parameters_lacks_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe")
    save_tuned(tmp_path / "adapter", base, lora(target_modules=["q_proj"], target_parameters=EXPERTS))
    edit_config(tmp_path / "adapter", target_parameters=EXPERTS[:1])

    with pytest.raises(
        BadAdapter, match=r"experts: the file has base_layer\.lora_A, but target_parameters names .* alone"
    ):
        convert(base, tmp_path / "adapter", tmp_path / "out")

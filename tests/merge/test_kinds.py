"""Adapters of each kind, from their files to the merged checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, TrainableTokensConfig
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file

from converter import Recipe, Resources, convert
from converter.errors import BadAdapter, Unsupported
from tests.merge.merges import (
    different,
    edit_config,
    merged_by_peft,
    merged_by_us,
    save_exact,
    save_gpt_oss,
    save_llama4,
    save_tuned,
    save_vit,
    says,
)
from tests.models import load, save_base
from tests.reference import tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # of norms, by PEFT

DTYPES = [torch.bfloat16, torch.float32]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 12, "task_type": "CAUSAL_LM", "target_modules": ATTENTION, **settings})


KINDS: dict[str, tuple[str, Any]] = {
    "LoRA": ("llama", lora()),
    "DoRA": ("llama", lora(use_dora=True, use_rslora=True)),
    "DoRA on Conv1D": ("gpt2", lora(use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "lora_bias": ("qwen2", lora(lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"])),
    "embedding": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "trained tokens": ("llama", lora(trainable_token_indices=[5, 17, 250])),
    "blocks": (
        "llama",
        lora(
            use_bdlora=BdLoraConfig(
                nblocks=2, target_modules_bd_a=["q_proj", "k_proj"], target_modules_bd_b=["v_proj"], match_strict=False
            )
        ),
    ),
    "fused experts": ("gpt_oss", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "experts one by one": ("qwen2_moe", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "experts in part": ("mixtral", lora(target_modules=["q_proj"], target_parameters=EXPERTS[:1])),
    "fused experts of Llama 4": (
        "llama4",
        lora(
            target_modules=["q_proj"],
            target_parameters=["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
        ),
    ),
    "router": ("qwen2_moe", lora(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])),
    "convolution": ("vit", lora(task_type=None, target_modules=["projection"])),
    "DoRA on a convolution": ("vit", lora(task_type=None, target_modules=["projection"], use_dora=True)),
    "MiCA": ("llama", lora(init_lora_weights="mica")),
    "LN tuning": ("llama", LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm", "q_proj"])),
    "LN tuning with a bias": ("gpt2", LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_1", "ln_f"])),
    "trained tokens alone": (
        "llama",
        TrainableTokensConfig(token_indices=[5, 17, 250], target_modules=["embed_tokens"]),
    ),
}


MAKERS = {"gpt_oss": save_gpt_oss, "llama4": save_llama4, "vit": save_vit}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_to_pefts_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    base = MAKERS[name](tmp_path / "base", dtype) if name in MAKERS else save_base(tmp_path / "base", name, dtype)
    save_tuned(tmp_path / "adapter", base, config)

    ours = merged_by_us(base, tmp_path / "adapter", dtype, tmp_path / "ours")

    theirs = merged_by_peft(base, tmp_path / "adapter", dtype, tmp_path / "theirs")
    assert different(ours, theirs) == []
    assert different(ours, tensors_of(base)) != []


def test_norms_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, KINDS["LN tuning"][1])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1.input" not in name}, file)

    with pytest.raises(BadAdapter, match=r"layers\.1\.input_layernorm\.weight: .* names it, but the adapter's file"):
        convert(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("kind", ["LN tuning", "trained tokens alone"])
def test_an_option_that_such_a_tuner_does_not_have_is_refused(kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, KINDS[kind][1])
    edit_config(tmp_path / "adapter", an_option_of_next_year=True)

    with pytest.raises(
        Unsupported, match="an_option_of_next_year = 'True' is not an option that this tool understands"
    ):
        convert(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("kind", ["LN tuning", "trained tokens alone"])
def test_what_only_replaces_has_no_scale(kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, KINDS[kind][1])

    with pytest.raises(Unsupported, match="`scale` has no meaning for this adapter: it only replaces tensors and rows"):
        convert(base, tmp_path / "adapter", tmp_path / "out", Recipe(scale=0.8))


# Where PEFT merges something else than what it trained


TIED: dict[str, tuple[LoraConfig, bool]] = {
    "LoRA on the embedding": (lora(target_modules=["embed_tokens", "q_proj"]), False),
    "LoRA on both as one": (lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), True),
    "both saved as one": (lora(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True), True),
    "the embedding saved as one": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
    "trained tokens": (lora(trainable_token_indices=[5, 17, 250]), True),
    "DoRA on the embedding": (lora(target_modules=["embed_tokens", "q_proj"], use_dora=True), False),
}


@pytest.mark.parametrize("both_on_disk", [False, True])
@pytest.mark.parametrize("kind", TIED)
def test_of_tied_embeddings_the_merged_model_says_what_the_trained_one_said(
    kind: str, both_on_disk: bool, tmp_path: Path
) -> None:
    config, stays_tied = TIED[kind]
    base = save_base(tmp_path / "base", "llama", torch.float32, tie_word_embeddings=True)
    if both_on_disk:
        tensors = tensors_of(base)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tuned = save_tuned(tmp_path / "adapter", base, config)

    merged = load(save_exact(base, tmp_path / "adapter", tmp_path / "ours"))

    torch.testing.assert_close(says(merged), says(tuned), rtol=1e-4, atol=1e-5)
    assert (says(merged) - says(load(base))).abs().max() > 0.01
    assert merged.config.tie_word_embeddings is stays_tied
    assert ("lm_head.weight" in tensors_of(tmp_path / "ours")) is (both_on_disk or not stays_tied)


def test_dora_on_an_embedding_is_converted_in_any_tiles_to_what_was_trained(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32, vocab_size=3000)
    tuned = save_tuned(tmp_path / "adapter", base, lora(target_modules=["embed_tokens"], use_dora=True))
    recipe = Recipe(quant_type="none", merge_precision="reference", dtype="bfloat16")

    convert(base, tmp_path / "adapter", tmp_path / "whole", recipe, Resources(threads=1))
    convert(base, tmp_path / "adapter", tmp_path / "tiles", recipe, Resources(threads=2, tile_weights=(4096, 8192)))

    assert different(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "tiles")) == []
    exact = load(save_exact(base, tmp_path / "adapter", tmp_path / "exact"))
    torch.testing.assert_close(says(exact), says(tuned), rtol=1e-4, atol=1e-5)
    assert different(tensors_of(tmp_path / "whole"), tensors_of(base)) != []


# Layouts of experts that PEFT doesn't have any more


@pytest.mark.parametrize("layout", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "before 0.19"])
def test_experts_are_merged_in_the_layout_in_which_they_were_trained(old: bool, layout: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe", torch.float32)
    config = lora(target_modules=["q_proj"], target_parameters=EXPERTS)
    save_tuned(tmp_path / "adapter", base, config)
    plain = tensors_of(save_exact(base, tmp_path / "adapter", tmp_path / "plain"))
    name = "model.layers.1.mlp.experts"
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    for key in [key for key in saved if ".experts." in key and "lora_B" in key]:
        first = key.replace("lora_B", "lora_A")
        a, b = saved[first].view(4, 8, -1), saved[key].view(-1, 8, 4)
        if old:  # in and out were exchanged, and the delta turned
            a, b = b.permute(2, 1, 0), a.permute(2, 1, 0)
        b = b if layout == "rank_major" else b.transpose(1, 2)
        saved[first], saved[key] = a.reshape(32, -1).contiguous(), b.reshape(b.shape[0], 32).contiguous()
    save_file(saved, file)
    edit_config(tmp_path / "adapter", lora_B_layout=layout, peft_version="0.18.0" if old else "0.21.2")

    ours = tensors_of(save_exact(base, tmp_path / "adapter", tmp_path / "ours"))

    torch.testing.assert_close(ours, plain)
    assert any(name in one for one in different(ours, tensors_of(base)))


def test_square_experts_of_an_unknown_version_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe", torch.float32)  # its down_proj is 64 by 64
    save_tuned(tmp_path / "adapter", base, lora(target_modules=["q_proj"], target_parameters=EXPERTS[1:]))
    edit_config(tmp_path / "adapter", peft_version=None)

    with pytest.raises(Unsupported, match=r"are square, and adapter_config\.json has no peft_version"):
        save_exact(base, tmp_path / "adapter", tmp_path / "ours")

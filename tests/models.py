"""Tiny random models and adapters, of real architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, PreTrainedModel

from converter import Job, Recipe

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}
"""Of a config whose class has these names for its sizes."""

# Sizes that bitsandbytes' CPU forward accepts: in_features a multiple of 64, out_features of 32.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
_NO_GROUPS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_ALL = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": ("llama", "LlamaForCausalLM", SIZES, _ALL),
    "mistral": ("mistral", "MistralForCausalLM", SIZES, _ALL),
    "granite": ("granite", "GraniteForCausalLM", SIZES, _ALL),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", SIZES, _ALL),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}, _ALL),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", {**SIZES, "head_dim": 16}, _ALL),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", {**SIZES, "head_dim": 16}, _ALL),
    "phi3": ("phi3", "Phi3ForCausalLM", SIZES, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": (
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 128, "bos_token_id": 1,
         "eos_token_id": 2},
        ["c_attn", "c_proj", "c_fc"],
    ),
    "gpt_neox": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _NO_GROUPS,
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", {**SIZES, "num_local_experts": 4}, _ATTENTION),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**SIZES, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        _ATTENTION,
    ),
    "opt": (
        "opt",
        "OPTForCausalLM",
        {**_NO_GROUPS, "ffn_dim": 128, "word_embed_proj_dim": 64},
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
}  # fmt: skip


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of one of ARCHITECTURES, seeded."""
    model_type, class_name, settings, _ = ARCHITECTURES[name]
    config = CONFIG_MAPPING[model_type](**{**settings, **changes})
    config.architectures = [class_name]
    torch.manual_seed(len(name))
    model: PreTrainedModel = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            # Biases and norms begin as zeros and ones, which would hide that they went astray.
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))) * 0.05
    return model


def save_base(
    folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = False, **changes: Any
) -> Path:
    """A random base in `folder`."""
    model = make_model(name, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    return folder


def save_adapter(
    folder: Path, base: Path, name: str, dtype: torch.dtype = torch.float32, *, scale: float = 0.05, **settings: Any
) -> Path:
    """A random adapter for a base of `save_base`, on all its linear layers unless `settings` says otherwise."""
    model = load(base)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ARCHITECTURES[name][3], **settings}
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in sorted(tuned.named_parameters()):
            trained = "lora_" in key or "modules_to_save" in key
            if trained or (key.endswith("bias") and parameter.requires_grad):
                parameter += torch.randn(parameter.shape, generator=generator) * scale
    tuned.to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    """A model as users load it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model: PreTrainedModel = model_class.from_pretrained(folder, **settings)
    return model.eval()


def save_originals(folder: Path) -> Path:
    """base, sharded and adapter, for tests to copy and to damage."""
    save_base(folder / "base", "llama")
    save_base(folder / "sharded", "llama", sharded=True)
    save_adapter(folder / "adapter", folder / "base", "llama")
    return folder


def save_large_pair(folder: Path) -> tuple[Path, Path]:
    """A base in several files, which a conversion can make several of, too, and an adapter."""
    base = save_base(folder / "base", "llama", sharded=True, num_hidden_layers=1, vocab_size=9000)
    return base, save_adapter(folder / "adapter", base, "llama")


def save_four(folder: Path) -> Path:
    """A base, and adapters a0 to a3 beside it."""
    base = save_base(folder / "base", "llama", sharded=True)
    for number in range(4):
        save_adapter(folder / f"a{number}", base, "llama", scale=0.03 * (number + 1), target_modules=["q_proj"])
    return folder


def four_jobs(inputs: Path, out: Path) -> list[Job]:
    """Of `save_four`, two of one recipe, two of another: two parts of two jobs, whatever is predicted."""
    recipes = [Recipe(), Recipe(block_size=128)]
    return [Job(out / f"a{n}", inputs / f"a{n}", inputs / "base", recipes[n // 2]) for n in range(4)]

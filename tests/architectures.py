"""Tiny random models of many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.models import SIZES

# What configs call their sizes; each gets those that it has.
_SIZES: dict[str, Any] = {
    **SIZES,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 128,
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 8,
}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16,
           "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1}  # fmt: skip

KINDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "decoders": {
        "llama": ("LlamaForCausalLM", {}),
        "mistral": ("MistralForCausalLM", {}),
        "granite": ("GraniteForCausalLM", {}),
        "qwen2": ("Qwen2ForCausalLM", {}),
        "qwen3": ("Qwen3ForCausalLM", {}),
        "gemma": ("GemmaForCausalLM", {}),
        "gemma2": ("Gemma2ForCausalLM", {}),
        "gemma3_text": ("Gemma3ForCausalLM", {}),
        "phi": ("PhiForCausalLM", {}),
        "phi3": ("Phi3ForCausalLM", {}),
        "gpt2": ("GPT2LMHeadModel", {}),
        "gpt_neo": ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
        "gpt_neox": ("GPTNeoXForCausalLM", {}),
        "gptj": ("GPTJForCausalLM", {"rotary_dim": 8}),
        "gpt_bigcode": ("GPTBigCodeForCausalLM", {}),
        "codegen": ("CodeGenForCausalLM", {"rotary_dim": 8}),
        "opt": ("OPTForCausalLM", {}),
        "bloom": ("BloomForCausalLM", {}),
        "mpt": ("MptForCausalLM", {}),
        "stablelm": ("StableLmForCausalLM", {}),
        "starcoder2": ("Starcoder2ForCausalLM", {}),
        "olmo": ("OlmoForCausalLM", {}),
        "olmo2": ("Olmo2ForCausalLM", {}),
        "cohere": ("CohereForCausalLM", {}),
        "cohere2": ("Cohere2ForCausalLM", {}),
        "nemotron": ("NemotronForCausalLM", {}),
        "smollm3": ("SmolLM3ForCausalLM", {}),
        "glm": ("GlmForCausalLM", {}),
        "glm4": ("Glm4ForCausalLM", {}),
        "biogpt": ("BioGptForCausalLM", {}),
        "xglm": ("XGLMForCausalLM", {}),
        "ernie4_5": ("Ernie4_5ForCausalLM", {}),
        "exaone4": ("Exaone4ForCausalLM", {}),
        "seed_oss": ("SeedOssForCausalLM", {}),
        "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {"head_dim": 16}),
        "arcee": ("ArceeForCausalLM", {}),
    },
    "mixtures of experts": {
        "mixtral": ("MixtralForCausalLM", {}),
        "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
        "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
        "olmoe": ("OlmoeForCausalLM", {}),
        "granitemoe": ("GraniteMoeForCausalLM", {}),
        "phimoe": ("PhimoeForCausalLM", {}),
        "deepseek_v2": ("DeepseekV2ForCausalLM", _LATENT),
        "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT),
        "gpt_oss": ("GptOssForCausalLM", {}),
    },
    "state spaces and hybrids": {
        "mamba": ("MambaForCausalLM", {}),
        "mamba2": ("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 16, "n_groups": 1}),
        "lfm2": ("Lfm2ForCausalLM", {}),
        "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"block_types": ("recurrent", "attention"), "lru_width": 64}),
    },
    "encoders": {
        "bert": ("BertForMaskedLM", {}),
        "roberta": ("RobertaForMaskedLM", {}),
        "distilbert": ("DistilBertForMaskedLM", {}),
        "modernbert": ("ModernBertForMaskedLM", {}),
        "electra": ("ElectraForMaskedLM", {}),
        "deberta-v2": ("DebertaV2ForMaskedLM", {}),
        "albert": ("AlbertForMaskedLM", {}),
        "xlm-roberta": ("XLMRobertaForSequenceClassification", {}),
    },
    "encoder-decoders": {
        "t5": ("T5ForConditionalGeneration", {}),
        "mt5": ("MT5ForConditionalGeneration", {}),
        "bart": ("BartForConditionalGeneration", {}),
        "mbart": ("MBartForConditionalGeneration", {}),
    },
    "vision": {
        "vit": ("ViTForImageClassification", {}),
        "dinov2": ("Dinov2Model", {}),
        "siglip_vision_model": ("SiglipVisionModel", {}),
        "clip_vision_model": ("CLIPVisionModel", {}),
    },
    "speech": {
        "whisper": (
            "WhisperForConditionalGeneration",
            {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64},
        ),
        "wav2vec2": ("Wav2Vec2ForCTC", {}),
        "hubert": ("HubertForCTC", {}),
    },
}
TINY = {name: tiny for kind in KINDS.values() for name, tiny in kind.items()}
WITHOUT_ADAPTER = ("mamba", "mamba2", "wav2vec2", "hubert")
"""PEFT doesn't take all linear layers of a Mamba, nor these models of speech without a token embedding."""


def save_tiny(folder: Path, name: str, **more: Any) -> Path:
    """A random base in bfloat16, seeded; `more` of its config."""
    class_name, changes = TINY[name]
    config_class = CONFIG_MAPPING[name]
    usual = config_class()
    config = config_class(**{key: size for key, size in _SIZES.items() if hasattr(usual, key)} | changes | more)
    config.architectures = [class_name]
    torch.manual_seed(len(name))
    getattr(transformers, class_name)(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_tiny_adapter(folder: Path, base: Path, name: str) -> Path:
    """A random adapter for all linear layers."""
    model = getattr(transformers, TINY[name][0]).from_pretrained(base, dtype=torch.bfloat16)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in sorted(tuned.named_parameters()):
            if "lora_B" in key:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    tuned.save_pretrained(folder)
    return folder


def said(folder: Path) -> torch.Tensor:
    """The first output of a model, for fixed inputs of its kind."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    for module in model.modules():
        # bitsandbytes' fast path for some CPUs takes only weights of certain sizes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokens, generator = torch.tensor([[3, 7, 11, 19, 23, 5, 9, 2]]), torch.Generator().manual_seed(0)
    main: Any = {
        "input_ids": lambda: tokens,
        "pixel_values": lambda: torch.randn(1, 3, config.image_size, config.image_size, generator=generator),
        "input_values": lambda: torch.randn(1, 4000, generator=generator),
        "input_features": lambda: torch.randn(1, config.num_mel_bins, 64, generator=generator),
    }[model.main_input_name]()
    inputs = {model.main_input_name: main.to(model.dtype) if main.is_floating_point() else main}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :4]
    with torch.no_grad():
        result: torch.Tensor = model(**inputs)[0]
    return result

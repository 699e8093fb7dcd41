"""The output's config.json: the base's own JSON, with only what must change.

It is never written by transformers: version 5 renames keys that version 4 then misses, silently. What version 5 has
renamed is given in both spellings, so that 4.46, 4.57 and 5 read the same model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from converter.errors import BadCheckpoint, Unsupported
from converter.model.architecture import Architecture
from converter.quantize.formats import format_of
from converter.read.checkpoint import MAX_CONFIG_BYTES
from converter.recipe import Recipe


def refuse_unconvertible(config: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> None:
    """Refuse a base whose config says that its weights are quantized, or that it needs code of its own."""
    if len(json.dumps(config, indent=2)) > MAX_CONFIG_BYTES // 2:  # as it will be written, with what is added
        raise BadCheckpoint(f"{where}: config.json has more than {MAX_CONFIG_BYTES // 2:,} bytes when it is indented")
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
            raise Unsupported(
                f"{where}: the base is quantized already ({method}); give the 16-bit model that it was made from"
            )
    if config.get("auto_map") and not trust_remote_code:
        raise Unsupported(
            f"{where}: config.json names Python code of the base (auto_map); with --trust-remote-code its files are "
            "copied, and still never run"
        )


def output_config(
    base: Mapping[str, Any],
    recipe: Recipe,
    architecture: Architecture,
    *,
    vocabulary: int | None,
    untied: bool,
) -> dict[str, Any]:
    """The base's config with dtype, quantization, vocabulary and tying as the output has them."""
    config = copy.deepcopy(dict(base))
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    for part in parts:
        _spell_rope_both_ways(part)
        if part is config or "dtype" in part or "torch_dtype" in part:
            # transformers 4.46 knows only torch_dtype, 5 prefers dtype; all take both.
            part["dtype"] = part["torch_dtype"] = recipe.dtype
        if vocabulary is not None and ("vocab_size" in part or len(parts) == 1):
            part["vocab_size"] = vocabulary
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    quantization = format_of(recipe).config(architecture.skip_modules)
    if quantization is not None:
        config["quantization_config"] = quantization
    return config


def _spell_rope_both_ways(part: dict[str, Any]) -> None:
    """Add transformers 4's rope_theta and rope_scaling beside version 5's rope_parameters.

    The other direction isn't needed: version 5 reads the old keys. Parameters by layer type (Gemma 3) become version
    4's pair of keys for full and for sliding attention.
    """
    rope = part.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return
    full = rope
    if all(isinstance(value, Mapping) for value in rope.values()):
        full = rope.get("full_attention") or next(iter(rope.values()))
        sliding = rope.get("sliding_attention") or {}
        if "rope_theta" in sliding:
            part.setdefault("rope_local_base_freq", sliding["rope_theta"])
    if "rope_theta" in full:
        part.setdefault("rope_theta", full["rope_theta"])
    if "partial_rotary_factor" in full:
        part.setdefault("partial_rotary_factor", full["partial_rotary_factor"])
    if part.get("model_type") == "gpt_neox":
        part.setdefault("rotary_emb_base", full.get("rope_theta", 10_000))
        part.setdefault("rotary_pct", full.get("partial_rotary_factor", 0.25))
    if full.get("rope_type", "default") != "default":
        rest = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
        part.setdefault("rope_scaling", rest)

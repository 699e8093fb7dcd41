"""The rope parameters of a config in the words of transformers 4, beside those of version 5; and a number of experts.

Version 5 has one `rope_parameters`, for all layers or by layer type; version 4 has rope_theta, rope_scaling and a few
keys of single families. Version 5 reads the old keys, too, so a base that has them needs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from converter.model.ask import reads_alike

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NO_SCALING = ("rope_theta", "partial_rotary_factor")

# What version 4.57 makes of `rope_scaling`, by family; tools/ropes.py compares what both versions compute.
_ASKS_FOR_SCALING = {"mllama", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "gpt_oss", "apertus"}
"""Without the key it fails, or takes a scaling of its own."""
_SECTIONS = {
    **{family: [16, 24, 24] for family in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni")},
    **{family: [8, 12, 12] for family in ("glm4v", "glm4v_moe")},
}
"""It fails without `mrope_section`; version 5 takes these where none are stated."""
_PHI, _OLMO = ("phi3", "phi4_multimodal"), ("olmo", "olmo2", "chameleon")
_KINDS = {"nemotron": (), "llama4": ("llama3",), **dict.fromkeys(_OLMO, ("linear", "dynamic"))}
"""The kinds of scaling that it has, if not all."""
_EXACTLY = {
    **dict.fromkeys(_PHI, ("type", "short_factor", "long_factor")),
    **dict.fromkeys(_OLMO, ("type", "factor")),
}
"""It takes these keys and no others."""
_ROTARY_PCT = {"gpt_neox": 0.25, "gpt_neox_japanese": 1.0}
"""`partial_rotary_factor` of those that call it so, where none is stated."""


def in_words_of_all_versions(config: dict[str, Any], *, known: bool) -> tuple[dict[str, Any], list[str]]:
    """The config with both spellings, and what a user should know where there are none that all versions read alike.

    `known`: transformers has the class, so it can be asked how it reads them.
    """
    spelled, complete = with_old_keys(config)
    if known and spelled != config and not reads_alike(config, spelled):
        spelled, complete = config, False
    if complete:
        return spelled, []
    return spelled, ["config.json has its rope parameters in the words of transformers 5: earlier versions miss them"]


def with_old_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The config with version 4's keys in each part that has `rope_parameters`; and whether these say all."""
    spelled = copy.deepcopy(dict(config))
    complete = True
    for part in _parts(spelled):
        if str(part.get("model_type")).startswith("qwen3_moe") and "num_local_experts" in part:
            part.setdefault("num_experts", part["num_local_experts"])
        rope = part.get("rope_parameters")
        if isinstance(rope, Mapping) and rope:
            keys = _old_keys(str(part.get("model_type")), rope)
            complete = complete and keys is not None
            for key, value in (keys or {}).items():
                part.setdefault(key, value)
    return spelled, complete


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config, and those of its parts, such as its language model."""
    yield config
    for key, part in config.items():
        if isinstance(part, dict) and ("model_type" in part or key == "text_config"):
            yield from _parts(part)


def _old_keys(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """None: version 4 has no words for it."""
    if not rope.keys() & _LAYER_TYPES:
        return _same_everywhere(model_type, rope)
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention", rope.get("full_attention"))
    if rope.keys() - _LAYER_TYPES or not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        return None
    scaling, scaling_of_sliding = _scaling(full), _scaling(sliding)
    if model_type.startswith("modernbert"):
        keys = {"global_rope_theta": full.get("rope_theta"), "local_rope_theta": sliding.get("rope_theta")}
        fits = scaling == scaling_of_sliding and (scaling or {}).get("rope_type") != "longrope"
    elif model_type.startswith("gemma3"):
        keys = {"rope_theta": full.get("rope_theta"), "rope_local_base_freq": sliding.get("rope_theta")}
        fits = scaling_of_sliding is None
    elif model_type == "olmo3":
        keys = {"rope_theta": full.get("rope_theta")}
        fits = scaling_of_sliding is None and full.get("rope_theta") == sliding.get("rope_theta")
    else:
        return _same_everywhere(model_type, full) if full == sliding else None
    if scaling is not None:
        keys["rope_scaling"] = scaling
    return {key: value for key, value in keys.items() if value is not None} if fits else None


def _same_everywhere(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    family = model_type.removesuffix("_model").removesuffix("_text")
    keys = {key: rope[key] for key in _NO_SCALING if key in rope}
    if family in _ROTARY_PCT:
        keys["rotary_emb_base"] = rope.get("rope_theta", 10_000)
        keys["rotary_pct"] = rope.get("partial_rotary_factor", _ROTARY_PCT[family])
    scaling = _scaling(rope)
    if scaling is not None and "rope_type" in scaling:
        kind = scaling["rope_type"]
        if kind not in _KINDS.get(family, (kind,)):
            return None
        if kind == "longrope" and "original_max_position_embeddings" in scaling:  # which it looks for one level above
            keys["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if family in _SECTIONS:
        scaling = {"rope_type": "default", "mrope_section": _SECTIONS[family], **(scaling or {})}
    elif family in _ASKS_FOR_SCALING:
        scaling = {"rope_type": "default", **(scaling or {})}
    if scaling is not None and family in (*_EXACTLY, "phimoe"):  # which look for the kind under its oldest name
        named = {"type": scaling.get("rope_type"), **scaling}
        scaling = {key: named[key] for key in _EXACTLY.get(family, named) if key in named}
    return keys if scaling is None else {**keys, "rope_scaling": scaling}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What version 4 calls rope_scaling; None if nothing is scaled."""
    rest = {key: value for key, value in rope.items() if key not in _NO_SCALING}
    return rest if rest.keys() - {"rope_type"} or rest.get("rope_type", "default") != "default" else None

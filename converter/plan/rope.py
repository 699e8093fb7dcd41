"""The rope parameters of a config in the words of transformers 4, beside those of version 5; and a number of experts.

Version 5 has one `rope_parameters`, for all layers or by layer type; version 4 has rope_theta, rope_scaling and a few
keys of single families. Version 5 reads the old keys, too, so a base that has them needs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from converter.model.ask import reads_alike

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NO_SCALING = ("rope_theta", "partial_rotary_factor")


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


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config, and that of its language model if it has one."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


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
        fits = scaling == scaling_of_sliding
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


def _same_everywhere(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    keys = {key: rope[key] for key in _NO_SCALING if key in rope}
    if model_type == "gpt_neox":
        keys["rotary_emb_base"] = rope.get("rope_theta", 10_000)
        keys["rotary_pct"] = rope.get("partial_rotary_factor", 0.25)
    scaling = _scaling(rope)
    if scaling is not None and model_type == "phi3":  # which takes these three keys and no others
        three = {"type": scaling.get("rope_type"), **scaling}
        scaling = {key: three[key] for key in ("type", "short_factor", "long_factor") if key in three}
    return keys if scaling is None else {**keys, "rope_scaling": scaling}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What version 4 calls rope_scaling; None if nothing is scaled."""
    rest = {key: value for key, value in rope.items() if key not in _NO_SCALING}
    return rest if rest.keys() - {"rope_type"} or rest.get("rope_type", "default") != "default" else None

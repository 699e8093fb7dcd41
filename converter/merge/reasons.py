"""Why some adapters can't be merged, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.merge.files import FUSE_WITH_MLX

_NO_WEIGHT = "changes no weight: it puts trained tokens before the input; serve base and adapter with PEFT"
_BY_INPUT = "weighs its parts by the input, which no single weight can; serve base and adapter with PEFT"
_BY_ORDER = "has modules that depend on each other's order; merge it with PEFT"
METHODS = {
    **dict.fromkeys(["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"], _NO_WEIGHT),
    "CARTRIDGE": _NO_WEIGHT,
    "ADAPTION_PROMPT": "changes no weight: it adds to what attention gives; serve base and adapter with PEFT",
    **dict.fromkeys(["XLORA", "POLY", "LILY"], _BY_INPUT),
    **dict.fromkeys(["TINYLORA", "UNILORA"], _BY_ORDER),
    "FROD": "has modules that are decomposed together; merge it with PEFT",
    "BONE": "was renamed MISS, and PEFT has no BONE any more; convert it with a PEFT that has both",
}
"""A peft_type that is not merged → why."""

OPTIONS = {
    "alora_invocation_tokens": "activated LoRA changes only what follows its tokens; serve base and adapter with PEFT",
    "layer_replication": "repeated layers share the base's weights; make a base that has them, and give it as `base`",
    "arrow_config": "Arrow weighs adapters by the input; serve base and adapter with PEFT",
    "use_qalora": "QALoRA adds to the zero points of a GPTQ base; serve base and adapter with PEFT",
    "megatron_config": "its layers are Megatron's; export the adapter for transformers first",
}
"""An option that is not merged → why."""


def other_trainer(config: Mapping[str, Any]) -> str | None:
    """What a config is that has another trainer's words instead of PEFT's; None for one of PEFT."""
    if "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config):
        return f"of MLX, not of PEFT; {FUSE_WITH_MLX}"
    if config.get("enable_lora"):
        return "of a PEFT before 0.4, whose layers were others; load it with that version and save it again"
    return None

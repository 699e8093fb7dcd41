"""The output's config.json: the base's own JSON, with only what must change.

It is never written by transformers: version 5 renames keys that version 4 then misses, silently.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from converter.errors import BadCheckpoint, Unsupported
from converter.model.architecture import Architecture
from converter.quantize.formats import format_of
from converter.read.checkpoint import MAX_CONFIG_BYTES, Checkpoint
from converter.read.header import TensorHeader
from converter.recipe import Recipe

_CODES = ("F8_E5M2", "F8_E4M3", "F8_E8M0", "U8", "I8", "I16", "U16", "I32", "U32")
_BESIDE_CODES = re.compile(
    r"weight_scale|scale_inv$|\.scales$|\.q?zeros$|\.qweight$|\.absmax$|\.SCB$|quant_state|weight_packed$|codebooks?$"
)


def config_of(base: Checkpoint, *, trust_remote_code: bool, readable: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The base's config as that of weights in 16 or 32 bits, and what a user should know of it. `readable`: its weights
    are quantized in a way that can be read.

    Raises `Unsupported` if the weights are quantized in a way that can't be read, or if the config needs its own code.
    """
    where, config = base.folder.label, copy.deepcopy(base.config)
    if len(json.dumps(config, indent=2)) > MAX_CONFIG_BYTES // 2:  # as it will be written, with what is added
        raise BadCheckpoint(f"{where}: config.json has more than {MAX_CONFIG_BYTES // 2:,} bytes when it is indented")
    if config.get("auto_map") and not trust_remote_code:
        raise Unsupported(
            f"{where}: config.json names Python code of the base (auto_map); with `trust_remote_code` its files are "
            "copied, and still never run"
        )
    notes = []
    for part in _parts(config):
        for key in ("quantization_config", "compression_config"):
            quantization = part.pop(key, None)
            if not quantization or readable:
                continue
            method = str(quantization.get("quant_method") if isinstance(quantization, Mapping) else None)[:60]
            quantized = next((tensor.name for tensor in base if _is_of_quantized(tensor)), None)
            if quantized is not None:
                raise Unsupported(
                    f"{where}: the base is quantized already ({method}; see {quantized[:60]}); give the 16-bit model "
                    "that it was made from"
                )
            notes.append(f"config.json says that the base is quantized ({method}), but no tensor is: left out")
    return config, notes


def _is_of_quantized(tensor: TensorHeader) -> bool:
    """Whether a tensor is what schemes of quantization make of a weight: packed or short codes, scales, tables."""
    return tensor.dtype in _CODES or _BESIDE_CODES.search(tensor.name) is not None


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
    parts = _parts(config)
    for part in parts:
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


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config, and that of its language model if it has one."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]

"""Every scheme of quantized bases, by the name that a config gives it; and a base whatever its weights are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint
from converter.read.stored.awq import awq_weights
from converter.read.stored.bnb_4bit import STATE, four_bit_weights
from converter.read.stored.bnb_8bit import eight_bit_weights
from converter.read.stored.compressed_tensors import compressed_weights
from converter.read.stored.fp8 import fp8_weights
from converter.read.stored.gptq import gptq_weights
from converter.read.stored.mxfp4 import expert_weights
from converter.read.stored.stored import Source, Stored, is_stored

if TYPE_CHECKING:
    from converter.read.checkpoint import Checkpoint

Opener = Callable[["Checkpoint", Mapping[str, Any]], Mapping[str, Stored]]
"""Finds the quantized weights of a base, given its quantization_config."""


def _bitsandbytes(base: Checkpoint, _: Mapping[str, Any]) -> Mapping[str, Stored]:
    return {**four_bit_weights(base.tensors, base.folder), **eight_bit_weights(base.tensors, base.folder)}


SCHEMES: dict[str, Opener] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": fp8_weights,
    "compressed-tensors": compressed_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
    "mxfp4": expert_weights,
}


@dataclass(frozen=True)
class Sources:
    """What a base's weights are read from."""

    by_name: Mapping[str, Source]
    """In the order in which they lie on disk."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """The config's own quantization_config."""

    @property
    def stored(self) -> Sequence[Stored]:
        """The weights that are quantized."""
        return [source for source in self.by_name.values() if is_stored(source)]


def sources_of(base: Checkpoint) -> Sources:
    """What to read of a base for each weight.

    Raises `BadCheckpoint` where parts of a weight don't fit each other. A base whose scheme is unknown comes as plain
    tensors, which are no weights.
    """
    quantization = _quantization(base)
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"  # so it was written before there was a quant_method
    if method is None and (name := _a_quant_state(base)) is not None:
        raise BadCheckpoint(
            f"{base.folder.label}: has {name}, but its config.json no quantization_config; restore that"
        )
    if not isinstance(method, str) or method not in SCHEMES:
        return Sources(_sorted(base.tensors.values()))
    weights = SCHEMES[method](base, quantization)
    if not weights:
        return Sources(_sorted(base.tensors.values()))
    taken = {part.name for weight in weights.values() for part in weight.parts}
    rest = [tensor for name, tensor in base.tensors.items() if name not in taken]
    both = {tensor.name for tensor in rest} & weights.keys()
    if both:
        raise BadCheckpoint(f"{min(both)}: in the base twice, plain and quantized")
    return Sources(_sorted([*rest, *weights.values()]), quantization)


def _sorted(sources: Sequence[Source] | Any) -> dict[str, Source]:
    return {source.name: source for source in sorted(sources, key=lambda source: (source.file, source.offset))}


def _quantization(base: Checkpoint) -> Mapping[str, Any]:
    """What the base's config says of quantization. Old versions of compressed-tensors called it otherwise."""
    text = base.config.get("text_config")
    for part in (base.config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            stated = part.get(key)
            if isinstance(stated, dict) and stated:
                return stated
    return {}


def _a_quant_state(base: Checkpoint) -> str | None:
    """The name of a quant state whose weight is codes."""
    weights = {name: base.tensors.get(name.partition(STATE)[0]) for name in base.tensors if STATE in name}
    return next((name for name, weight in weights.items() if weight is not None and weight.dtype == "U8"), None)

"""Which loaders take a checkpoint, and why the others don't: rules that were read in the source of each.

Nothing is loaded, and a server may still fail for reasons that no rule here has. transformers 5 is asked itself, see
`answers.check_loaders`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from converter.model.architecture import Shape
from converter.model.server_classes import SGLANG, SGLANG_BITSANDBYTES, VLLM, VLLM_BITSANDBYTES
from converter.model.servers import fused_name, groups, is_skipped, unskipped
from converter.model.version_4 import MODEL_TYPES, modules_quantized

TRANSFORMERS: Final = "transformers 5"
TRANSFORMERS_4: Final = "transformers 4.57"
VLLM_: Final = "vLLM"
SGLANG_: Final = "SGLang"
OF_TARGET: Final = {"transformers": TRANSFORMERS, "vllm": VLLM_}
"""By what a recipe calls it."""


class Layer(NamedTuple):
    """A linear layer, a router, or a linear layer of an expert."""

    parameter: str
    """The module as transformers names it; of an expert that it stacks, the stack."""
    shape: Shape
    quantized: bool
    is_expert: bool


@dataclass(frozen=True)
class Written:
    """A checkpoint as the rules see it."""

    class_name: str
    """As the config names it, by which servers go."""
    model_type: str
    quantization: Mapping[str, Any] | None
    layers: Mapping[str, Layer]
    """By the checkpoint's names of modules, without the head."""
    head: str | None
    """The head's weight, if it is quantized."""
    stacks: Mapping[str, bool]
    """Tensors that hold the experts of a layer → whether the model is published with a tensor for each expert."""
    default_skips: Collection[str]
    """What transformers 4.57 keeps if the config has no list."""
    misread: Collection[str] = ()
    """What of the config it reads otherwise than transformers 5, or not at all."""
    uneven: Collection[str] = ()
    """Quantized weights whose size is no multiple of the block size."""

    @property
    def method(self) -> str | None:
        return None if self.quantization is None else str(self.quantization.get("quant_method"))

    @property
    def is_8_bit(self) -> bool:
        return self.quantization is not None and bool(self.quantization.get("load_in_8bit"))

    @cached_property
    def quantized(self) -> list[str]:
        return [module for module, layer in self.layers.items() if layer.quantized]

    @cached_property
    def kept(self) -> list[str]:
        return [module for module, layer in self.layers.items() if not layer.quantized]

    @cached_property
    def experts(self) -> list[str]:
        return [module for module, layer in self.layers.items() if layer.is_expert]

    @property
    def skip(self) -> list[str]:
        stated = (self.quantization or {}).get("llm_int8_skip_modules")
        return [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []


def objections(written: Written) -> dict[str, list[str]]:
    """Loader → what it would find wrong; empty: nothing that is known. A loader is left out where it isn't known."""
    found = {VLLM_: _in_words(_vllm(written)), SGLANG_: _in_words(_sglang(written))}
    if written.method != "compressed-tensors":
        found = {TRANSFORMERS_4: _in_words(_transformers_4(written)), **found}
    return found


def _in_words(found: Iterator[str], most: int = 20) -> list[str]:
    listed = list(found)
    return listed[:most] + ([f"and {len(listed) - most} more"] if len(listed) > most else [])


def _transformers_4(written: Written) -> Iterator[str]:
    if written.model_type not in MODEL_TYPES:
        yield f"it has no model type {written.model_type[:60]}"
        return
    yield from written.misread
    for tensor, published_apart in written.stacks.items():
        if published_apart:
            yield f"{tensor}: it takes a tensor for each expert"
    if written.method != "bitsandbytes":
        return
    stated = (written.quantization or {}).get("llm_int8_skip_modules")
    skip = written.default_skips if stated is None else written.skip
    # Version 4 names some modules as the checkpoint does, and some as version 5 does.
    names = {module: module if layer.is_expert else layer.parameter for module, layer in written.layers.items()}
    by_it = modules_quantized({*names, *names.values()}, skip)
    for module, layer in written.layers.items():
        for name in dict.fromkeys((module, names[module])):
            if (name in by_it) != layer.quantized:
                what = "in 16 bits, it would quantize it" if name in by_it else "quantized, it would keep it"
                yield f"{module}: {what}"
                break


def _vllm(written: Written) -> Iterator[str]:
    if written.class_name not in VLLM:
        yield f"version 0.32 has no {written.class_name} of its own"
        return
    if written.method == "bitsandbytes":
        if written.class_name not in VLLM_BITSANDBYTES:
            yield f"version 0.32 loads no bitsandbytes for {written.class_name}"
            return
        yield from _experts_in_vllm(written)
        yield from _by_the_list(written, "4 bits" if not written.is_8_bit else "nothing that runs")
    elif written.method == "compressed-tensors":
        yield from _in_part(written)


def _experts_in_vllm(written: Written) -> Iterator[str]:
    """Its loader makes NF4 of experts in 16 bits, or fails; it has no way to keep them."""
    for tensor in written.stacks:
        yield f"{tensor}: it takes a tensor for each expert, in NF4"
    if not written.experts:
        return
    if written.is_8_bit:
        yield f"{written.experts[0]}: it takes no model with experts in 8 bits"
    elif (written.quantization or {}).get("bnb_4bit_quant_type") != "nf4":
        yield f"{written.experts[0]}: it reads experts as NF4, whatever they are in"
    kept = [module for module in written.experts if not written.layers[module].quantized]
    uneven = [module for module in written.experts if f"{module}.weight" in written.uneven]
    if uneven:
        more = f"({len(uneven)} layers of experts)"
        yield f"{uneven[0]}: its last block is not whole, it joins the scales of experts {more}"
    if kept and not written.is_8_bit:
        yield f"{kept[0]}: in 16 bits, it makes 4 bits of all experts ({len(kept)} layers of experts)"


def _sglang(written: Written) -> Iterator[str]:
    if written.class_name not in SGLANG:
        yield f"version 0.5.23 has no {written.class_name}"
        return
    if written.method == "bitsandbytes":
        if written.class_name not in SGLANG_BITSANDBYTES:
            yield f"version 0.5.23 loads no bitsandbytes for {written.class_name}"
            return
        for module in [*written.experts, *written.stacks][:1]:
            yield f"{module}: it takes no experts beside bitsandbytes"
        yield from _by_the_list(written, "codes")
    elif written.method == "compressed-tensors":
        if (written.quantization or {}).get("format") == "mxfp4-pack-quantized":
            yield "it has no kernel for MXFP4A16"
        yield from _in_part(written)


def _by_the_list(written: Written, taken_for: str) -> Iterator[str]:
    """What servers find wrong with the list of kept modules, and with what they can't keep or quantize."""
    if written.head is not None:
        yield f"{written.head}: quantized, it takes no quantized head"
    if (written.quantization or {}).get("bnb_4bit_quant_storage", "uint8") != "uint8":
        yield "its 4-bit codes are not stored in uint8"
    skip, layers = set(written.skip), written.layers
    for module in written.quantized:
        if layers[module].shape[0] == 1 and module.endswith("shared_expert_gate"):
            yield f"{module}: quantized, it takes it in 16 bits only"
    group_of = groups(layers)
    kept = [module for module in written.kept if not layers[module].is_expert]
    for module in kept:
        group = group_of.get(module, ())
        if any(layers[part].quantized for part in group):
            others = ", ".join(part.rpartition(".")[2] for part in group if part != module)
            yield f"{module}: in 16 bits, it is fused with {others} and taken for {taken_for}"
    names = {module: (module, layers[module].parameter) for module in kept}
    for name in unskipped(kept, written.quantized, names, skip):
        yield f"{name}: in 16 bits, the list of kept modules lacks this name, so it is taken for {taken_for}"
    for module in written.quantized:
        name = fused_name(module) if module in group_of else module
        if not layers[module].is_expert and is_skipped(name, skip):
            yield f"{module}: quantized, but the list of kept modules names it"


def _in_part(written: Written) -> Iterator[str]:
    """Servers fuse some layers: all parts of such a group are quantized, or none. Experts count as linear layers."""
    for tensor in written.stacks:
        yield f"{tensor}: in 16 bits, it expects experts to be quantized"
    said = set()
    for module, group in groups(written.layers).items():
        if len({written.layers[part].quantized for part in group}) > 1 and group not in said:
            said.add(group)
            listed = ", ".join(part.rpartition(".")[2] for part in group)
            yield f"{module.rpartition('.')[0]}: {listed} are quantized in part, it fuses them"

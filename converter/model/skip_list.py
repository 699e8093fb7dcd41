"""Which modules the config must name as not quantized, so that every loader quantizes just the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from converter.errors import Unsupported
from converter.model.architecture import Role
from converter.model.meta_model import Names, quantized_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skip_modules(
    model: PreTrainedModel, names: Names, roles: Mapping[str, Role], wanted: set[str]
) -> tuple[str, ...] | None:
    """None where all loaders' defaults give `wanted` (modules, by the model's names), else full module paths.

    transformers 5 quantizes `nn.Linear` proper; 4.57 its subclasses too, and the modules that 5 has since fused into
    parameters (experts, routers); vLLM everything but embeddings and the head. Full paths mean the same to all.
    """
    output = model.get_output_embeddings()
    head = {name for name, module in model.named_modules() if output is not None and module is output}
    head |= {names.tensor_of[f"{m}.weight"].removesuffix(".weight") for m in head if f"{m}.weight" in names.tensor_of}
    linear_like = {
        name.removesuffix(".weight")
        for name, role in roles.items()
        if role.parameter is not None
        and name.endswith(".weight")
        and len(names.parameters[role.parameter] if name not in names.converted else (0, 0)) == 2
        and role.kind != "embedding"
    }
    kept = {
        module
        for module in linear_like
        if not roles[f"{module}.weight"].quantize
        and str(roles[f"{module}.weight"].parameter).removesuffix(".weight") not in head
    }
    if not kept and quantized_modules(model, None) == wanted:
        default = _default_skips_of_version_4(model, head)
        quantized = {name.removesuffix(".weight") for name, role in roles.items() if role.quantize}
        if _quantized_by_version_4(linear_like, default) == quantized:
            return None
    skip = set(head)
    for module in kept:
        both = (module, str(roles[f"{module}.weight"].parameter).removesuffix(".weight"))
        # Experts are skipped as one: a list of thousands of paths would say no more.
        skip |= {re.sub(r"\.experts\..*", ".experts", name) for name in both}
    skip |= {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    skip |= quantized_modules(model, skip) - wanted
    if quantized_modules(model, skip) != wanted:
        first = min(quantized_modules(model, skip) ^ wanted)
        raise Unsupported(f"{first}: no list of kept modules makes transformers quantize just the rest")
    return tuple(sorted(skip))


def _quantized_by_version_4(linear: Iterable[str], skip: Iterable[str]) -> set[str]:
    """Modules that transformers 4.57 quantizes: all linear ones, less those that the list names literally."""
    names = list(skip)
    return {
        module
        for module in linear
        if module.rpartition(".")[2] not in names and not any(f"{n}." in f"{module}." or n == module for n in names)
    }


def _default_skips_of_version_4(model: PreTrainedModel, head: set[str]) -> set[str]:
    """Transformers 4.57's `get_keys_to_not_convert`."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    if not tied and head:
        return head
    last = [name for name, _ in model.named_parameters()][-1]
    return {name.removesuffix(".weight").removesuffix(".bias") for name in tied | {last}}

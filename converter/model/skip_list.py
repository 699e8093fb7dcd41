"""Which modules the config must name as not quantized, so that every loader quantizes just the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from converter.errors import Unsupported
from converter.model.architecture import Role
from converter.model.meta_model import Names, quantized_modules
from converter.model.servers import unskipped
from converter.model.version_4 import modules_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERT = re.compile(r"\.experts\..*")


def skip_modules(
    model: PreTrainedModel, names: Names, roles: Mapping[str, Role], wanted: set[str]
) -> tuple[str, ...] | None:
    """None where all loaders' defaults give `wanted` (modules, by the model's names), else full module paths.

    transformers 5 quantizes `nn.Linear` proper; 4.57 its subclasses too, and the modules that 5 has since fused into
    parameters (experts, routers); vLLM everything but embeddings and the head. Full paths mean the same to all, in the
    spelling of each.
    """
    head = head_of(model, names)
    linear_like = linear_modules(names, roles)
    kept = {
        module
        for module in linear_like
        if not roles[f"{module}.weight"].quantize and _parameter_module(roles, module) not in head
    }
    if not kept and quantized_modules(model, None) == wanted:
        default = default_skips_of_version_4(model, head)
        quantized = {name.removesuffix(".weight") for name, role in roles.items() if role.quantize}
        if modules_quantized(linear_like, default) == quantized:
            return None
    skip = set(head)
    for module in kept:
        # Experts are skipped as one: a list of thousands of paths would say no more.
        skip |= {_EXPERT.sub(".experts", name) for name in (module, _parameter_module(roles, module))}
    skip |= {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    skip |= quantized_modules(model, skip) - wanted
    if quantized_modules(model, skip) != wanted:
        first = min(quantized_modules(model, skip) ^ wanted)
        raise Unsupported(f"{first}: no list of kept modules makes transformers quantize just the rest")
    quantized = {module for module in linear_like if roles[f"{module}.weight"].quantize}
    names_of = {module: (module, _parameter_module(roles, module)) for module in linear_like}
    return tuple(sorted(skip | _for_servers(kept, quantized, names_of, skip)))


def _for_servers(
    kept: Collection[str], quantized: Collection[str], names: Mapping[str, tuple[str, str]], skip: Collection[str]
) -> set[str]:
    """Entries for servers, which have other names; none that would keep a module here that is to be quantized."""
    found = {_EXPERT.sub(".experts", entry) for entry in unskipped(kept, quantized, names, skip)}
    every = [name for module in quantized for name in names[module]] if found else []
    return {entry for entry in found if not any(entry in f"{name}." for name in every)}


def head_of(model: PreTrainedModel, names: Names) -> set[str]:
    """The module that gives the output, by transformers' name and by the checkpoint's."""
    output = model.get_output_embeddings()
    head = {name for name, module in model.named_modules() if output is not None and module is output}
    return head | {
        names.tensor_of[f"{m}.weight"].removesuffix(".weight") for m in head if f"{m}.weight" in names.tensor_of
    }


def linear_modules(names: Names, roles: Mapping[str, Role]) -> set[str]:
    """Modules whose weight is a matrix and no embedding, experts and routers included, as the checkpoint has them."""
    return {
        name.removesuffix(".weight")
        for name, role in roles.items()
        if role.parameter is not None
        and name.endswith(".weight")
        and len(names.parameters[role.parameter] if name not in names.converted else (0, 0)) == 2
        and role.kind != "embedding"
    }


def _parameter_module(roles: Mapping[str, Role], module: str) -> str:
    return str(roles[f"{module}.weight"].parameter).removesuffix(".weight")


def default_skips_of_version_4(model: PreTrainedModel, head: set[str]) -> set[str]:
    """Transformers 4.57's `get_keys_to_not_convert`."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    if not tied and head:
        return head
    last = [name for name, _ in model.named_parameters()][-1]
    return {name.removesuffix(".weight").removesuffix(".bias") for name in tied | {last}}

"""Describing a checkpoint as transformers sees it, and checking an output as it would load it.

Runs in a process of its own, as a rule: see `ask.py`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from converter.errors import BadRecipe, ConversionRefused
from converter.model.architecture import Architecture, Role, Shape
from converter.model.linear_layers import modules_to_ignore, quantizable, tensors_expected
from converter.model.loaders import TRANSFORMERS, Layer, Written, objections
from converter.model.meta_model import (
    Names,
    meta_model,
    modules_that_loading_quantizes,
    quantized_modules,
    reads_alike,
    swapped_by_loading,
)
from converter.model.read_directly import modules_read_directly
from converter.model.skip_list import default_skips_of_version_4, head_of, linear_modules, skip_modules
from converter.model.version_4 import misread

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    *,
    quantize: bool,
    dtype: str,
    keep: Iterable[str] = (),
    remote_code: bool = False,
    library: str = "bitsandbytes",
) -> Architecture:
    """Ask transformers about a checkpoint.

    `shapes` are those of the checkpoint's tensors, `dtype` is "bfloat16" or "float16", `keep` are patterns of modules
    to leave in 16 bits: a glob on the full path, or its last parts (`down_proj`, `mlp.down_proj`).
    With `remote_code`, of a class that transformers doesn't have, every matrix that `keep` doesn't name is quantized.
    `library`: whose rules say what loaders expect to be quantized, bitsandbytes or compressed-tensors; or "bitsandbytes
    in vLLM", which takes experts only if they are quantized, while transformers takes no such experts.

    Raises `Unsupported` for a class that transformers doesn't have, `BadCheckpoint` where config and tensors disagree,
    `BadRecipe` for a pattern that matches nothing, or if nothing is kept of a class that transformers doesn't have.
    """
    model = meta_model(config, shapes, dtype, remote_code=remote_code)
    if model is None:
        return _without_class(config, shapes, quantize=quantize, keep=tuple(keep))
    names = Names(model, shapes)
    names.check(shapes)
    roles = {name: names.role(name, shape) for name, shape in shapes.items()}
    ties = {t: names.tensor_of[s] for t, s in model.all_tied_weights_keys.items() if s in names.tensor_of}
    tied = {target: source for target, source in ties.items() if target not in names.tensor_of}
    doubled = {names.tensor_of[target]: source for target, source in ties.items() if target in names.tensor_of}
    ends = _ends(model)
    parameters = [f"{name}.weight" for name, module in model.named_modules() if any(module is end for end in ends)]
    embeddings = frozenset(names.tensor_of.get(name, name) for name in parameters)
    architecture = Architecture(type(model).__name__, roles, None, tied, doubled, embeddings=embeddings)
    architecture = replace(architecture, stacks=tuple(names.stacks(shapes)))
    if not quantize:
        return architecture
    compressed = library == "compressed-tensors"
    apart = {name: stack.parameter for stack in architecture.stacks for name in stack.apart}
    if compressed:
        loaded_apart = {n: stack.parameter for stack in architecture.stacks for n in stack.apart if stack.parts}
        could = {**quantizable(model, names, shapes), **loaded_apart}
    elif library == "bitsandbytes in vLLM":
        could = {**quantizable(model, names, shapes), **apart}
    else:
        by_default = quantized_modules(model, None)
        could = {
            name: role.parameter.removesuffix(".weight")
            for name, role in roles.items()
            if role.parameter is not None
            and name not in names.converted
            and role.parameter.endswith(".weight")
            and role.parameter.removesuffix(".weight") in by_default
        }
    direct = modules_read_directly(model)
    read_directly = frozenset(name for name, module in could.items() if module in direct)
    kept = _kept(could, architecture, keep) | read_directly
    wanted = {name: module for name, module in could.items() if name not in kept}
    roles = {name: replace(role, quantize=name in wanted) for name, role in architecture.roles.items()}
    modules = {module for name, module in wanted.items() if compressed or name not in names.converted | apart.keys()}
    skip = modules_to_ignore(model, names, modules) if compressed else skip_modules(model, names, roles, modules)
    return replace(architecture, roles=roles, skip_modules=skip, read_directly=read_directly)


def _ends(model: PreTrainedModel) -> list[object]:
    """The modules that tokens come in by, and go out by. Models of speech have none that tokens come in by."""
    ends: list[object] = [model.get_output_embeddings()]
    with suppress(NotImplementedError):
        ends.append(model.get_input_embeddings())
    return ends


def check_output(config: Mapping[str, Any], tensors: Mapping[str, Shape], quantized: Iterable[str]) -> list[str]:
    """The static verifier: what a loader would find wrong with a checkpoint of this config, these tensors (name →
    shape; the quant states of a weight left out) and these quantized weights. Empty: nothing."""
    return _problems_of_transformers(_model_of(config, tensors), config, tensors, set(quantized))


def check_loaders(
    config: Mapping[str, Any], tensors: Mapping[str, Shape], quantized: Iterable[str], uneven: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Loader → what it would find wrong with a checkpoint, as `check_output` takes it; empty: nothing. `uneven`: the
    quantized weights of which the last block isn't whole."""
    found, model = set(quantized), _model_of(config, tensors)
    others = objections(_written(model, config, tensors, found, frozenset(uneven)))
    return {TRANSFORMERS: _problems_of_transformers(model, config, tensors, found), **others}


def _model_of(config: Mapping[str, Any], tensors: Mapping[str, Shape]) -> PreTrainedModel:
    dtype = str(config.get("dtype", "bfloat16"))
    model = meta_model({k: v for k, v in config.items() if k != "quantization_config"}, tensors, dtype)
    assert model is not None  # noqa: S101  (without remote_code a missing class raises)
    return model


def _problems_of_transformers(
    model: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, Shape], found: set[str]
) -> list[str]:
    """Those of version 5. Its function replaces layers of the model."""
    quantization = config.get("quantization_config")
    swapped = swapped_by_loading(model, quantization) if quantization is not None else {}
    if swapped:
        module, (old, new) = min(swapped.items())
        return [
            f"{module}: loading a quantized checkpoint puts {new} in the place of {old}, and finds no tensors for it; "
            "use `quant_type` none"
        ]
    names = Names(model, tensors)
    wrong_shapes = list(names.mismatched(tensors, transposed=found))
    built: set[str] = set()
    if quantization is not None and quantization.get("quant_method") == "compressed-tensors":
        built = tensors_expected(model, names, quantization.get("ignore") or [])
    elif quantization is not None:
        modules = modules_that_loading_quantizes(model, quantization)
        built = {names.tensor_of.get(f"{module}.weight", f"{module}.weight") for module in modules}
    problems = [f"{name}: quantized here, not by transformers" for name in sorted(found - built)]
    problems += [f"{name}: not quantized here, but by transformers" for name in sorted(built - found)]
    problems += [f"{name}: missing" for name in sorted(names.missing)]
    problems += [
        f"{name}: shape {list(tensors[name])}, transformers expects {list(expected)}" for name, expected in wrong_shapes
    ]
    return problems


def _written(
    model: PreTrainedModel,
    config: Mapping[str, Any],
    tensors: Mapping[str, Shape],
    quantized: set[str],
    uneven: frozenset[str],
) -> Written:
    """The checkpoint as rules of loaders see it."""
    names = Names(model, tensors)
    head = head_of(model, names)
    roles = {name: names.role(name, shape) for name, shape in tensors.items()}
    layers = {}
    for module in sorted(linear_modules(names, roles) - head):
        weight = f"{module}.weight"
        parameter = str(roles[weight].parameter).removesuffix(".weight")
        if parameter not in head:
            layers[module] = Layer(parameter, tensors[weight], weight in quantized, weight in names.converted)
    stacks = {
        name: bool(stack.parts)
        for stack in names.stacks(tensors)
        for name, (expert, _, _) in stack.pieces.items()
        if expert is None
    }
    heads = sorted(quantized & {f"{module}.weight" for module in head})
    listed = config.get("architectures")
    return Written(
        class_name=str(listed[0]) if isinstance(listed, list) and listed else type(model).__name__,
        model_type=str(config.get("model_type")),
        quantization=config.get("quantization_config"),
        layers=layers,
        head=heads[0] if heads else None,
        stacks=stacks,
        default_skips=default_skips_of_version_4(model, head),
        misread=list(misread(config)),
        uneven=uneven,
    )


def parameters(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], names: Iterable[str], *, dtype: str
) -> dict[str, str]:
    """Into which parameters transformers 5 would load tensors of these `names`, had the checkpoint of these `shapes`
    them: name → parameter. Names that it would load nowhere are left out."""
    model = meta_model(config, shapes, dtype)
    assert model is not None  # noqa: S101  (without remote_code a missing class raises)
    return Names(model, names).parameter_of


def answer(request: dict[str, Any]) -> Any:
    """The answer, in JSON values, to a question in JSON values."""
    question = request.pop("question")
    if question == "describe":
        shapes = {name: tuple(shape) for name, shape in request.pop("shapes").items()}
        return describe(request.pop("config"), shapes, **request).as_json()
    if question == "parameters":
        return parameters(**request)
    if question == "reads_alike":
        return reads_alike(request["config"], request["other"])
    tensors = {name: tuple(shape) for name, shape in request["tensors"].items()}
    return check_loaders(request["config"], tensors, request["quantized"], request["uneven"])


def serve(memory: int) -> None:
    """Answer the questions that standard input has, one a line; an error is an answer, too. `memory`: bytes to take at
    the most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or soft > memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever the libraries print is no answer
    for line in sys.stdin:
        try:
            reply = {"answer": answer(json.loads(line))}
        except ConversionRefused as exc:
            reply = {"error": type(exc).__name__, "message": str(exc)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _kept(wanted: Mapping[str, str], architecture: Architecture, keep: Iterable[str]) -> set[str]:
    """Which of the `wanted` tensors the user's patterns leave in 16 bits.

    A pattern may match modules that stay in 16 bits anyway, such as the head. `BadRecipe` if it matches no module.
    """
    owners = {name: architecture.module_names(name) for name in architecture.roles}
    owners |= {name: (name.rpartition(".")[0],) for name in architecture.tied}
    kept: set[str] = set()
    for pattern in keep:
        matching = {
            name
            for name, modules in owners.items()
            if any(
                fnmatchcase(module, pattern) or module == pattern or module.endswith("." + pattern)
                for module in modules
            )
        }
        if not matching:
            raise BadRecipe(f"`keep` {pattern}: matches no module; {_alike(pattern, owners.values())}")
        kept |= matching & wanted.keys()
    return kept


def _alike(pattern: str, modules: Iterable[Iterable[str]]) -> str:
    """Modules that somebody may have meant who wrote a pattern, by their last parts; without any, one as an example."""
    parts = sorted({".".join(module.split(".")[-count:]) for some in modules for module in some for count in (1, 2)})
    found = get_close_matches(pattern, parts, n=3)
    return f"did you mean {' or '.join(found)}?" if found else f"one of them is {parts[-1]}"


def _without_class(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], *, quantize: bool, keep: tuple[str, ...]
) -> Architecture:
    """A model whose code is not ours to run: which of its matrices are linear layers, the user says."""
    listed = config.get("architectures")
    class_name = str(listed[0]) if isinstance(listed, list) and listed else "unknown"
    matrices = {name: name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    roles = {
        name: Role(name, "linear" if name in matrices else "other", quantize=False, integer=name not in matrices)
        for name in shapes
    }
    architecture = Architecture(class_name, roles, None, known=False)
    if not quantize:
        return architecture
    if not keep:
        raise BadRecipe(
            f"transformers has no {class_name[:60]}, and the base's own code is not run, so nothing says which "
            "matrices are linear layers. Name all that are not with `keep` (embeddings, the head, routers); the "
            f"others are quantized. The matrices are {_listed(matrices)}"
        )
    kept = _kept(matrices, architecture, keep)
    roles |= {name: replace(roles[name], quantize=True) for name in matrices.keys() - kept}
    skip = {re.sub(r"\.experts\..*", ".experts", name.removesuffix(".weight")) for name in kept}
    return replace(architecture, roles=roles, skip_modules=tuple(sorted(skip)))


def _listed(matrices: Iterable[str], most: int = 40) -> str:
    """The modules of weights, those of all layers as one."""
    modules = sorted({re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight")) for name in matrices})
    return ", ".join(modules[:most]) + (f" and {len(modules) - most} more" if len(modules) > most else "")

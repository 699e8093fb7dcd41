"""A base, an adapter and a recipe become a plan, or are refused by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from converter.errors import AdapterMismatch, BadCheckpoint, BadRecipe, Unsupported
from converter.merge.adapter import Adapter
from converter.merge.change import Change, Replacement
from converter.merge.match import Match, match, scaled
from converter.model.architecture import Architecture, Role, Shape
from converter.model.ask import check_loaders, describe, dismiss, parameters
from converter.model.loaders import OF_TARGET, TRANSFORMERS
from converter.plan.budget import cut_into_tiles
from converter.plan.config import config_of, output_config
from converter.plan.experts import note_on_kept, taken_apart, uneven
from converter.plan.inputs import is_called
from converter.plan.layout import LIMITS, Limits
from converter.plan.plan import Plan, TensorPlan, in_shards, packed
from converter.plan.proof import proved
from converter.plan.quantized_base import (
    as_stored,
    as_trained_on,
    copied_outputs,
    described,
    keeps_format,
    notes_on,
    own_quantization,
    settled,
    state_dtype,
)
from converter.plan.rope import in_words_of_all_versions
from converter.quantize.format import Output
from converter.quantize.formats import fit, format_of, notes_for_servers, sharing
from converter.read.checkpoint import Checkpoint
from converter.read.folder import read_bytes
from converter.read.header import TensorHeader
from converter.read.side_files import MAX_SIDE_FILE_BYTES, SideFile, choose, largest_token, left_behind, left_of_adapter
from converter.read.stored.schemes import sources_of
from converter.read.stored.stored import Source, is_stored, named
from converter.recipe import Recipe
from converter.resources import Resources
from converter.tensors import torch_device

_FLOATING = ("F64", "F32", "F16", "BF16")
_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16"}


def make_plan(
    base: Checkpoint,
    adapter: Adapter | None = None,
    recipe: Recipe = Recipe(),
    resources: Resources = Resources(),
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    limits: Limits = LIMITS,
) -> Plan:
    """Decide everything that will happen to an opened base and adapter, or refuse.

    Reads the adapter's values once, to check them; of the base, headers only. Raises a `ConversionRefused`.
    """
    sources = sources_of(base)
    base_config, config_notes = config_of(base, trust_remote_code=trust_remote_code, readable=bool(sources.stored))
    recipe = settled(recipe, sources)
    shapes = {name: source.shape for name, source in sources.by_name.items()}
    same_format = keeps_format(recipe, sources)
    dequantized = recipe.merge_onto == "dequantized"

    library = "bitsandbytes" if dequantized else format_of(recipe).library
    library += " in vLLM" if recipe.target == "vllm" else ""

    def ask_for(plain_shapes: Mapping[str, Shape]) -> Architecture:
        return describe(
            base_config,
            plain_shapes,
            quantize=recipe.quant_type != "none" or dequantized,
            dtype=recipe.dtype,
            keep=recipe.keep,
            remote_code=trust_remote_code,
            library=library,
        )

    architecture, plain_shapes = described(ask_for, sources)
    if own := same_format and not recipe.keep and recipe.target == "transformers":
        architecture = as_stored(architecture, sources)
    if dequantized:
        sources, architecture = as_trained_on(architecture, sources, recipe)
    sources, architecture, plain_shapes = taken_apart(sources, architecture, plain_shapes, recipe)
    to_quantize = [name for name, role in architecture.roles.items() if role.quantize]
    recipe = fit(recipe, {name: sources.by_name[name].shape for name in to_quantize})

    def ask(names: list[str]) -> Mapping[str, str]:
        return parameters(base_config, shapes, names, dtype=recipe.dtype) if architecture.known else {}

    found = match(adapter, architecture, plain_shapes, ask) if adapter is not None else Match()
    if recipe.scale != 1.0:
        if adapter is None:
            raise BadRecipe("`scale` has no meaning without an `adapter`")
        found = scaled(found, adapter, recipe.scale)
    tensors = [
        _plan_tensor(source, architecture.roles[name], recipe, found, same_format)
        for name, source in sources.by_name.items()
    ]
    tensors += [
        _plan_tensor(named(sources.by_name[source], name), Role(name, "linear", quantize=False), recipe, found, False)
        for name, source in found.untied.items()
    ]
    if recipe.quant_type != "none" and not any(tensor.is_quantized for tensor in tensors):
        raise Unsupported(
            f"{architecture.class_name}: {format_of(recipe).library} would quantize none of its layers; "
            "use `quant_type` none"
        )
    _check_names(tensors, limits)
    processor = torch_device(device)
    if processor.type != "cpu":  # one thread waits for copies while another computes
        resources = replace(resources, kernels=False, threads=max(2, resources.threads))
    tensors, memory, notes = cut_into_tiles(_fused(tensors, recipe), recipe, resources)
    if any(tensor.action == "quantize" and is_stored(tensor.source) for tensor in tensors):
        notes += proved(sources, base.folder, recipe, kernels=resources.kernels)
    untied = bool(found.untied) or found.parted
    spelled, spelling_notes = in_words_of_all_versions(base_config, known=architecture.known)
    config = output_config(spelled, recipe, architecture, vocabulary=found.vocabulary, untied=untied)
    if own:
        config["quantization_config"] = own_quantization(sources)
    side_files = choose(base.folder, adapter.folder if adapter else None, trust_remote_code=trust_remote_code)
    _check_tokenizer(side_files, adapter, architecture, tensors)
    loads, loaders = architecture.known, _loaders_of(config, tensors, recipe) if architecture.known else {}
    loader = OF_TARGET[recipe.target]
    if problems := loaders.get(loader):
        problem = f"{problems[0]} ({len(problems)} in all)"
        if not own:
            where = "" if loader == TRANSFORMERS else f" in {loader}"
            raise Unsupported(f"the output would not load{where}: {problem}")
        found.notes.append(f"transformers 5 loads neither this base nor the output: {problem}")
        loads = False
    dismiss()
    on_experts = note_on_kept(tensors, architecture, recipe)
    unknown = sum(role.parameter is None for role in architecture.roles.values())
    if unknown:
        found.notes.append(
            f"{unknown} tensors of the base are not part of {architecture.class_name}: they are copied as they are"
        )
    return Plan(
        recipe=recipe,
        class_name=architecture.class_name,
        shards=in_shards(packed(tensors, recipe, limits.header_bytes)),
        config=config,
        side_files=side_files,
        notes=(
            *base.notes,
            *_notes_on_an_adapter_beside(base, adapter),
            *_notes_on_what_is_left(base, adapter, side_files),
            *config_notes,
            *_notes_on_the_class(base_config, architecture),
            *found.notes,
            *notes,
            *notes_on(sources, recipe, touched=sum(t.is_touched and is_stored(t.source) for t in tensors)),
            *spelling_notes,
            *_notes_on_the_base(base, adapter),
            *[on_experts][: bool(on_experts)],
            *notes_for_servers(recipe, {tensor.name: tensor.shape for tensor in tensors if tensor.is_quantized}),
        ),
        base_bytes=base.nbytes,
        adapter_digest=adapter.check_finite() if adapter is not None else None,
        device=str(processor),
        resources=resources,
        memory=memory,
        verifiable=loads,
        loaders=loaders,
        beforehand=on_experts,
    )


def _plan_tensor(header: Source, role: Role, recipe: Recipe, found: Match, same_format: bool) -> TensorPlan:
    name = header.name
    change = _change(found.deltas.get(name), found.replacements.get(name))
    source: Source = header if change is None or change.source is None else change.source
    stored = is_stored(source)
    merged = change is not None and bool(change.parts)
    if header.dtype.startswith("F8"):
        raise Unsupported(f"{name}: dtype {header.dtype}; give a base in 16 or 32 bits")
    computed_with = role.parameter is not None and not role.integer and source.dtype not in _FLOATING
    if computed_with or ((merged or role.quantize) and source.dtype not in ("F32", "F16", "BF16")):
        raise BadCheckpoint(f"{name}: dtype {source.dtype}, expected F32, F16 or BF16")
    if role.quantize and 0 in source.shape:
        raise BadCheckpoint(f"{name}: shape {list(source.shape)}, a weight without elements")
    # A quantized base has a Conv1D turned, (out_features, in_features), as an output has one that is quantized.
    transpose = role.kind == "conv1d" and (not role.quantize if stored else role.quantize or merged)
    turned = role.kind == "conv1d" and role.quantize != stored
    shape = source.shape[::-1] if turned else source.shape
    if role.parameter is None or source.dtype not in _FLOATING:
        dtype = source.dtype
    else:
        dtype = "F32" if role.float32 else _SAFETENSORS_DTYPE[recipe.dtype]
    computed = source.shape[::-1] if transpose and not stored else source.shape
    rows = source.rows if is_stored(source) else computed[0] if computed else 1
    if change is not None and change.is_of_stack:
        rows = math.prod(computed[:-1])  # those of one expert after the other
    outputs: tuple[Output, ...] = (Output(name, dtype, shape),)
    action: Literal["quantize", "keep", "copy"] = "keep"
    if role.quantize and same_format and change is None and is_stored(source):
        action, rows, outputs = "copy", source.nbytes, copied_outputs(source)
    elif role.quantize:
        state = state_dtype(source, change, recipe)
        action, dtype, outputs = "quantize", state or dtype, format_of(recipe, state).outputs(name, shape)
    return TensorPlan(
        name=name,
        source=source,
        action=action,
        change=change,
        transpose=transpose,
        shape=shape,
        dtype=dtype,
        tiles=(0, rows),
        outputs=outputs,
        checked=role.parameter is not None,
    )


def _fused(tensors: list[TensorPlan], recipe: Recipe) -> list[TensorPlan]:
    """The tensors, those that share a scale each with all of them."""
    quantized = {tensor.name: tensor for tensor in tensors if tensor.action == "quantize"}
    groups = sharing(recipe, quantized)
    parts = {name: tuple(quantized[other] for other in group) for name, group in groups.items()}
    return [replace(tensor, fused=parts.get(tensor.name, ())) for tensor in tensors]


def _change(delta: Change | None, replacement: TensorHeader | None) -> Change | None:
    """What the adapter does to a tensor. It may replace one and also have a delta for it."""
    if replacement is None:
        return delta
    if delta is None:
        return Replacement(replacement.name.rpartition(".")[0], source=replacement)
    return replace(delta, source=replacement)


def _check_names(tensors: list[TensorPlan], limits: Limits) -> None:
    """Refuse more names than a reader takes, and names that a loader would take for a weight's quant state.

    A tensor that the model doesn't have keeps its name, whatever that is."""
    made = Counter(output.name for tensor in tensors for output in tensor.outputs)
    if len(made) > limits.tensors or sum(tensor.header_bytes for tensor in tensors) > limits.json_bytes:
        raise Unsupported(
            f"the output would have {len(made):,} tensors, expected at most {limits.tensors:,}, whose names and shapes "
            f"take at most {limits.json_bytes:,} bytes"
        )
    quantized = {tensor.name for tensor in tensors if tensor.is_quantized}
    for name in (tensor.name for tensor in tensors if tensor.action == "keep"):
        around = name.rpartition(".")[0]
        while around and around not in quantized:
            around = around.rpartition(".")[0]
        if around or made[name] > 1:
            raise BadCheckpoint(f"{name}: in the base, but in the output it would be a part of a quantized weight")


def _loaders_of(config: Mapping[str, Any], tensors: list[TensorPlan], recipe: Recipe) -> dict[str, list[str]]:
    """Loader → what it would find wrong with the output."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    quantized = [tensor.name for tensor in tensors if tensor.is_quantized]
    return check_loaders(config, shapes, quantized, uneven(tensors, recipe))


def _check_tokenizer(
    side_files: tuple[SideFile, ...],
    adapter: Adapter | None,
    architecture: Architecture,
    tensors: list[TensorPlan],
) -> None:
    """An adapter's tokenizer may have tokens that the embedding has no rows for."""
    own = SideFile("tokenizer.json", "adapter")
    rows = [tensor.shape[0] for tensor in tensors if tensor.name in architecture.embeddings and tensor.shape]
    if adapter is None or own not in side_files or not rows:
        return
    largest = largest_token(read_bytes(adapter.folder, own.name, limit=MAX_SIDE_FILE_BYTES))
    if largest >= min(rows):
        raise AdapterMismatch(
            f"{adapter.folder.label}: its tokenizer has a token {largest:,}, the embedding {min(rows):,} rows: "
            "the adapter's file lacks the resized embedding"
        )


def _notes_on_an_adapter_beside(base: Checkpoint, adapter: Adapter | None) -> list[str]:
    """Whoever loads a base with an adapter in its folder gets both; here only what was named is merged."""
    if "adapter_config.json" not in base.folder.names():
        return []
    if adapter is not None and adapter.folder.path == base.folder.path:
        return []
    return ["the base's folder has an adapter (adapter_config.json), which is not merged: give it with `adapter`"]


def _notes_on_what_is_left(base: Checkpoint, adapter: Adapter | None, side_files: tuple[SideFile, ...]) -> list[str]:
    left = left_behind(base.folder, base.shards, side_files)
    notes = [f"not copied from the base's folder: {_some(left)}"] if left else []
    if adapter is not None and (left := left_of_adapter(adapter.folder, side_files)):
        notes.append(
            "not copied from the adapter's folder, for they belong to a tokenizer that it has no vocabulary of: "
            f"{_some(left)}"
        )
    return notes


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _notes_on_the_class(config: Mapping[str, Any], architecture: Architecture) -> list[str]:
    notes = []
    listed = config.get("architectures")
    stated = listed[0] if isinstance(listed, list) and listed else architecture.class_name
    if architecture.known and stated != architecture.class_name:
        notes.append(
            f"transformers has no {str(stated)[:60]}: the base is taken for {architecture.class_name}, which has its "
            "model type"
        )
    if architecture.read_directly:
        modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in architecture.read_directly})
        notes.append(
            f"{', '.join(modules)}: kept in 16 bits in {len(architecture.read_directly)} places, for "
            f"{architecture.class_name} computes with these weights itself"
        )
    return notes


def _notes_on_the_base(base: Checkpoint, adapter: Adapter | None) -> list[str]:
    """An adapter fits any base of its shapes. Only the names can tell whether it was trained on this one."""
    trained_on = adapter.base_name if adapter is not None else None
    if trained_on is None:
        return []
    if is_called(base, trained_on):
        return []
    return [f"the adapter says that it was trained on {trained_on[:100]}: this base has another name"]

"""Experts: a tensor for each linear layer of each expert, as servers take them; or what it costs to keep them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from converter.errors import BadRecipe, Unsupported
from converter.model.architecture import Architecture, Role, Shape, Stack
from converter.plan.plan import TensorPlan
from converter.quantize.formats import format_of
from converter.read.header import TensorHeader
from converter.read.stored.schemes import Sources
from converter.read.stored.stored import Source, is_stored
from converter.recipe import Recipe


def taken_apart(
    sources: Sources, architecture: Architecture, shapes: Mapping[str, Shape], recipe: Recipe
) -> tuple[Sources, Architecture, dict[str, Shape]]:
    """A base, what transformers makes of it, and its shapes, with a tensor for each linear layer of each expert in the
    place of those that hold the experts of a layer and are to be quantized.

    Raises `Unsupported` where such a tensor is quantized, and `BadRecipe` where vLLM couldn't join the experts' scales.
    """
    by_name: dict[str, Source] = {}
    roles, plain = dict(architecture.roles), dict(shapes)
    stacks = {stack.parameter: stack for stack in architecture.stacks}
    of_tensor = {name: stack for stack in architecture.stacks for name in stack.apart}
    for name, source in sources.by_name.items():
        if name not in of_tensor or not roles[name].quantize:
            by_name[name] = source
            continue
        if not isinstance(source, TensorHeader):
            raise Unsupported(f"{name}: experts that are quantized together; give the 16-bit model that they are of")
        stack, role = of_tensor[name], roles.pop(name)
        del plain[name]
        pieces: dict[str, tuple[int | None, int, bool]] = {}
        for part, expert, first in _parts(source, stack):
            by_name[part.name] = part
            roles[part.name] = Role(role.parameter, "linear", quantize=True, float32=role.float32)
            plain[part.name] = part.shape
            pieces[part.name] = (expert, first, False)
        stacks[stack.parameter] = replace(stack, pieces=pieces)
    for name in _of_experts(architecture.stacks) & plain.keys() | (plain.keys() - shapes.keys()):
        in_blocks = recipe.target == "vllm" and roles[name].quantize
        if in_blocks and math.prod(plain[name]) % recipe.block_size:
            raise BadRecipe(
                f"{name}: its {math.prod(plain[name]):,} weights are not whole blocks of {recipe.block_size}, and vLLM "
                "joins the scales of experts: choose a smaller `block_size`"
            )
    architecture = replace(architecture, roles=roles, stacks=tuple(stacks.values()))
    return replace(sources, by_name=by_name), architecture, plain


def _parts(source: TensorHeader, stack: Stack) -> list[tuple[TensorHeader, int, int]]:
    """Rows of a tensor (experts, rows, columns), as tensors: with the expert, and the row of its matrix, of each."""
    experts, rows, columns = source.shape
    parts = stack.apart[source.name]
    height, owner = rows // len(parts), source.name.rpartition(".")[0]
    size = source.nbytes // experts // len(parts)
    found = []
    for expert in range(experts):
        for number, part in enumerate(parts):
            offset = source.offset + (expert * len(parts) + number) * size
            name = f"{owner}.{expert}.{part}.weight"
            header = TensorHeader(name, source.dtype, (height, columns), source.file, offset, size)
            found.append((header, expert, number * height))
    return found


def _of_experts(stacks: Sequence[Stack]) -> set[str]:
    return {name for stack in stacks for name in stack.pieces}


def uneven(tensors: Iterable[TensorPlan], recipe: Recipe) -> Iterator[str]:
    """Names of quantized weights whose size is no multiple of the block size."""
    for tensor in tensors:
        if tensor.is_quantized:
            source = tensor.source
            block = format_of(recipe).block(tensor.columns)
            if tensor.action == "copy" and is_stored(source):
                block = source.block
            if math.prod(tensor.shape) % block:
                yield tensor.name


def note_on_kept(tensors: Sequence[TensorPlan], architecture: Architecture, recipe: Recipe) -> str:
    """What it costs to keep experts in 16 bits; empty if none is kept."""
    experts = _of_experts(architecture.stacks)
    kept = [tensor for tensor in tensors if tensor.name in experts and not tensor.is_quantized]
    if not kept or recipe.quant_type == "none":
        return ""
    compressed = format_of(recipe).library == "compressed-tensors"
    reason = "all of a layer in one tensor" if compressed else "since transformers 5 loads no others"
    plain = sum(math.prod(tensor.shape) for tensor in tensors if not tensor.is_quantized)
    whole, nbytes = sum(math.prod(tensor.shape) for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    note = (
        f"experts stay in 16 bits, {reason}: {plain / whole:.0%} of the weights are not "
        f"quantized, and the output takes {_size(nbytes)}"
    )
    if compressed:
        return f"{note}; vLLM and SGLang don't take it"
    could = {name for stack in architecture.stacks for name in stack.apart}
    could |= {name for stack in architecture.stacks for name, piece in stack.pieces.items() if piece[0] is not None}
    if recipe.quant_type != "nf4" or not {tensor.name for tensor in kept} <= could:
        return note
    smaller = nbytes - sum(tensor.nbytes for tensor in kept) + sum(_in_nf4(tensor, recipe) for tensor in kept)
    return f"{note}; with `target` vllm, {_size(smaller)}"


def _in_nf4(tensor: TensorPlan, recipe: Recipe) -> int:
    rows = math.prod(tensor.shape[:-1])
    return sum(output.nbytes for output in format_of(recipe).outputs(tensor.name, (rows, tensor.shape[-1])))


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"

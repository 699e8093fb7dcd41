"""Memory: how large tiles may be, so that everything in flight fits the budget.

The budget covers what the process takes above its imports: buffers of the tiles in flight, what is made of them, the
absmax of a whole tensor, the adapter's factors, headers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from converter.calibration import DEFAULT_WINDOW
from converter.errors import BadRecipe
from converter.plan.plan import CutAs, Plan, TensorPlan
from converter.quantize.cut import MIN_MERGE_ROWS, STRIP_ELEMENTS, longest_strip, tile_bounds
from converter.quantize.format import BY_TORCH
from converter.quantize.formats import format_of
from converter.read.header import DTYPE_BYTES
from converter.read.stored.stored import is_stored
from converter.resources import DEFAULT_MEMORY, Resources

if TYPE_CHECKING:
    from converter.recipe import Recipe

FIXED = 64_000_000
"""Bytes that don't depend on tensors: Python's objects, plan, receipt, allocators' waste. A test holds it."""
IN_FIXED = 2_000
"""Tensors of a base whose Python objects `FIXED` includes."""
PER_TENSOR_OF_BASE, PER_OUTPUT = 4_000, 1_300
"""Bytes of Python's objects for each further tensor, and for each output tensor. Measured with 27,000 and 190,000."""

_BY_FEEDBACK = 28.0
"""Bytes that a weight of a strip takes where it is rounded with error feedback: base, delta and sum in float32, what is
made of them on the way, its code."""
_BY_GPTQ = BY_TORCH + 20.0
"""Bytes that a weight takes whose codes a text chooses: also its target and its steps, in both orders of columns."""
ACTIVATIONS = 256_000_000
"""Bytes of activations that are in memory while an output is calibrated; those beyond are in a file."""
_OF_MOMENTS, _OF_BATCH = 20, 40
"""Bytes of memory for each second moment of a module's inputs, and for each input of a batch."""
_NUMBER = re.compile(r"\.\d+\.")
"""What the names of a layer's tensors begin with, up to its number."""
_STRIP_ROWS = 3 * MIN_MERGE_ROWS
"""The most rows of a strip, where rows are long."""


def cut_into_tiles(
    tensors: Sequence[TensorPlan], recipe: Recipe, resources: Resources, reserved: int | None = None
) -> tuple[list[TensorPlan], int, list[str]]:
    """The tensors, cut so that everything in flight fits the budget; the predicted peak of memory in bytes; notes.

    `reserved`: bytes that are not for tiles, where several outputs are made from the same ones.

    What can't be cut may need more than the default budget, which then gives way. Raises `BadRecipe` where it needs
    more than a budget that was asked for, naming it.
    """
    objects = 0
    if reserved is None:
        objects = _objects(tensors)
        reserved = FIXED + objects + in_flight(tensors, recipe, resources) + _calibrating(tensors, recipe)
    room = ((resources.memory or DEFAULT_MEMORY + objects) - reserved) / resources.slots
    fewest, largest_tile = resources.tile_weights
    cut: list[TensorPlan] = []
    largest, name = 0.0, ""
    for tensor in tensors:
        each = _tile_bytes(tensor, recipe, resources)
        if tensor.whole is None and not _is_calibrated(tensor, recipe):
            block = format_of(recipe).block(tensor.columns) if tensor.action == "quantize" else 1
            if is_stored(tensor.source) and tensor.action != "copy":
                block = math.lcm(block, tensor.source.block)
            most = max(fewest, min(largest_tile, int(room / each)))
            tensor = replace(tensor, tiles=tile_bounds(tensor.rows, tensor.columns, block=block, most=most))
        cut.append(tensor)
        needed = tensor.largest_tile * each + _strip_bytes(tensor, recipe)
        if needed > largest:
            largest, name = needed, tensor.name
    memory = reserved + int(largest) * resources.slots
    if resources.memory is not None and memory > resources.memory:
        raise BadRecipe(
            f"`memory` {resources.memory:,}: {memory:,} bytes are needed, because of {name} and "
            f"{resources.threads} threads"
            + (f", and {objects:,} for {len(tensors):,} tensors" if objects else "")
            + "; give that much"
            + (", or fewer `threads`" if resources.threads > 1 else "")
        )
    notes = []
    if resources.memory is None and memory > DEFAULT_MEMORY >= memory - objects:
        notes.append(f"memory: {memory:,} bytes instead of {DEFAULT_MEMORY:,}: the base has {len(tensors):,} tensors")
    elif resources.memory is None and memory > DEFAULT_MEMORY:
        notes.append(
            f"memory: {memory:,} bytes instead of {DEFAULT_MEMORY:,}: {name} is needed whole, "
            f"by {resources.slots} tiles"
        )
    return cut, memory, notes


def with_tiles(plan: Plan, tiles: Mapping[CutAs, tuple[int, ...]]) -> Plan:
    """The plan with other tiles for some tensors, by what they are cut as. No byte of the output changes."""
    shards = tuple(
        replace(s, tensors=tuple(replace(t, tiles=tiles.get(t.cut_as, t.tiles)) for t in s.tensors))
        for s in plan.shards
    )
    return replace(plan, shards=shards)


def recut(plan: Plan, reserved: int) -> Plan:
    """The plan with tiles that leave `reserved` bytes of the budget: the same for all outputs of a pass."""
    cut, memory, _ = cut_into_tiles(list(plan.tensors()), plan.recipe, plan.resources, reserved)
    return replace(with_tiles(plan, {tensor.cut_as: tensor.tiles for tensor in cut}), memory=memory)


def in_flight(tensors: Sequence[TensorPlan], recipe: Recipe, resources: Resources) -> int:
    """Bytes that one output takes besides its tiles: of tensors that are not finished, and of the adapter's factors."""
    statistics = sorted((_statistics(tensor, recipe) for tensor in tensors), reverse=True)
    factors = sorted((_factors(tensor, recipe) for tensor in tensors), reverse=True)
    # Two tensors can be between their first tile and their last; the factors of as many as there are slots.
    return sum(statistics[:2]) + sum(factors[: resources.slots + 1])


def _objects(tensors: Sequence[TensorPlan]) -> int:
    """Bytes of Python's objects for the tensors beyond `IN_FIXED`."""
    whole = sum(PER_TENSOR_OF_BASE + PER_OUTPUT * len(tensor.outputs) for tensor in tensors)
    return int(whole * max(0, len(tensors) - IN_FIXED) / max(1, len(tensors)))


def _tile_bytes(tensor: TensorPlan, recipe: Recipe, resources: Resources) -> float:
    """Bytes of memory that one weight of a tile takes."""
    dtype = tensor.source.dtype
    if tensor.action == "copy":
        return 1.0
    codes = tensor.source.tile_bytes if is_stored(tensor.source) else 0.0
    if tensor.is_copy:
        return DTYPE_BYTES[dtype] + codes + 1.0  # the mask of what is finite
    if _is_calibrated(tensor, recipe):
        return _BY_GPTQ + codes
    if tensor.action == "keep" or not _is_merged_by_strips(tensor, recipe, resources):
        return BY_TORCH + codes
    return format_of(recipe).tile_bytes(dtype, kernels=resources.kernels) + codes


def _is_calibrated(tensor: TensorPlan, recipe: Recipe) -> bool:
    """Whether its codes are chosen by a text: then all of its scales are known before the first code."""
    return recipe.calibration is not None and tensor.action == "quantize"


def _calibrating(tensors: Sequence[TensorPlan], recipe: Recipe) -> int:
    """Bytes that a layer takes in float32, what it makes of a batch, the second moments of its inputs with their
    factors, and the activations that are in memory."""
    if recipe.calibration is None:
        return 0
    layers: Counter[str] = Counter()
    for tensor in tensors:
        if (number := _NUMBER.search(tensor.name)) is not None:
            layers[tensor.name[: number.end()]] += 4 * math.prod(tensor.shape)
    widest = max((tensor.columns for tensor in tensors if tensor.action == "quantize"), default=0)
    batch = max(recipe.calibration.window or 0, DEFAULT_WINDOW) * widest
    activations = min(ACTIVATIONS, 4 * recipe.calibration.tokens * widest)
    if recipe.calibration.is_self:  # keys and values of all layers, before the layers run over the text
        activations = ACTIVATIONS
    return max(layers.values(), default=0) + _OF_MOMENTS * widest**2 + _OF_BATCH * batch + activations


def _is_merged_by_strips(tensor: TensorPlan, recipe: Recipe, resources: Resources) -> bool:
    """Whether no more than a strip of merged rows is in memory; so is what isn't merged."""
    if tensor.change is None or tensor.change.is_additive:
        return True
    by_kernels = resources.kernels and recipe.merge_precision == "float32"
    return by_kernels and tensor.change.is_transforming and not tensor.transpose


def _strip_bytes(tensor: TensorPlan, recipe: Recipe) -> float:
    """Bytes that the strip takes which a thread merges at a time."""
    if not tensor.is_merged:
        return 0.0
    if recipe.rounding == "adapter" and tensor.action == "quantize":
        block = format_of(recipe).block(tensor.columns)
        return _BY_FEEDBACK * min(tensor.largest_tile, longest_strip(tensor.columns, block))
    # A change in float32, and the base's values where they are transformed.
    each = 4.0 if tensor.change is None or not tensor.change.is_transforming else 8.0
    return each * max(STRIP_ELEMENTS, _STRIP_ROWS * tensor.columns)


def _statistics(tensor: TensorPlan, recipe: Recipe) -> int:
    """Bytes that a tensor's absmax and the sums of its rows take until its last tile is done."""
    state = format_of(recipe).state_bytes(tensor.rows, tensor.columns) if tensor.action == "quantize" else 0
    if is_stored(tensor.source):
        state += tensor.source.opened_bytes
    return state + (0 if tensor.is_copy else 80 * tensor.rows)


def _factors(tensor: TensorPlan, recipe: Recipe) -> int:
    """Bytes of an adapter's factors; of the input directions that error feedback makes of them, three times as many."""
    feedback = 4 if recipe.rounding == "adapter" else 1
    changes = [part.change for part in tensor.fused if part.change is not None]
    surveyed = max((change.nbytes for change in changes), default=0)  # those of one part at a time
    return surveyed + (0 if tensor.change is None else tensor.change.nbytes * feedback)

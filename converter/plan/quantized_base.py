"""A quantized base: in which settings its weights become an output, and which of them are copied as they are."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, BadRecipe, Unsupported
from converter.merge.lora import Lora
from converter.quantize.dequantized import Dequantized
from converter.quantize.format import Output
from converter.read.stored.bnb_4bit import FourBitWeight
from converter.read.stored.bnb_8bit import EightBitWeight
from converter.read.stored.stored import Source, Stored, in_order, is_stored
from converter.recipe import ROUNDED, QuantType, Recipe

if TYPE_CHECKING:
    from converter.merge.change import Change
    from converter.model.architecture import Architecture, Shape
    from converter.read.stored.schemes import Sources

Settings = tuple[QuantType, bool, int]
"""Quant type, double quant, block size: what a recipe says of the formats of bitsandbytes."""
_INT8: Settings = ("int8", True, 64)


_INTEGERS = {"w4a16": " 4-bit", "w8a16": " 8-bit"}
"""Integer formats → how the name of a base's scheme ends if its weights are integers of the same size."""


def settings_of(source: Source) -> Settings | None:
    """Those of a weight in a format that an output may have, too; else None."""
    if isinstance(source, FourBitWeight):
        return "fp4" if source.state.quant_type == "fp4" else "nf4", source.state.offset is not None, source.state.block
    return _INT8 if isinstance(source, EightBitWeight) else None


def settled(recipe: Recipe, sources: Sources) -> Recipe:
    """The recipe with what depends on the base decided: format, rounding and dtype."""
    own = {settings_of(source) for source in sources.stored}
    if recipe.quant_type == "auto" and len(own) == 1 and (settings := own.pop()) is not None:
        quant_type, double_quant, block_size = settings
        # What is not the default was asked for, and may be what the base is not in.
        if recipe.double_quant in (True, double_quant) and recipe.block_size in (64, block_size):
            recipe = replace(recipe, quant_type=quant_type, double_quant=double_quant, block_size=block_size)
    recipe = recipe.resolved(_dtype_of(sources))
    if recipe.target == "vllm" and recipe.quant_type != "nf4":
        raise BadRecipe(f"`target` vllm: the base is {recipe.quant_type}; give `quant_type` nf4, too")
    if sources.stored and recipe.rounding == "auto":
        kept = recipe.merge_precision == "float32" and _are_on_its_points(sources.stored, recipe.quant_type)
        recipe = replace(recipe, rounding="adapter" if kept else "nearest")
    return recipe


def _are_on_its_points(stored: Iterable[Stored], quant_type: str) -> bool:
    """Whether the codes of this format stand for the base's values, or nearly so. If not, rounding to the nearest code
    loses no more of an adapter than it does on a 16-bit base."""
    if quant_type in _INTEGERS:
        return any(source.scheme.endswith(_INTEGERS[quant_type]) for source in stored)
    return quant_type in ROUNDED and any(settings_of(source) is not None for source in stored)


def notes_on(sources: Sources, recipe: Recipe, *, touched: int) -> list[str]:
    """What a user should know of a quantized base. `touched`: how many of its weights the adapter changes."""
    if not sources.stored:
        return []
    schemes = Counter(source.scheme for source in sources.stored)
    notes = [f"the base is quantized ({', '.join(sorted(schemes))}): the 16-bit model that it was made from gives more"]
    own = {found for source in sources.stored if (found := settings_of(source)) is not None}
    if own and not keeps_format(recipe, sources):
        listed = " and ".join(
            sorted(
                f"{kind}, {'double' if double else 'single'} quant, blocks of {block}" if kind != "int8" else kind
                for kind, double, block in own
            )
        )
        notes.append(f"the base is {listed}, the output isn't: all its weights are quantized again")
    elif not own:
        notes.append("all its weights are quantized again")
    else:
        notes.append(f"{len(sources.stored) - touched} quantized weights of the base are copied as they are")
    return notes


def _dtype_of(sources: Sources) -> str:
    """The dtype that most bytes of the plain weights have; of the decoded ones, if there are no plain ones."""
    counter: Counter[str] = Counter()
    for source in sources.by_name.values():
        if not is_stored(source):
            counter[source.dtype] += source.nbytes
    floats = {dtype: count for dtype, count in counter.items() if dtype in ("F32", "F16", "BF16")}
    if sources.stored and floats:
        return max(sorted(floats), key=lambda dtype: floats[dtype])
    if sources.stored:
        return sources.stored[0].dtype
    return max(sorted(counter), key=lambda dtype: counter[dtype])


def keeps_format(recipe: Recipe, sources: Sources) -> bool:
    """Whether the output's quantized weights are in the settings of the base's."""
    wanted: Settings = (recipe.quant_type, recipe.double_quant, recipe.block_size)
    if recipe.quant_type == "int8":
        wanted = _INT8
    return bool(sources.stored) and all(settings_of(source) == wanted for source in sources.stored)


def copied_outputs(source: Stored) -> tuple[Output, ...]:
    """The tensors of a weight that is copied as it is, in the order in which its bytes are read.

    4-bit codes may lie in tensors of floats, which some loaders convert to others. Their bytes are named what they are.
    """
    *rest, codes = in_order(source)
    if isinstance(source, FourBitWeight):
        codes = replace(codes, dtype="U8", shape=(codes.nbytes, 1))
    return tuple(Output(part.name, part.dtype, part.shape) for part in (*rest, codes))


def state_dtype(source: Source, change: Change | None, recipe: Recipe) -> str | None:
    """The dtype that the quant state of a weight names, by safetensors' name; None: the recipe's.

    Of a 4-bit weight its own, as the base has it. PEFT adds a delta in float32 to what it dequantized and quantizes the
    sum, so the quant state says float32: `peft.tuners.lora.bnb.Linear4bit.merge`.
    """
    if not isinstance(source, FourBitWeight):
        return None
    return "F32" if recipe.merge_precision == "reference" and isinstance(change, Lora) else source.dtype


def own_quantization(sources: Sources) -> dict[str, Any]:
    """The base's own quantization_config, for an output that has the same weights quantized."""
    own = copy.deepcopy(dict(sources.quantization))
    if "bnb_4bit_quant_storage" in own:
        own["bnb_4bit_quant_storage"] = "uint8"  # see `copied_outputs`
    return own


def described(
    ask: Callable[[Mapping[str, Shape]], Architecture], sources: Sources
) -> tuple[Architecture, dict[str, Shape]]:
    """What transformers makes of a base, and the shapes that its weights would have if they weren't quantized.

    A quantized Conv1D is (out_features, in_features), a plain one the other way round. A model has only one kind.
    """
    shapes = {name: source.shape for name, source in sources.by_name.items()}
    stored = {source.name for source in sources.stored}
    try:
        return ask(shapes), shapes
    except BadCheckpoint:
        if not stored:
            raise
        turned = {name: shape[::-1] if name in stored else shape for name, shape in shapes.items()}
        with suppress(BadCheckpoint):
            return ask(turned), turned
        raise


def as_stored(architecture: Architecture, sources: Sources) -> Architecture:
    """The architecture in which just what the base has quantized is quantized, whatever transformers' rule."""
    stored = {source.name for source in sources.stored}
    roles = {name: replace(role, quantize=name in stored) for name, role in architecture.roles.items()}
    return replace(architecture, roles=roles)


def as_trained_on(architecture: Architecture, sources: Sources, recipe: Recipe) -> tuple[Sources, Architecture]:
    """The base as QLoRA trains on it: its linear layers are read as their NF4 codes; none is quantized in the output.

    Raises `Unsupported` for a base that is quantized.
    """
    if sources.stored:
        raise Unsupported("`merge_onto` dequantized: the base is quantized already, and is merged onto as it is")
    quantized = {name: role for name, role in architecture.roles.items() if role.quantize}
    read = {
        name: Dequantized.of(sources.by_name[name], recipe, turned=role.kind == "conv1d")  # type: ignore[arg-type]
        for name, role in quantized.items()
    }
    roles = {name: replace(role, quantize=False) for name, role in architecture.roles.items()}
    return replace(sources, by_name={**sources.by_name, **read}), replace(architecture, roles=roles, skip_modules=None)

"""Every output format, by the name that a recipe gives it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from converter.quantize.compressed import Compressed, fitted, server_notes
from converter.quantize.eight_bit import EightBit
from converter.quantize.four_bit import FourBit
from converter.quantize.schemes import SCHEMES, fused_with
from converter.quantize.sixteen_bit import SixteenBit

if TYPE_CHECKING:
    from converter.quantize.format import Format, Shape
    from converter.recipe import Recipe

FORMATS: dict[str, Callable[[Recipe], Format]] = {
    "nf4": FourBit,
    "fp4": FourBit,
    "int8": EightBit,
    "none": SixteenBit,
    "w4a16": Compressed,
    "w8a16": Compressed,
    "fp8": Compressed,
    "fp8-block": Compressed,
    "nvfp4a16": Compressed,
    "mxfp4a16": Compressed,
}


def format_of(recipe: Recipe, dtype: str | None = None) -> Format:
    """The format that a recipe asks for whose quant type is decided, with its settings. `dtype`: what quant states name
    in the place of its own."""
    if dtype is not None and recipe.four_bit:
        return FourBit(recipe, {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype])
    return FORMATS[recipe.quant_type](recipe)


def fit(recipe: Recipe, shapes: Mapping[str, Shape]) -> Recipe:
    """The recipe with what depends on the weights to quantize decided; `shapes` are (out_features, in_features).

    Raises `BadRecipe` where its format can't hold one of them.
    """
    return fitted(recipe, shapes) if FORMATS[recipe.quant_type] is Compressed else recipe


def notes_for_servers(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """What servers make of weights to quantize; `shapes` are (out_features, in_features)."""
    return server_notes(recipe, shapes) if FORMATS[recipe.quant_type] is Compressed else []


def sharing(recipe: Recipe, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Weight → the weights to quantize that share a scale with it, itself included; empty where none do."""
    scheme = SCHEMES.get(recipe.quant_type)
    return fused_with(names) if scheme is not None and scheme.has_global_scale else {}


def all_formats() -> list[Format]:
    """One of each kind, for asking whose weights a checkpoint holds."""
    from converter.recipe import Recipe

    return [make(Recipe(quant_type="nf4")) for make in dict.fromkeys(FORMATS.values())]

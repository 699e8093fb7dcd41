"""Every output format, by the name that a recipe gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from converter.quantize.eight_bit import EightBit
from converter.quantize.four_bit import FourBit
from converter.quantize.sixteen_bit import SixteenBit

if TYPE_CHECKING:
    from converter.quantize.format import Format
    from converter.recipe import Recipe

FORMATS: dict[str, Callable[[Recipe], Format]] = {
    "nf4": FourBit,
    "fp4": FourBit,
    "int8": EightBit,
    "none": SixteenBit,
}


def format_of(recipe: Recipe) -> Format:
    """The format that a recipe asks for, with its settings."""
    return FORMATS[recipe.quant_type](recipe)


def all_formats() -> list[Format]:
    """One of each kind, for asking whose weights a checkpoint holds."""
    from converter.recipe import Recipe

    return [make(Recipe()) for make in dict.fromkeys(FORMATS.values())]

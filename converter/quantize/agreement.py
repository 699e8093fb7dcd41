"""How far the codes and scales that an accelerator made agree with those that the CPU makes of the same rows.

Both follow the same formulas, but an accelerator adds up in another order. A sum that differs by float32's rounding may
fall on the other side of a boundary between two codes; that is rare, and nothing else may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from converter.quantize.format import Encoded
    from converter.recipe import Recipe

MOST_CODES = 1e-3
"""The largest share of a tile's codes that may differ."""
_FLOAT32 = 1e-5
"""The largest relative difference of two scales that float32's rounding explains: some tens of its steps of 6e-8."""
_STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""One step of a dtype, relative to the smallest value that it is a step of."""


@dataclass(frozen=True)
class Agreement:
    """Of tiles that were made twice."""

    tiles: int = 0
    codes: float = 0.0
    """The largest share of a tile's codes that differed."""
    scales: float = 0.0
    """The largest relative difference of two scales."""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.tiles + other.tiles, max(self.codes, other.codes), max(self.scales, other.scales))

    def is_explained(self, recipe: Recipe) -> bool:
        """Whether rounding explains what differs."""
        return self.codes <= MOST_CODES and self.scales <= most_of_scales(recipe)


def total_of(found: Iterable[Agreement | None]) -> Agreement | None:
    """Of all; None if nothing was made again."""
    agreements = [one for one in found if one is not None]
    return sum(agreements, Agreement()) if agreements else None


def most_of_scales(recipe: Recipe) -> float:
    """The largest relative difference of two scales that rounding explains.

    Scales are taken of values that were rounded to a dtype before, where the merge does as PEFT does, and in LLM.int8.
    """
    if recipe.quant_type == "int8":
        return _STEP["float16"]
    return _STEP[recipe.dtype] if recipe.merge_precision == "reference" else _FLOAT32


def agreement(made: Sequence[Tensor], encoded: Encoded, again: Encoded) -> Agreement:
    """Of one tile. `made`: the bytes of the pieces of `encoded`, as they go into the output; `again`: by the CPU.

    A code is four bits of packed ones, which have the dtype uint8 or int32, and one value of any other piece.
    """
    different = whole = 0
    found, expected = _joined(encoded, made), _joined(again, [values for _, _, values in again.pieces])
    for name, (dtype, raw) in found.items():
        codes = _codes(raw, dtype)
        whole += codes.size
        different += codes.size if name not in expected else _differing(codes, _codes(expected[name][1], dtype))
    largest = 0.0
    if encoded.scales is not None and again.scales is not None:
        ours, theirs = encoded.scales.detach().cpu().double(), again.scales.double()
        apart = (ours - theirs).abs() / theirs.abs().clamp_min(1e-300)
        largest = float(apart.max()) if apart.numel() else 0.0
    return Agreement(1, different / max(whole, 1), largest)


def _joined(encoded: Encoded, made: Sequence[Tensor]) -> dict[str, tuple[Any, np.ndarray[Any, Any]]]:
    """Output name → dtype and bytes; a tile may come in strips."""
    import numpy

    from converter.tensors import as_bytes

    raw: dict[str, list[np.ndarray[Any, Any]]] = {}
    dtypes: dict[str, Any] = {}
    for (name, _, values), piece in zip(encoded.pieces, made, strict=True):
        raw.setdefault(name, []).append(numpy.frombuffer(as_bytes(piece), numpy.uint8))
        dtypes[name] = values.dtype
    return {name: (dtypes[name], numpy.concatenate(parts)) for name, parts in raw.items()}


def _codes(raw: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    import numpy
    import torch

    if dtype in (torch.uint8, torch.int32):
        return numpy.stack([raw & 15, raw >> 4])
    return raw.view(f"u{dtype.itemsize}")


def _differing(codes: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> int:
    return int((codes != others).sum()) if codes.shape == others.shape else codes.size

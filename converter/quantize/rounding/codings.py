"""What rounding needs to know of a format: its grid, its scales, and how codes are stored; one class a format."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from converter.errors import NotFinite
from converter.quantize import formulas
from converter.quantize.compressed import Compressed
from converter.quantize.rounding.feedback import Grid, whole_numbers
from converter.read.stored.bnb_4bit import ABSMAX, NESTED_ABSMAX, NESTED_MAP, STATE, restored_absmax
from converter.read.stored.codes import four_bit_map
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from converter.quantize.format import Encoder, Rows, Shape
    from converter.recipe import Recipe

Pieces = tuple[tuple[str, int, "Tensor"], ...]


class Coding(Protocol):
    """Codes and scales of one format."""

    @property
    def grid(self) -> Grid:
        """What codes stand for."""

    def block(self, columns: int) -> int:
        """Consecutive weights, across rows, that share a scale."""

    def scales(self, name: str, target: Tensor) -> Tensor:
        """What `Encoder.finish` needs of some rows: float32, one for each block. Raises `NotFinite`."""

    def stored(self, scales: Tensor) -> Tensor:
        """Scales, rounded to the dtype that holds them, in float32."""

    def seen(self, name: str, shape: Shape, scales: Tensor, nearest: Encoder) -> Tensor:
        """The scales of a whole weight as a loader restores them."""

    def steps(self, scales: Tensor) -> Tensor:
        """What the grid's values are multiplied by, for each block."""

    def pieces(self, rows: Rows, codes: Tensor, scales: Tensor) -> Pieces:
        """The output's bytes: codes are int8 (rows, columns), indices of grid values or whole numbers."""


def coding_of(recipe: Recipe) -> Coding:
    """The coding of a recipe's format, which is one of those that are rounded with error feedback."""
    if recipe.four_bit:
        return FourBitCoding(recipe)
    return EightBitCoding() if recipe.quant_type == "int8" else GroupCoding(recipe)


class FourBitCoding:
    """NF4 and FP4. The scale of a block is its largest absolute value after the merge."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @property
    def grid(self) -> Grid:
        return self._table[0]

    @cached_property
    def _table(self) -> tuple[Grid, Any]:
        """The grid, and the code of each of its values."""
        import numpy

        code = four_bit_map(self._recipe.quant_type).numpy()
        # The first of FP4's two zeros comes first, as in bitsandbytes.
        order = numpy.argsort(code, kind="stable")
        values = code[order]
        return Grid(values, (values[:-1] + values[1:]) / numpy.float32(2)), order.astype(numpy.uint8)

    def block(self, columns: int) -> int:
        return self._recipe.block_size

    def scales(self, name: str, target: Tensor) -> Tensor:
        import torch

        flat, block = target.flatten(), self._recipe.block_size
        whole = flat.numel() // block * block
        scales = flat[:whole].view(-1, block).abs().amax(1)
        if whole < flat.numel():
            scales = torch.cat([scales, flat[whole:].abs().max()[None]])
        if not bool(scales.isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity")
        return scales

    def stored(self, scales: Tensor) -> Tensor:
        return scales

    def seen(self, name: str, shape: Shape, scales: Tensor, nearest: Encoder) -> Tensor:
        if not self._recipe.double_quant:
            return scales
        made = nearest.finish(name, shape, [scales.clone()])
        parts = {part.removeprefix(name): value for part, value in made.items()}
        offset = json.loads(bytes(parts[f"{STATE}{self._recipe.quant_type}"].numpy()))["nested_offset"]
        restored = restored_absmax(parts[ABSMAX], parts[NESTED_ABSMAX], parts[NESTED_MAP], offset)
        return restored.to(scales.device)

    def steps(self, scales: Tensor) -> Tensor:
        return scales

    def pieces(self, rows: Rows, codes: Tensor, scales: Tensor) -> Pieces:
        import torch

        flat = torch.from_numpy(self._table[1]).to(codes.device)[codes.flatten().int()]
        if flat.numel() % 2:
            zero = int((four_bit_map(self._recipe.quant_type) == 0).nonzero()[0])
            flat = torch.cat([flat, flat.new_full((1,), zero)])
        return ((rows.name, rows.first // 2, flat[::2] << 4 | flat[1::2]),)


class EightBitCoding:
    """LLM.int8. The scale of a row is its largest absolute value after the merge, in float16."""

    def __init__(self) -> None:
        self.grid = whole_numbers(127)

    def block(self, columns: int) -> int:
        return columns

    def scales(self, name: str, target: Tensor) -> Tensor:
        absmax = self.stored(target.abs().amax(1))
        if not bool(absmax.isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for float16 (int8)")
        return absmax

    def stored(self, scales: Tensor) -> Tensor:
        import torch

        return scales.to(torch.float16).float()

    def seen(self, name: str, shape: Shape, scales: Tensor, nearest: Encoder) -> Tensor:
        return scales

    def steps(self, scales: Tensor) -> Tensor:
        return scales / 127

    def pieces(self, rows: Rows, codes: Tensor, scales: Tensor) -> Pieces:
        return ((rows.name, rows.first, codes),)


class GroupCoding:
    """Integers of compressed-tensors, whose scales are stored with the codes."""

    def __init__(self, recipe: Recipe) -> None:
        self._scheme = Compressed(recipe).scheme
        self._dtype = recipe.dtype
        half = 1 << (self._scheme.bits - 1)
        self.grid = whole_numbers(half - 1, -half)

    def block(self, columns: int) -> int:
        return self._scheme.extent(columns)[1]

    def scales(self, name: str, target: Tensor) -> Tensor:
        import torch

        dtype = torch_dtype(self._dtype)
        if not float(target.abs().amax()) <= torch.finfo(dtype).max:
            raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for {self._dtype}")
        return formulas.quantize(target, self._scheme, dtype).scales.float().flatten()

    def stored(self, scales: Tensor) -> Tensor:
        return scales.to(torch_dtype(self._dtype)).float()

    def seen(self, name: str, shape: Shape, scales: Tensor, nearest: Encoder) -> Tensor:
        return scales

    def steps(self, scales: Tensor) -> Tensor:
        return scales

    def pieces(self, rows: Rows, codes: Tensor, scales: Tensor) -> Pieces:
        module, (count, columns) = rows.name.removesuffix(".weight"), codes.shape
        stored = scales.view(count, -1).to(torch_dtype(self._dtype))
        first = rows.start * stored.shape[1] * stored.element_size()
        packed = formulas.packed_integers(codes.float(), self._scheme.bits)
        return (
            (f"{module}.weight_packed", rows.start * columns * self._scheme.bits // 8, packed),
            (f"{module}.weight_scale", first, stored),
        )

"""compressed-tensors: formats that vLLM and SGLang load without plugins.

On a CPU the kernels of `scheme_kernels.py` quantize, where numba is installed; on an accelerator, and without numba,
torch does, by the formulas of `formulas.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from converter.errors import BadRecipe, NotFinite
from converter.merge.change import MergedTile, Rounding
from converter.quantize import formulas
from converter.quantize.compressed_files import find_weights
from converter.quantize.format import BY_TORCH, Encoded, Found, Output, Rows, Shape
from converter.quantize.measure import row_sums
from converter.quantize.schemes import GROUP_SIZES, SCHEMES, Scheme
from converter.quantize.strips import kernel_dtypes, kernels_take, strips
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.checkpoint import Checkpoint
    from converter.recipe import Recipe
    from converter.threads import Buffers

_STORED = {"BF16": 2.0, "F32": 4.0, "F16": 6.0}
"""Bytes that a weight takes in a tile of the CPU kernels before it is quantized: a float16 becomes a float32, too."""


def fitted(recipe: Recipe, shapes: Mapping[str, Shape]) -> Recipe:
    """The recipe with a group size that all weights to quantize allow. `BadRecipe` where there is none.

    `shapes` are (out_features, in_features), by name.
    """
    scheme = SCHEMES[recipe.quant_type]
    if scheme.kind == "float":
        # Activations are quantized in groups as wide as a block: neither transformers nor vLLM runs other rows.
        sizes: Iterable[int | None] = (scheme.group if scheme.block is None else scheme.block[1],)
    else:
        sizes = GROUP_SIZES if recipe.group_size is None else (recipe.group_size,)
    unfit = {}
    for size in sizes:
        unfit = {name: shape[1] for name, shape in shapes.items() if not replace(scheme, group=size).fits(shape)}
        if not unfit:
            return replace(recipe, group_size=size) if scheme.kind == "int" else recipe
    name = min(unfit, key=lambda name: unfit[name])
    groups = " or ".join(map(str, sizes))
    raise BadRecipe(
        f"{name}: its {unfit[name]:,} inputs are not divided by groups of {groups} ({len(unfit)} such weights); "
        f"choose another format or group size, or name the modules with `keep`"
    )


def server_notes(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """What servers make of weights of these shapes, (out_features, in_features), by name."""
    scheme, notes = SCHEMES[recipe.quant_type], []
    if scheme.kind == "int" and (unfit := [name for name, shape in shapes.items() if shape[0] % 64 or shape[1] % 128]):
        what = "outputs are not divided by 64, or its inputs not by 128: vLLM has only slower kernels for it, or none"
        notes.append(f"{unfit[0]}: its {what} ({len(unfit)} of {len(shapes)} weights)")
    if scheme.kind == "float" and scheme.bits == 4 and recipe.dtype == "float16":
        notes.append(
            "transformers restores such weights in bfloat16, and can't run the rest in float16: use `dtype` bfloat16"
        )
    if any(".experts." in name for name in shapes):
        notes.append("experts are quantized one by one, as vLLM serves them; transformers restores them as it loads")
    return notes


@dataclass(frozen=True)
class Compressed:
    """A scheme of compressed-tensors, with a recipe's settings."""

    recipe: Recipe

    @property
    def scheme(self) -> Scheme:
        scheme = SCHEMES[self.recipe.quant_type]
        if scheme.kind == "float":
            return scheme
        return replace(scheme, group=self.recipe.group_size or scheme.group, searches=self.recipe.scale_search)

    @property
    def description(self) -> str:
        return f"{self.scheme.bits}-bit weights of compressed-tensors ({self.scheme.preset})"

    @property
    def tags(self) -> tuple[str, ...]:
        return "compressed-tensors", f"{self.scheme.bits}-bit"

    @property
    def settings(self) -> Mapping[str, str]:
        scheme = self.scheme
        found = {"group size": str(scheme.group)} if scheme.kind == "int" else {}
        return found | ({"scales": "those with the smallest squared error"} if scheme.searches else {})

    @property
    def library(self) -> str:
        return "compressed-tensors"

    def block(self, columns: int) -> int:
        return self.scheme.extent(columns)[0] * columns

    def outputs(self, name: str, shape: Shape) -> tuple[Output, ...]:
        dtype = {"bfloat16": "BF16", "float16": "F16"}[self.recipe.dtype]
        tensors = self.scheme.tensors(name.removesuffix(".weight"), shape, dtype)
        return tuple(Output(name, dtype, shape) for name, (dtype, shape) in tensors.items())

    def config(self, skip_modules: Sequence[str] | None) -> dict[str, Any]:
        return self.scheme.config(list(skip_modules or ()))

    def state_bytes(self, rows: int, columns: int) -> int:
        return 0  # scales are written with the codes

    def tile_bytes(self, dtype: str, *, kernels: bool) -> float:
        scheme = self.scheme
        if not kernels:
            return BY_TORCH if scheme.layout in ("pack-quantized", "float-quantized") else 1.5 * BY_TORCH
        scales = 8 / scheme.group if scheme.group is not None else 0  # in float32, as stored, and on the way
        return _STORED[dtype] + scheme.bits / 8 + scales

    def encoder(self, device: torch.device, *, kernels: bool = False) -> CompressedEncoder:
        by_kernels = kernels and device.type == "cpu"
        return CompressedKernels(self, device) if by_kernels else CompressedEncoder(self, device)

    def find(self, written: Checkpoint) -> Found:
        return find_weights(written)


class CompressedEncoder:
    """Quantizes as compressed-tensors does on a CPU; a merge that isn't rounded, from its float32 sums."""

    def __init__(self, kind: Compressed, device: torch.device) -> None:
        self._scheme = kind.scheme
        self._dtype = kind.recipe.dtype
        self._device = device

    def load(self, dtypes: Collection[str]) -> None:
        """Nothing is compiled."""

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        merged = self._merged(rows)
        self._refuse_too_large(rows.name, float(merged.values.abs().amax()))
        shared = self._global_scale(rows)
        values = merged.values.contiguous()
        quantized = formulas.quantize(values, self._scheme, torch_dtype(self._dtype), shared)
        pieces = self._pieces(rows, quantized.packed, quantized.scales)
        return Encoded(pieces, shared, row_sums(merged, quantized.restored))

    def largest(self, rows: Rows) -> float:
        largest = float(self._merged(rows).values.abs().amax())
        self._refuse_too_large(rows.name, largest)
        return largest

    def finish(self, name: str, shape: Shape, scales: Sequence[Tensor]) -> dict[str, Tensor]:
        import torch

        module = name.removesuffix(".weight")
        if self._scheme.has_global_scale:
            return {f"{module}.weight_global_scale": scales[0].cpu()}
        if self._scheme.layout == "pack-quantized":
            return {f"{module}.weight_shape": torch.tensor(shape, dtype=torch.int64)}
        return {}

    def _merged(self, rows: Rows) -> MergedTile:
        return replace(rows, rounding=self._rounding(rows)).merged()

    def _global_scale(self, rows: Rows) -> Tensor | None:
        """Float32 [1], where the scheme has one; computed in the recipe's dtype, as the library does."""
        if not self._scheme.has_global_scale:
            return None
        return formulas.global_scale_of(rows.largest, torch_dtype(self._dtype)).to(self._device)

    def _refuse_too_large(self, name: str, largest: float) -> None:
        """Refuse what a loader, which computes in the recipe's dtype, would restore as an infinity; and NaN."""
        import torch

        if not largest <= torch.finfo(torch_dtype(self._dtype)).max:
            raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for {self._dtype}")

    def _rounding(self, rows: Rows) -> Rounding:
        """What the adapter doesn't change is quantized as the library does it on a model loaded in the dtype."""
        return Rounding("reference", self._dtype) if rows.merge is None else rows.rounding

    def _pieces(self, rows: Rows, packed: Tensor, scales: Tensor) -> tuple[tuple[str, int, Tensor], ...]:
        module, scheme = rows.name.removesuffix(".weight"), self._scheme
        first = rows.start // scheme.extent(rows.stored.shape[1])[0] * scales.shape[-1]
        codes = module + (".weight" if scheme.layout == "float-quantized" else ".weight_packed")
        return (
            (codes, rows.first * scheme.bits // 8, packed),
            (f"{module}.weight_scale", first * scales.element_size(), scales),
        )


class CompressedKernels(CompressedEncoder):
    """The same bits by the CPU kernels, which add what an additive change adds while they quantize."""

    def load(self, dtypes: Collection[str]) -> None:
        from converter.quantize import scheme_kernels

        scheme_kernels.load(self._scheme, kernel_dtypes(dtypes))

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        rows = replace(rows, rounding=self._rounding(rows))
        if not kernels_take(rows):
            return super().encode(rows, buffers)
        import numpy
        import torch

        from converter.quantize import jit, scheme_kernels

        (count, columns), scheme = rows.stored.shape, self._scheme
        packed = buffers.take("packed", torch.uint8, count, columns * scheme.bits // 8)
        scales = torch.empty(scheme.scales_shape((count, columns)), dtype=torch.float32)
        sums = numpy.empty((count, jit.SUMS))
        dtype = jit.BFLOAT16 if self._dtype == "bfloat16" else jit.FLOAT16
        height = scheme.extent(columns)[0]
        shared = self._global_scale(rows)
        global_scale = 1.0 if shared is None else float(shared)
        for strip in strips(rows, buffers, block=height * columns):
            largest = scheme_kernels.quantize_rows(
                strip.source,
                scheme,
                dtype,
                global_scale,
                packed[strip.first : strip.last].numpy().ravel(),
                scales[strip.first // height : -(strip.last // -height)].numpy().ravel(),
                sums[strip.first : strip.last],
            )
            self._refuse_too_large(rows.name, largest)
        pieces = self._pieces(rows, packed, formulas.stored_scales(scales, scheme, torch_dtype(self._dtype)))
        return Encoded(pieces, shared, sums if rows.merge is not None else sums[:, :2])

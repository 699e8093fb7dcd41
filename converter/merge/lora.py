"""The merge formula, on tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor, dtype

    from converter.merge.adapter import LoraPair
    from converter.read.checkpoint import Folder, TensorHeader
    from converter.recipe import MergePrecision


@dataclass(frozen=True)
class MergedTile:
    """A tile before it is quantized. All four have the shape (rows, in_features)."""

    values: Tensor
    """What is quantized or kept: float32, the recipe's dtype, or the base's own where nothing is merged."""
    exact: Tensor
    """The sum in float32, which `values` may have rounded."""
    base: Tensor
    """The base's values in float32."""
    delta: Tensor | None
    """scaling · B · A in float32."""


def delta_rows(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Some rows of a LoRA delta, scaling · B · A, in float32: the product first, then the scaling, as PEFT does.

    `a` is (rank, in_features), `b` is (rows, rank), both float32. Equal, bit for bit, to the same rows of the whole
    product for tiles of at least `layout.MIN_MERGE_ROWS` rows.
    `peft.tuners.lora.layer.Linear.get_delta_weight`
    """
    return (b @ a).mul_(scaling)


def merge_tile(weight: Tensor, delta: Tensor | None, precision: MergePrecision, rounded: dtype) -> MergedTile:
    """Base plus delta.

    float32: the sum in float32, of the base's own values, is what is quantized.
    reference: the base is cast to `rounded`, the sum is computed in float32 and cast to `rounded` again, as PEFT's
    `merge_and_unload` does on a model loaded in that dtype.
    """
    base = weight.float()
    exact = base if delta is None else base + delta
    if precision == "float32":
        return MergedTile(weight if delta is None else exact, exact, base, delta)
    values = weight.to(rounded)
    if delta is not None:
        values = (values.float() + delta).to(rounded)
    return MergedTile(values, exact, base, delta)


def read_factors(pair: LoraPair, folder: Folder, device: torch.device) -> tuple[Tensor, Tensor]:
    """A (rank, in_features) and B (out_features, rank) of a delta, in float32, which holds every dtype of a file."""
    return _read_float32(pair.a, folder).to(device), _read_float32(pair.b, folder).to(device)


def _read_float32(header: TensorHeader, folder: Folder) -> Tensor:
    import torch

    raw = bytearray(header.nbytes)
    folder.read_into(header.file, header.offset, memoryview(raw))
    return torch.frombuffer(raw, dtype=torch_dtype(header.dtype)).view(header.shape).float()

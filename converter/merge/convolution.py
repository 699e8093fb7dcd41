"""LoRA and DoRA on convolutions of one, two and three dimensions. These weights are small: they are merged whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.merge.change import MergedTile, Rounding, add, transform
from converter.merge.lora import Factors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader


@dataclass(frozen=True)
class ConvolutionLora(Factors):
    """The two factors for one convolution without groups; with DoRA, the length of each output channel's weights.

    A is (rank, in_channels, *kernel), B is (out_channels, rank, 1, …).
    """

    magnitude: TensorHeader | None = None
    """(1, out_channels, 1, …)"""
    whole = "the delta of a convolution is made as a whole"

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], *self.a.shape[1:]

    @property
    def nbytes(self) -> int:
        return 3 * sum(part.nbytes for part in self.parts)

    @property
    def label(self) -> str:
        return f"{'merge' if self.magnitude is None else 'DoRA'}, rank {self.rank}, scaling {self.scaling:g}"

    def as_json(self) -> dict[str, Any]:
        return {"convolution_lora": self.settings() | {"dora": self.magnitude is not None}}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> ConvolutionMerge:
        a, b, *rest = self.read(folder, device)
        return ConvolutionMerge(convolution_delta(a, b).mul_(self.scaling), rest[0] if rest else None, rounding)


@dataclass(frozen=True)
class ConvolutionMerge:
    """In memory, in float32: `delta` (out_channels, in_channels, *kernel), `magnitude` (1, out_channels, 1, …)."""

    delta: Tensor
    magnitude: Tensor | None
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        shaped = weight.view(self.delta.shape)
        if self.magnitude is None:
            tile = add(shaped, self.delta, self.rounding)
        else:
            tile = transform(shaped, self._dora, self.rounding)
        values, exact, base = (part.reshape(weight.shape) for part in (tile.values, tile.exact, tile.base))
        return MergedTile(values, exact, base, exact - base)

    def _dora(self, base: Tensor) -> Tensor:
        """`peft.tuners.lora.variants._DoraConvNdVariant.merge_unsafe`"""
        assert self.magnitude is not None  # noqa: S101  (the caller's branch)
        merged = base + self.delta
        lengths = merged.norm(p=2, dim=tuple(range(1, merged.dim())), keepdim=True).transpose(1, 0)
        factor: Tensor = (self.magnitude / lengths).view(-1, *[1] * (merged.dim() - 1))
        return factor * merged


def convolution_delta(a: Tensor, b: Tensor) -> Tensor:
    """B · A at every place of the kernel, not scaled: (out_channels, in_channels, *kernel).

    `peft.tuners.lora.layer._ConvNd.get_delta_weight`
    """
    import torch

    if a.shape[2:4] == (1, 1):
        return (b.squeeze(3).squeeze(2) @ a.squeeze(3).squeeze(2))[:, :, None, None]
    convolve = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[a.dim()]
    return convolve(a.transpose(0, 1), b).transpose(0, 1)

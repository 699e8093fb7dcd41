"""Tile → packed codes and absmax; tensor → quant state. The only module that imports bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.errors import NotFinite
from converter.silence import quietly

if TYPE_CHECKING:
    from torch import Tensor

    from converter.recipe import Recipe


@dataclass(frozen=True)
class QuantizedTile:
    """Some rows of a quantized weight."""

    packed: Tensor
    """uint8, two codes a byte, the first in the high bits; int8: the codes, of the tile's shape."""
    absmax: Tensor
    """float32, one a block; int8: one a row."""
    restored: Tensor
    """What the codes stand for, before double quantization: float32, of the tile's shape."""


class Quantizer:
    """Quantizes by one recipe on one device, as `bitsandbytes.functional` does on that device."""

    def __init__(self, recipe: Recipe) -> None:
        import torch

        with quietly():
            import bitsandbytes.functional
        self.recipe = recipe
        self._bnb: Any = bitsandbytes.functional
        self._dtype = getattr(torch, recipe.dtype)
        self._pairs: dict[Any, Tensor] = {}

    def tile(self, name: str, values: Tensor) -> QuantizedTile:
        """Quantize whole blocks: `values` is (rows, columns) in float32, bfloat16 or float16; only the last tile of a
        tensor may end within a block. `NotFinite` naming `name` for NaN and infinity."""
        quantize = self._four_bits if self.recipe.four_bit else self._eight_bits
        result = quantize(values.contiguous())
        # A NaN or an infinity shows in the largest absolute value of its block.
        if not bool(result.absmax.isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for float16 (int8)")
        return result

    def statistics(self, name: str, absmax: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Everything but the codes of weight `name`, by output name, from the absmax of the whole weight.

        `shape` is (out_features, in_features). The mean that double quant subtracts is taken as torch takes it on one
        thread; the caller sees to that.
        """
        import torch

        recipe, bnb = self.recipe, self._bnb
        if not recipe.four_bit:
            module = name.removesuffix(".weight")
            return {f"{module}.SCB": absmax, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        state = bnb.QuantState(
            absmax=absmax,
            shape=torch.Size(shape),
            dtype=self._dtype,
            blocksize=recipe.block_size,
            code=bnb.get_4bit_type(recipe.quant_type, device=absmax.device),
            quant_type=recipe.quant_type,
        )
        if recipe.double_quant:
            state.offset = absmax.mean()
            state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=256)
            state.nested = True
        return {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}

    def _four_bits(self, values: Tensor) -> QuantizedTile:
        recipe = self.recipe
        packed, state = self._bnb.quantize_4bit(
            values, blocksize=recipe.block_size, compress_statistics=False, quant_type=recipe.quant_type
        )
        return QuantizedTile(packed, state.absmax, self._restore(packed, state.absmax, values))

    def _eight_bits(self, values: Tensor) -> QuantizedTile:
        import torch

        codes, absmax, _ = self._bnb.int8_vectorwise_quant(values.to(torch.float16))
        return QuantizedTile(codes, absmax, codes.float().mul_(absmax[:, None] / 127))

    def _restore(self, packed: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
        import torch

        if packed.device not in self._pairs:
            code = self._bnb.get_4bit_type(self.recipe.quant_type, device=packed.device)
            self._pairs[packed.device] = torch.cartesian_prod(code, code)
        block, count = self.recipe.block_size, values.numel()
        restored = self._pairs[packed.device].index_select(0, packed.flatten().int()).flatten()[:count]
        whole = count // block
        restored[: whole * block].view(-1, block).mul_(absmax[:whole, None])
        if whole * block < count:
            restored[whole * block :].mul_(absmax[whole])
        return restored.view(values.shape)

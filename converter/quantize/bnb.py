"""Tile → packed codes and absmax; absmax of a tensor → quant state. The only module that knows bitsandbytes.

On a CPU the kernels of `kernels.py` quantize, where numba is installed; everything else is bitsandbytes' own work.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import NotFinite
from converter.plan.layout import NESTED_BLOCK, quant_state_json
from converter.silence import quietly

if TYPE_CHECKING:
    import torch
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

    def __init__(self, recipe: Recipe, device: torch.device | None = None, *, kernels: bool = False) -> None:
        import torch

        self.recipe = recipe
        self.device = device or torch.device("cpu")
        self.kernels = kernels and self.device.type == "cpu" and recipe.four_bit
        """Whether `kernels.quantize_rows` quantizes in place of `tile`."""
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
        """Everything but the codes of weight `name`, by output name, from the absmax of the whole weight, which is
        used up.

        `shape` is (out_features, in_features). The mean that double quant subtracts is taken as torch takes it on one
        thread; the caller sees to that. `NotFinite` where a loader would restore an infinity.
        """
        import torch

        recipe = self.recipe
        if not recipe.four_bit:
            module = name.removesuffix(".weight")
            return {f"{module}.SCB": absmax, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        # A loader computes with the recipe's dtype. Double quant may make an absmax larger by a hundredth.
        largest = float(absmax.max()) * (1.01 if recipe.double_quant else 1.0)
        if largest > torch.finfo(torch.float16 if recipe.dtype == "float16" else torch.bfloat16).max:
            raise NotFinite(f"{name}: holds {largest:.4g}, a value too large for {recipe.dtype}")
        state = {"absmax": absmax, "quant_map": four_bit_map(recipe.quant_type)}
        offset = None
        if recipe.double_quant:
            mean = absmax.mean()
            offset = mean.item()
            if not math.isfinite(offset):
                raise NotFinite(f"{name}: its values are too large for double quantization")
            state["absmax"], state["nested_absmax"] = self._quantize_absmax(absmax.sub_(mean))
            state["nested_quant_map"] = dynamic_map()
        raw = bytearray(quant_state_json(recipe, shape, offset))
        state[f"quant_state.bitsandbytes__{recipe.quant_type}"] = torch.frombuffer(raw, dtype=torch.uint8)
        return {f"{name}.{key}": value.cpu() for key, value in state.items()}

    @cached_property
    def _bnb(self) -> Any:
        with quietly():
            import bitsandbytes.functional

        return bitsandbytes.functional

    def _quantize_absmax(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (uint8) and absmax (float32) of centred absmax: `quantize_blockwise` of bitsandbytes."""
        native = _native_quantize_blockwise() if centred.device.type == "cpu" else None
        if native is not None:
            return native(centred)
        codes, state = self._bnb.quantize_blockwise(centred, blocksize=NESTED_BLOCK)
        return codes, state.absmax

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
            code = four_bit_map(self.recipe.quant_type).to(packed.device)
            self._pairs[packed.device] = torch.cartesian_prod(code, code)
        block, count = self.recipe.block_size, values.numel()
        restored = self._pairs[packed.device].index_select(0, packed.flatten().int()).flatten()[:count]
        whole = count // block
        restored[: whole * block].view(-1, block).mul_(absmax[:whole, None])
        if whole * block < count:
            restored[whole * block :].mul_(absmax[whole])
        return restored.view(values.shape)


# https://arxiv.org/abs/2305.14314, appendix E
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# One bit of sign, two of exponent, one of fraction: not in order of value.
_FP4 = (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)


@cache
def four_bit_map(quant_type: str) -> Tensor:
    """What each code stands for: float32 [16]. `bitsandbytes.functional.get_4bit_type`"""
    import torch

    values = torch.tensor(_NF4 if quant_type == "nf4" else _FP4, dtype=torch.float32)
    return values / values.abs().max()


@cache
def dynamic_map() -> Tensor:
    """What each code of an absmax stands for: float32 [256]. `bitsandbytes.functional.create_dynamic_map()`

    Seven decades, each with twice as many steps as the one below it, for both signs; and 0 and 1.
    https://arxiv.org/abs/1511.04561
    """
    import torch

    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        steps = 10 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += steps.tolist() + (-steps).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _native_quantize_blockwise() -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The function of bitsandbytes' CPU library that its `quantize_blockwise` calls, without the second that importing
    the package takes; None where this version's library doesn't have it."""
    import torch

    found = importlib.util.find_spec("bitsandbytes")
    if found is None or found.origin is None:
        return None
    try:
        function = ctypes.CDLL(str(Path(found.origin).with_name("libbitsandbytes_cpu.so"))).cquantize_blockwise_cpu_fp32
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_longlong] * 2
    function.restype = None

    def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.contiguous()
        codes = torch.empty(values.shape, dtype=torch.uint8)
        absmax = torch.empty(-(values.numel() // -NESTED_BLOCK), dtype=torch.float32)
        # Held by a name of its own: where two threads ask first, the later map is remembered in place of the earlier.
        code = dynamic_map()
        pointers = (tensor.data_ptr() for tensor in (code, values, absmax, codes))
        function(*pointers, NESTED_BLOCK, values.numel())
        return codes, absmax

    return quantize

"""LLM.int8 of bitsandbytes: a code of eight bits a weight, a scale a row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.errors import NotFinite
from converter.quantize import bnb
from converter.quantize.format import BY_TORCH, Encoded, Found, Output, Rows, Shape
from converter.quantize.measure import row_sums
from converter.quantize.strips import kernel_dtypes, kernels_take, strips

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.checkpoint import Checkpoint
    from converter.recipe import Recipe
    from converter.threads import Buffers

_SCALE, _FORMAT = ".SCB", ".weight_format"


@dataclass(frozen=True)
class EightBit:
    """LLM.int8."""

    recipe: Recipe
    description: str = "8-bit weights of bitsandbytes (LLM.int8)"
    tags: tuple[str, ...] = ("bitsandbytes", "8-bit")
    library: str = "bitsandbytes"

    @property
    def settings(self) -> Mapping[str, str]:
        return {}

    def block(self, columns: int) -> int:
        return 1

    def outputs(self, name: str, shape: Shape) -> tuple[Output, ...]:
        """Names and shapes are those of `bitsandbytes.nn.Int8Params` in a state dict."""
        module = name.removesuffix(".weight")
        scale = Output(module + _SCALE, "F32", shape[:1])
        return Output(name, "I8", shape), scale, Output(module + _FORMAT, "U8", ())

    def config(self, skip_modules: Sequence[str] | None) -> dict[str, Any]:
        return bnb.quantization_config(self.recipe, skip_modules)

    def state_bytes(self, rows: int, columns: int) -> int:
        return 8 * rows

    def tile_bytes(self, dtype: str, *, kernels: bool) -> float:
        return BY_TORCH

    def encoder(self, device: torch.device, *, kernels: bool = False) -> EightBitEncoder:
        return KernelEncoder() if kernels and device.type == "cpu" else EightBitEncoder()

    def find(self, written: Checkpoint) -> Found:
        found = Found()
        for name in written.tensors:
            if name.endswith(_SCALE):
                module = name.removesuffix(_SCALE)
                weight = written.tensors.get(f"{module}.weight")
                found.weights[f"{module}.weight"] = weight.shape if weight is not None else ()
                found.parts |= {f"{module}.weight", name, module + _FORMAT} & written.tensors.keys()
                found.settings = {"quant_type": "int8"}
        return found


class EightBitEncoder:
    """Quantizes as `bitsandbytes.functional.int8_vectorwise_quant` does."""

    def load(self, dtypes: Collection[str]) -> None:
        """Nothing is compiled."""

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        import torch

        merged = rows.merged()
        codes, absmax, _ = bnb.functional().int8_vectorwise_quant(merged.values.contiguous().to(torch.float16))
        # A NaN or an infinity shows in the largest absolute value of its row.
        if not bool(absmax.isfinite().all()):
            raise _not_finite(rows.name)
        restored = codes.float().mul_(absmax[:, None] / 127)
        return Encoded(((rows.name, rows.first, codes),), absmax, row_sums(merged, restored))

    def finish(self, name: str, shape: Shape, scales: Sequence[Tensor]) -> dict[str, Tensor]:
        import torch

        module = name.removesuffix(".weight")
        scale = torch.cat(list(scales)).cpu()
        return {module + _SCALE: scale, module + _FORMAT: torch.tensor(0, dtype=torch.uint8)}


class KernelEncoder(EightBitEncoder):
    """The same bits by a CPU kernel, which adds what an additive change adds while it quantizes."""

    def load(self, dtypes: Collection[str]) -> None:
        from converter.quantize import plain_kernels

        plain_kernels.load(kernel_dtypes(dtypes))

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        if not kernels_take(rows):
            return super().encode(rows, buffers)
        import numpy
        import torch

        from converter.quantize import jit, plain_kernels

        count, columns = rows.stored.shape
        codes, absmax = buffers.take("quantized", torch.int8, count, columns), torch.empty(count, dtype=torch.float32)
        sums = numpy.empty((count, jit.SUMS))
        finite = True
        for strip in strips(rows, buffers):
            finite &= plain_kernels.eight_bit_rows(
                strip.source,
                codes=codes[strip.first : strip.last].numpy().ravel(),
                absmax=absmax[strip.first : strip.last].numpy(),
                sums=sums[strip.first : strip.last],
            )
        if not finite:
            raise _not_finite(rows.name)
        return Encoded(((rows.name, rows.first, codes),), absmax, sums if rows.merge is not None else sums[:, :2])


def _not_finite(name: str) -> NotFinite:
    return NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for float16 (int8)")

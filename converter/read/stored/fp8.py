"""FP8 weights as transformers and DeepSeek save them (quant_method fp8): a scale a block, or one for the weight.

`transformers.integrations.finegrained_fp8.Fp8Dequantize`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.read.stored.scaled import ScaledWeight, shares_of

if TYPE_CHECKING:
    from converter.read.checkpoint import Checkpoint
    from converter.read.header import TensorHeader

_SCALES = (".weight_scale_inv", ".weight_scale")
"""The first is a factor, too, in spite of its name."""
_BESIDE = (".input_scale", ".activation_scale")
"""Of the inputs of a module, which has no part in its weight."""


def fp8_weights(base: Checkpoint, quantization: Mapping[str, Any]) -> dict[str, ScaledWeight]:
    """The FP8 weights of a base, by name. `BadCheckpoint` where parts don't fit each other, `Unsupported` for other
    scales."""
    stated = quantization.get("weight_block_size")
    block = (128, 128)
    if stated is not None:
        if (
            not isinstance(stated, list)
            or len(stated) != 2
            or not all(type(n) is int and 0 < n < 2**20 for n in stated)
        ):
            raise BadCheckpoint(f"{base.folder.label}: weight_block_size {str(stated)[:60]}, expected two sizes")
        block = (stated[0], stated[1])
    found: dict[str, ScaledWeight] = {}
    for name, scale in base.tensors.items():
        ending = next((ending for ending in _SCALES if name.endswith(ending)), None)
        if ending is None:
            continue
        module = name.removesuffix(ending)
        codes = base.tensors.get(f"{module}.weight")
        if codes is None or codes.dtype != "F8_E4M3" or len(codes.shape) != 2 or 0 in codes.shape:
            said = "missing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
            raise BadCheckpoint(f"{module}.weight: {said}, expected a matrix of F8_E4M3, for {name} has its scales")
        _refuse_exponents(scale)
        extent = shares_of(codes.shape, scale, [codes.shape, block])
        beside = [base.tensors[module + part] for part in _BESIDE if module + part in base.tensors]
        found[codes.name] = ScaledWeight(codes.name, codes.shape, (codes, scale, *beside), "fp8", "F8_E4M3", extent)
    return found


def _refuse_exponents(scale: TensorHeader) -> None:
    if scale.dtype in ("F8_E8M0", "U8"):
        raise Unsupported(
            f"{scale.name}: scales in {scale.dtype} (MXFP8) are not read; load the base with transformers and "
            "`dequantize=True`, save it, and give that"
        )

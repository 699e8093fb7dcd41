"""Weights as AutoAWQ saves them (quant_method awq, version gemm). https://arxiv.org/abs/2306.00978"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.read.stored.gptq import check_parts
from converter.read.stored.stored import part_of
from converter.read.stored.turned import WORD, TurnedWeight

if TYPE_CHECKING:
    from converter.read.checkpoint import Checkpoint

_CODES, _SCALES, _ZEROS = ".qweight", ".scales", ".qzeros"
_BITS = 4
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each code lies: `compressed_tensors.entrypoints.convert.AutoAWQConverter.AWQ_REVERSE_ORDER`."""
_INSTEAD = "dequantize the base with AutoAWQ, or give the 16-bit model that it was made from"


def awq_weights(base: Checkpoint, quantization: Mapping[str, Any]) -> dict[str, TurnedWeight]:
    """The AWQ weights of a base, by name. `BadCheckpoint` where parts don't fit each other, `Unsupported`, naming it,
    for what is not read."""
    version, bits = str(quantization.get("version", "gemm")).lower(), quantization.get("bits", _BITS)
    if version != "gemm" or bits != _BITS:
        raise Unsupported(
            f"{base.folder.label}: AWQ's version {version[:60]} in {str(bits)[:20]} bits is not read; {_INSTEAD}"
        )
    found: dict[str, TurnedWeight] = {}
    for name in base.tensors:
        if name.endswith(_CODES):
            weight = _weight(base, name.removesuffix(_CODES))
            found[weight.name] = weight
    return found


def _weight(base: Checkpoint, module: str) -> TurnedWeight:
    codes, scales, zeros = (part_of(base, module + part) for part in (_CODES, _SCALES, _ZEROS))
    inputs, words = codes.shape if len(codes.shape) == 2 else (0, 0)
    outputs = words * WORD // _BITS
    groups = scales.shape[0] if scales.shape else 0
    if scales.shape != (groups, outputs) or not inputs or not groups or inputs % groups:
        raise BadCheckpoint(
            f"{codes.name}: {list(codes.shape)}, and {scales.name} {list(scales.shape)}, expected eight codes a word "
            "and a scale for each output of each group of inputs"
        )
    check_parts(codes, scales, zeros, outputs * _BITS)
    return TurnedWeight(
        f"{module}.weight",
        (outputs, inputs),
        (codes, scales, zeros),
        scheme="awq 4-bit",
        bits=_BITS,
        group=inputs // groups,
        along_inputs=False,
        order=_ORDER,
    )

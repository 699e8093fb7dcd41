"""Weights as GPTQModel and AutoGPTQ save them (quant_method gptq). https://arxiv.org/abs/2210.17323"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.read.stored.stored import part_of
from converter.read.stored.turned import WORD, TurnedWeight

if TYPE_CHECKING:
    from converter.read.checkpoint import Checkpoint
    from converter.read.header import TensorHeader

_CODES, _SCALES, _ZEROS, _GROUPS = ".qweight", ".scales", ".qzeros", ".g_idx"
_BITS = (2, 4, 8)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""By checkpoint_format: the first version saved zero points less one."""
_INSTEAD = "dequantize the base with GPTQModel, or give the 16-bit model that it was made from"


def gptq_weights(base: Checkpoint, quantization: Mapping[str, Any]) -> dict[str, TurnedWeight]:
    """The GPTQ weights of a base, by name. `BadCheckpoint` where parts don't fit each other, `Unsupported`, naming it,
    for what is not read."""
    label, layout = base.folder.label, quantization.get("checkpoint_format") or "gptq"
    if layout not in _ZERO_OFFSETS:
        raise Unsupported(f"{label}: GPTQ's checkpoint_format {str(layout)[:60]} is not read; {_INSTEAD}")
    stated = quantization.get("bits")
    found: dict[str, TurnedWeight] = {}
    for name in base.tensors:
        if name.endswith(_CODES):
            weight = _weight(base, name.removesuffix(_CODES), stated, _ZERO_OFFSETS[layout])
            found[weight.name] = weight
    return found


def _weight(base: Checkpoint, module: str, stated: object, zero_offset: int) -> TurnedWeight:
    codes, scales, zeros, groups = (part_of(base, module + part) for part in (_CODES, _SCALES, _ZEROS, _GROUPS))
    if len(codes.shape) != 2 or len(groups.shape) != 1 or 0 in codes.shape or 0 in groups.shape:
        raise BadCheckpoint(f"{codes.name}: {list(codes.shape)}, expected a matrix, and an input's group for each")
    inputs, outputs = groups.shape[0], codes.shape[1]
    # A config may state other bits for some modules, so the shapes say them.
    bits = next((bits for bits in _BITS if -(inputs * bits // -WORD) == codes.shape[0]), None)
    if bits is None:
        raise Unsupported(
            f"{codes.name}: {list(codes.shape)} for {inputs} inputs, bits {str(stated)[:20]}: GPTQ in other than 2, 4 "
            f"and 8 bits is not read; {_INSTEAD}"
        )
    check_parts(codes, scales, zeros, outputs * bits)
    if groups.dtype not in ("I32", "I64"):
        raise BadCheckpoint(f"{groups.name}: {groups.dtype}, expected whole numbers")
    return TurnedWeight(
        f"{module}.weight",
        (outputs, inputs),
        (codes, scales, zeros, groups),
        scheme=f"gptq {bits}-bit",
        bits=bits,
        group=inputs,
        along_inputs=True,
        order=tuple(range(WORD // bits)),
        zero_offset=zero_offset,
    )


def check_parts(codes: TensorHeader, scales: TensorHeader, zeros: TensorHeader, bits: int) -> None:
    """Raise `BadCheckpoint` unless scales and zero points fit; `bits`: those of a row of zero points."""
    if codes.dtype != "I32" or scales.dtype not in ("F16", "BF16", "F32") or len(scales.shape) != 2:
        raise BadCheckpoint(
            f"{codes.name}: {codes.dtype}, and {scales.name} {scales.dtype} {list(scales.shape)}, expected I32 and a "
            "matrix of floats"
        )
    expected = (scales.shape[0], -(bits // -WORD))
    if zeros.dtype != "I32" or zeros.shape != expected:
        raise BadCheckpoint(f"{zeros.name}: {zeros.dtype} {list(zeros.shape)}, expected I32 {list(expected)}")

"""The weights in the schemes of compressed-tensors that a checkpoint holds, whoever wrote it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint
from converter.quantize.format import Found, Shape
from converter.quantize.schemes import GROUP_SIZES, SCHEMES, Scheme

if TYPE_CHECKING:
    from converter.read.checkpoint import Checkpoint

_PARTS = (".weight", ".weight_packed", ".weight_scale", ".weight_shape", ".weight_global_scale")
_SHAPE = ".weight_shape"


def find_weights(written: Checkpoint) -> Found:
    """The weights of a checkpoint whose config names compressed-tensors, and what is wrong with them."""
    found = Found()
    stated = written.config.get("quantization_config")
    if not isinstance(stated, Mapping) or stated.get("quant_method") != "compressed-tensors":
        return found
    named = scheme_of(stated)
    if named is None:
        found.problems.append("config.json: its scheme of compressed-tensors is none that is known here")
        return found
    name, scheme = named
    found.settings = {"quant_type": name} | ({"group_size": scheme.group} if scheme.kind == "int" else {})
    for module in sorted({tensor.rpartition(".")[0] for tensor in written.tensors if tensor.endswith(".weight_scale")}):
        found.parts |= {module + part for part in _PARTS} & written.tensors.keys()
        weight = f"{module}.weight"
        try:
            shape = found.weights[weight] = _shape_of(written, module)
            found.problems += [f"{weight}: {problem}" for problem in _problems(written, module, scheme, shape)]
        except BadCheckpoint as exc:
            found.weights[weight] = ()
            found.problems.append(f"{weight}: {exc}")
    return found


def scheme_of(stated: Mapping[str, Any]) -> tuple[str, Scheme] | None:
    """The scheme that a `quantization_config` states, by our name; None: none of ours, or several."""
    for name, preset in SCHEMES.items():
        sizes = GROUP_SIZES if preset.kind == "int" else (preset.group,)
        for scheme in (replace(preset, group=size) for size in sizes):
            ours = scheme.config([])
            if ours["config_groups"] == stated.get("config_groups"):
                return name, scheme
    return None


def _shape_of(written: Checkpoint, module: str) -> Shape:
    """(out_features, in_features), as the checkpoint states it, or as the codes imply it."""
    if (stated := written.tensors.get(module + _SHAPE)) is not None:
        if (stated.dtype, stated.shape) != ("I64", (2,)):
            raise BadCheckpoint(f"{stated.name} is {stated.dtype} {list(stated.shape)}, expected I64 [2]")
        raw = bytearray(stated.nbytes)
        written.folder.read_into(stated.file, stated.offset, memoryview(raw))
        rows, columns = struct.unpack("<2q", raw)
        if rows < 1 or columns < 1:
            raise BadCheckpoint(f"{stated.name} is [{rows}, {columns}]")
        return rows, columns
    for part, values in ((".weight", 1), (".weight_packed", 2)):
        if (codes := written.tensors.get(module + part)) is not None and len(codes.shape) == 2:
            return codes.shape[0], codes.shape[1] * values
    raise BadCheckpoint("its codes are missing")


def _problems(written: Checkpoint, module: str, scheme: Scheme, shape: Shape) -> Iterator[str]:
    if not scheme.fits(shape):
        yield f"{shape[1]:,} inputs are not divided by groups of {scheme.group}"
        return
    scale = written.tensors[f"{module}.weight_scale"]
    # Scales without a dtype of their own are floating-point numbers of the model's.
    own = scale.dtype if scale.dtype in ("BF16", "F16", "F32") else "BF16"
    for part, (dtype, expected) in scheme.tensors(module, shape, own).items():
        tensor = written.tensors.get(part)
        if tensor is None:
            yield f"{part} is missing"
        elif (tensor.dtype, tensor.shape) != (dtype, expected):
            yield f"{part} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(expected)}"

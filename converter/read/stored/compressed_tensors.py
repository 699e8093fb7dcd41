"""Weights as compressed-tensors saves them: FP8 and INT8 as they are, FP4 and whole numbers of 4 and 8 bits packed.

`compressed_tensors.compressors`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.read.stored.scaled import Codes, ScaledWeight, shares_of
from converter.read.stored.stored import part_of, read_whole

if TYPE_CHECKING:
    from converter.read.checkpoint import Checkpoint
    from converter.read.header import TensorHeader

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_ZERO, _ORDER, _GLOBAL = ".weight_zero_point", ".weight_g_idx", ".weight_global_scale"
_BESIDE = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point")
_INSTEAD = "decompress the base with compressed-tensors, or give the 16-bit model that it was made from"
_FP4 = {"nvfp4-pack-quantized": ("nvfp4", "F8_E4M3", 16), "mxfp4-pack-quantized": ("mxfp4", "U8", 32)}
"""What it is called, the dtype of its scales, weights that share one."""
_READ = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", *_FP4)


def compressed_weights(base: Checkpoint, quantization: Mapping[str, Any]) -> dict[str, ScaledWeight]:
    """The quantized weights of a base, by name. `BadCheckpoint` where parts don't fit each other, `Unsupported`, naming
    it, for what is not read."""
    groups = _weights_of_groups(base, quantization)
    found: dict[str, ScaledWeight] = {}
    for name in base.tensors:
        if name.endswith(_PACKED) and base.tensors[name].dtype == "U8":
            weight = _fp4(base, name.removesuffix(_PACKED))
        elif name.endswith(_PACKED):
            weight = _packed(base, name.removesuffix(_PACKED), groups)
        elif name.endswith(_SCALE) and name.removesuffix(_SCALE) + _PACKED not in base.tensors:
            weight = _as_they_are(base, name.removesuffix(_SCALE), groups)
        else:
            continue
        found[weight.name] = weight
    return found


def _weights_of_groups(base: Checkpoint, quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the config says of the weights of each of its groups."""
    label, groups = base.folder.label, quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise BadCheckpoint(f"{label}: its compressed-tensors config has no config_groups")
    for key in ("transform_config", "sparsity_config"):
        stated = quantization.get(key)
        if stated and not (isinstance(stated, dict) and stated.get("format") == "dense"):
            raise Unsupported(f"{label}: compressed-tensors with a {key} is not read; {_INSTEAD}")
    said = [quantization.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, dict))]
    for layout in said:
        if layout not in (*_READ, "mixed-precision", "dense", None):
            raise Unsupported(f"{label}: compressed-tensors' {str(layout)[:60]} is not read; {_INSTEAD}")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [one for one in weights if isinstance(one, dict)]


def _packed(base: Checkpoint, module: str, groups: Sequence[Mapping[str, Any]]) -> ScaledWeight:
    packed = base.tensors[module + _PACKED]
    if module + _ORDER in base.tensors:
        raise Unsupported(f"{module}{_ORDER}: columns in another order than their groups are not read; {_INSTEAD}")
    scale, said = part_of(base, module + _SCALE), part_of(base, module + _SHAPE)
    if said.dtype not in ("I64", "I32") or said.shape != (2,) or packed.dtype != "I32" or len(packed.shape) != 2:
        raise BadCheckpoint(
            f"{packed.name}: {packed.dtype} {list(packed.shape)}, and {said.name} {said.dtype} {list(said.shape)}, "
            "expected a matrix of I32 and two sizes"
        )
    rows, columns = (int(size) for size in read_whole(said, base.folder)[0])
    bits = [n for n in (4, 8) if any(group.get("num_bits") == n for group in groups)]
    fits = [n for n in bits if packed.shape == (rows, -(columns * n // -32)) and rows > 0 and columns > 0]
    if not bits:
        raise Unsupported(f"{packed.name}: whole numbers of other than 4 and 8 bits are not read; {_INSTEAD}")
    if not fits:
        raise BadCheckpoint(
            f"{packed.name}: {list(packed.shape)}, expected {rows} × {columns} weights of "
            f"{' or '.join(map(str, bits))} bits, as its shape and its config say"
        )
    own = [group for group in groups if group.get("num_bits") == fits[0]]
    extent = shares_of((rows, columns), scale, list(_extents(own, (rows, columns))))
    zero = base.tensors.get(module + _ZERO)
    if zero is not None:
        expected = (-(rows * fits[0] // -32), -(columns // -extent[1]))
        if zero.dtype != "I32" or zero.shape != expected or extent[0] != 1:
            raise BadCheckpoint(f"{zero.name}: {zero.dtype} {list(zero.shape)}, expected I32 {list(expected)}")
    elif any(group.get("symmetric") is False for group in own) and not any(group.get("symmetric") for group in own):
        raise BadCheckpoint(f"{module}{_ZERO}: missing, but the config says that weights are not symmetric")
    parts = [packed, scale, *([zero] if zero is not None else []), said, *_beside(base, module)]
    codes: Codes = "packed 4" if fits[0] == 4 else "packed 8"
    named = f"compressed-tensors {fits[0]}-bit"
    return ScaledWeight(f"{module}.weight", (rows, columns), tuple(parts), named, codes, extent, zero is not None)


def _fp4(base: Checkpoint, module: str) -> ScaledWeight:
    packed, scale = base.tensors[module + _PACKED], part_of(base, module + _SCALE)
    if module + _ZERO in base.tensors:
        raise Unsupported(f"{module}{_ZERO}: zero points of floats are not read; {_INSTEAD}")
    found = next(((called, size) for called, dtype, size in _FP4.values() if dtype == scale.dtype), None)
    if found is None:
        raise Unsupported(f"{scale.name}: scales of FP4 in {scale.dtype} are not read; {_INSTEAD}")
    called, size = found
    groups = (*packed.shape[:1], *(columns * 2 / size for columns in packed.shape[1:]))
    if len(packed.shape) != 2 or 0 in packed.shape or scale.shape != groups:
        raise BadCheckpoint(
            f"{packed.name}: {packed.dtype} {list(packed.shape)}, and {scale.name} {list(scale.shape)}, expected a "
            f"matrix of two codes a byte and a scale for {size} of them"
        )
    whole = [part_of(base, module + _GLOBAL)] if called == "nvfp4" else []
    if any(part.dtype != "F32" or part.shape not in ((), (1,)) for part in whole):
        raise BadCheckpoint(f"{whole[0].name}: {whole[0].dtype} {list(whole[0].shape)}, expected F32 [1]")
    shape = (packed.shape[0], packed.shape[1] * 2)
    parts = (packed, scale, *whole, *_beside(base, module))
    named = f"compressed-tensors {called}"
    return ScaledWeight(f"{module}.weight", shape, parts, named, "E2M1", (1, size), has_global=bool(whole))


def _as_they_are(base: Checkpoint, module: str, groups: Sequence[Mapping[str, Any]]) -> ScaledWeight:
    codes, scale = part_of(base, f"{module}.weight"), base.tensors[module + _SCALE]
    if codes.dtype not in ("F8_E4M3", "I8") or len(codes.shape) != 2 or 0 in codes.shape:
        raise Unsupported(f"{codes.name}: {codes.dtype} {list(codes.shape)} with a scale is not read; {_INSTEAD}")
    zero = base.tensors.get(module + _ZERO)
    if zero is not None and any(any(piece) for piece in zero.pieces(base.folder)):
        raise Unsupported(f"{zero.name}: zero points of weights that are not packed are not read; {_INSTEAD}")
    extent = shares_of((codes.shape[0], codes.shape[1]), scale, list(_extents(groups, codes.shape)))
    parts = (codes, scale, *([zero] if zero is not None else []), *_beside(base, module))
    kind: Codes = "F8_E4M3" if codes.dtype == "F8_E4M3" else "I8"
    named = f"compressed-tensors {'fp8' if kind == 'F8_E4M3' else 'int8'}"
    return ScaledWeight(codes.name, codes.shape, parts, named, kind, extent)


def _extents(groups: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows and columns that share a scale, by each group that a config has."""
    rows, columns = shape
    for group in groups:
        size, block = group.get("group_size"), group.get("block_structure")
        match group.get("strategy"):
            case "tensor":
                yield rows, columns
            case "channel":
                yield 1, columns
            case "group" if type(size) is int and 0 < size < 2**20:
                yield 1, size
            case "block" if isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) > 0:
                yield block[0], block[1]
            case other:
                raise Unsupported(f"compressed-tensors' scales by {str(other)[:60]} are not read; {_INSTEAD}")


def _beside(base: Checkpoint, module: str) -> list[TensorHeader]:
    """What belongs to a module's inputs and outputs, and has no part in its weight."""
    return [base.tensors[module + part] for part in _BESIDE if module + part in base.tensors]

"""NF4 and FP4 weights as bitsandbytes saves them. `bitsandbytes.functional.QuantState.as_dict`"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.read.stored.codes import four_bit_map
from converter.read.stored.stored import LUT_BYTES, Parts, as_uint8, read_codes, read_whole
from converter.read.strict_json import parse_json_object
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader
    from converter.threads import Buffers

STATE = ".quant_state.bitsandbytes__"
ABSMAX, QUANT_MAP = ".absmax", ".quant_map"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
MAX_STATE_BYTES = 10_000
"""Of a quant state; bitsandbytes' have about 400."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_STORAGE = ("U8", "BF16", "F16", "F32")


@dataclass(frozen=True)
class FourBitState:
    """The part of a quant state that isn't tensors."""

    quant_type: str
    block: int
    dtype: str
    """What dequantizing gives: bfloat16, float16 or float32."""
    shape: tuple[int, ...]
    offset: float | None
    """The mean that double quant subtracted from absmax; None: single quant."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(self.count // -self.block)


@dataclass(frozen=True)
class FourBitWeight(Parts):
    """A weight of 4-bit codes. Its parts: codes, absmax, quant map, quant state; of double quant, nested absmax and
    nested map, too."""

    state: FourBitState

    @property
    def scheme(self) -> str:
        return f"bitsandbytes {self.state.quant_type}"

    @property
    def dtype(self) -> str:
        return _DTYPES[self.state.dtype]

    @property
    def block(self) -> int:
        return self.state.block

    @property
    def opened_bytes(self) -> int:
        # absmax in float32, and what it is made of.
        return 6 * self.state.blocks + 4096

    @property
    def tile_bytes(self) -> float:
        return 0.5

    def open(self, folder: Folder) -> OpenedFourBit:
        tensors = [read_whole(part, folder) for part in self.parts[1:]]
        by_name = {
            part.name[len(self.parts[0].name) :]: tensor
            for part, (tensor, _) in zip(self.parts[1:], tensors, strict=True)
        }
        code = four_bit_map(self.state.quant_type)
        if not _same_bits(by_name[QUANT_MAP], code):
            raise BadCheckpoint(f"{self.name}{QUANT_MAP}: not the values of {self.state.quant_type}")
        absmax = by_name[ABSMAX]
        if self.state.offset is not None:
            absmax = restored_absmax(absmax, by_name[NESTED_ABSMAX], by_name[NESTED_MAP], self.state.offset)
        if not bool(absmax.isfinite().all()):
            raise BadCheckpoint(f"{self.name}{ABSMAX}: holds a NaN or an infinity")
        return OpenedFourBit(self, folder, absmax, tuple(raw for _, raw in tensors))


@dataclass(frozen=True)
class OpenedFourBit:
    """`absmax` is that of every block, in float32, as a loader restores it."""

    weight: FourBitWeight
    folder: Folder
    absmax: Tensor
    raw: tuple[memoryview, ...]

    def read(self, start: int, end: int, buffers: Buffers) -> memoryview:
        columns = self.weight.columns
        return read_codes(self.weight.parts[0], self.folder, (start * columns // 2, -(end * columns // -2)), buffers)

    def decode(self, start: int, end: int, raw: memoryview, buffers: Buffers) -> Tensor:
        """What a code stands for, times absmax, in float32, rounded once: `bitsandbytes.functional.dequantize_4bit`."""
        state, columns = self.weight.state, self.weight.columns
        first, count = start * columns, (end - start) * columns
        assert first % state.block == 0  # noqa: S101  (tiles hold whole blocks)
        packed, pairs = as_uint8(raw), _pairs(state.quant_type)
        decoded = buffers.take("decoded", torch_dtype(state.dtype), count)
        step = max(state.block, LUT_BYTES)
        for begin in range(0, count, step):
            size = min(step, count - begin)
            values = pairs.index_select(0, packed[begin // 2 : -((begin + size) // -2)].int()).flatten()[:size]
            scales = self.absmax[(first + begin) // state.block : -((first + begin + size) // -state.block)]
            whole = size // state.block
            values[: whole * state.block].view(-1, state.block).mul_(scales[:whole, None])
            if whole < len(scales):
                values[whole * state.block :].mul_(scales[whole])
            decoded[begin : begin + size].copy_(values)
        return decoded.view(end - start, columns)


def restored_absmax(codes: Tensor, nested: Tensor, nested_map: Tensor, offset: float) -> Tensor:
    """Absmax of double quant, (blocks,) in float32: `bitsandbytes.functional.dequantize_blockwise`, plus the mean."""
    import torch

    restored = nested_map.index_select(0, codes.int())
    whole = codes.numel() // NESTED_BLOCK
    restored[: whole * NESTED_BLOCK].view(-1, NESTED_BLOCK).mul_(nested[:whole, None])
    if whole < nested.numel():
        restored[whole * NESTED_BLOCK :].mul_(nested[whole])
    return restored.add_(torch.tensor(offset, dtype=torch.float32))


@cache
def _pairs(quant_type: str) -> Tensor:
    """What each byte stands for, its upper half first: float32 [256, 2]."""
    import torch

    code = four_bit_map(quant_type)
    return torch.cartesian_prod(code, code)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    import torch

    return one.shape == other.shape and bool(torch.equal(one.view(torch.int32), other.view(torch.int32)))


def four_bit_weights(tensors: Mapping[str, TensorHeader], folder: Folder) -> dict[str, FourBitWeight]:
    """The 4-bit weights of a checkpoint, by name. `BadCheckpoint` where one lacks a part or has another shape than its
    quant state says; `Unsupported` for what bitsandbytes itself reads wrongly."""
    found: dict[str, FourBitWeight] = {}
    for name, header in tensors.items():
        weight, mark, quant_type = name.partition(STATE)
        if not mark:
            continue
        try:
            state = read_state(header, folder, quant_type)
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise BadCheckpoint(f"{name}: can't be understood: {exc}") from exc
        names = [weight, weight + ABSMAX, weight + QUANT_MAP, name]
        names += [weight + NESTED_ABSMAX, weight + NESTED_MAP] if state.offset is not None else []
        parts = [_part(tensors, part) for part in names]
        _check_parts(weight, state, {part.name[len(weight) :]: part for part in parts})
        if weight in found:
            raise BadCheckpoint(f"{weight}: has two quant states")
        found[weight] = FourBitWeight(weight, state.shape, tuple(parts), state)
    return found


def read_state(header: TensorHeader, folder: Folder, quant_type: str) -> FourBitState:
    """A quant state, checked. Raises `BadCheckpoint`, `Unsupported`, and what converting its values raises."""
    if header.nbytes > MAX_STATE_BYTES or header.dtype != "U8":
        raise BadCheckpoint(
            f"{header.name}: {header.dtype}, {header.nbytes:,} bytes, expected at most {MAX_STATE_BYTES:,}"
        )
    raw = bytearray(header.nbytes)
    folder.read_into(header.file, header.offset, memoryview(raw))
    stated: dict[str, Any] = parse_json_object(bytes(raw), header.name)
    shape, block, dtype = stated["shape"], stated["blocksize"], stated["dtype"]
    if stated["quant_type"] != quant_type or quant_type not in ("nf4", "fp4"):
        raise BadCheckpoint(f"{header.name}: says {stated['quant_type']!r}, its name {quant_type!r}")
    if block not in BLOCK_SIZES or dtype not in _DTYPES:
        raise BadCheckpoint(f"{header.name}: blocks of {block!r} values, dtype {dtype!r}: not of bitsandbytes")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and 0 < size < 2**40 for size in shape):
        raise BadCheckpoint(f"{header.name}: shape {str(shape)[:60]}")
    offset = None
    if "nested_offset" in stated:
        offset = float(stated["nested_offset"])
        if not math.isfinite(offset) or stated["nested_blocksize"] != NESTED_BLOCK:
            raise BadCheckpoint(f"{header.name}: nested offset {offset}, blocks of {stated['nested_blocksize']!r}")
        if stated["nested_dtype"] != "float32":
            raise Unsupported(
                f"{header.name}: absmax in {stated['nested_dtype']}: the model was saved after it had run on a CPU, "
                "which rounds its weights; give a base that was saved before"
            )
    return FourBitState(quant_type, block, dtype, tuple(shape), offset)


def _part(tensors: Mapping[str, TensorHeader], name: str) -> TensorHeader:
    if name not in tensors:
        raise BadCheckpoint(f"{name}: missing, but the weight has a quant state")
    return tensors[name]


def _check_parts(weight: str, state: FourBitState, parts: Mapping[str, TensorHeader]) -> None:
    nested = state.offset is not None
    expected = {ABSMAX: ("U8" if nested else "F32", (state.blocks,)), QUANT_MAP: ("F32", (16,))}
    if nested:
        expected[NESTED_ABSMAX] = ("F32", (-(state.blocks // -NESTED_BLOCK),))
        expected[NESTED_MAP] = ("F32", (256,))
    for part, (dtype, shape) in expected.items():
        there = parts[part]
        if (there.dtype, there.shape) != (dtype, shape):
            raise BadCheckpoint(
                f"{weight}{part}: {there.dtype} {list(there.shape)}, expected {dtype} {list(shape)} of "
                f"{state.blocks:,} blocks"
            )
    codes = parts[""]
    if codes.dtype not in _STORAGE or codes.nbytes != -(state.count // -2):
        raise BadCheckpoint(
            f"{weight}: {codes.dtype} {list(codes.shape)}, expected codes of {list(state.shape)} weights, two a byte"
        )

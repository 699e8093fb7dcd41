"""NF4 and FP4 of bitsandbytes: codes of four bits, an absmax a block, a quant state a weight.

On a CPU the kernels of `kernels.py` quantize, where numba is installed; on an accelerator, and without numba,
bitsandbytes itself does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, NotFinite
from converter.quantize import bnb
from converter.quantize.format import BY_TORCH, Encoded, Found, Output, Rows, Shape
from converter.quantize.measure import row_sums
from converter.quantize.strips import kernel_dtypes, kernels_take, strips
from converter.read.header import are_sizes
from converter.read.stored.codes import four_bit_map
from converter.read.strict_json import parse_json_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.checkpoint import Checkpoint
    from converter.read.header import TensorHeader
    from converter.recipe import Recipe
    from converter.threads import Buffers

LONGEST_FLOAT = -2.2250738585072014e-308
"""A float with the longest `repr` there is, 24 characters."""
MAX_STATE_BYTES = 10_000
"""Of a quant state; bitsandbytes' have about 400."""
_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_BY_KERNELS = {"BF16": 3.0, "F32": 5.0, "F16": 7.0}
"""Bytes that a weight takes in a tile of the CPU kernels: as stored, as float32 if it was float16, packed."""


@dataclass(frozen=True)
class FourBit:
    """NF4 or FP4, with or without double quant."""

    recipe: Recipe
    dtype: str = ""
    """That which quant states name, bfloat16, float16 or float32; empty: the recipe's."""

    @property
    def description(self) -> str:
        return f"4-bit {self.recipe.quant_type.upper()} weights of bitsandbytes"

    @property
    def tags(self) -> tuple[str, ...]:
        return "bitsandbytes", "4-bit"

    @property
    def settings(self) -> Mapping[str, str]:
        return {"double quant": str(self.recipe.double_quant).lower(), "block size": str(self.recipe.block_size)}

    @property
    def library(self) -> str:
        return "bitsandbytes"

    def block(self, columns: int) -> int:
        return self.recipe.block_size

    def outputs(self, name: str, shape: Shape) -> tuple[Output, ...]:
        """Names and shapes are those of `bitsandbytes.nn.Params4bit` in a state dict."""
        recipe, count = self.recipe, math.prod(shape)
        blocks = -(count // -recipe.block_size)
        state = quant_state_json(recipe, shape, LONGEST_FLOAT if recipe.double_quant else None, self.dtype)
        outputs = [
            Output(name, "U8", (-(count // -2), 1)),
            Output(f"{name}.absmax", "U8" if recipe.double_quant else "F32", (blocks,)),
            Output(f"{name}.quant_map", "F32", (16,)),
        ]
        if recipe.double_quant:
            outputs += [
                Output(f"{name}.nested_absmax", "F32", (-(blocks // -bnb.NESTED_BLOCK),)),
                Output(f"{name}.nested_quant_map", "F32", (256,)),
            ]
        return (*outputs, Output(f"{name}{_STATE}{recipe.quant_type}", "U8", (len(state),), is_state=True))

    def config(self, skip_modules: Sequence[str] | None) -> dict[str, Any]:
        return bnb.quantization_config(self.recipe, skip_modules)

    def state_bytes(self, rows: int, columns: int) -> int:
        return 8 * (rows * columns // self.recipe.block_size)

    def tile_bytes(self, dtype: str, *, kernels: bool) -> float:
        return _BY_KERNELS[dtype] if kernels else BY_TORCH

    def encoder(self, device: torch.device, *, kernels: bool = False) -> FourBitEncoder:
        by_kernels = kernels and device.type == "cpu"
        kind = KernelEncoder if by_kernels else FourBitEncoder
        return kind(self.recipe, device, self.dtype)

    def find(self, written: Checkpoint) -> Found:
        found = Found()
        for name, tensor in written.tensors.items():
            weight, mark, quant_type = name.partition(_STATE)
            if not mark:
                continue
            found.parts |= {weight + part for part in ("", *_PARTS, mark + quant_type)} & written.tensors.keys()
            try:
                state = _read_state(written, tensor)
                problem = _problem_of(written, weight, quant_type, state)
            except (BadCheckpoint, KeyError, TypeError, ValueError, OverflowError) as exc:
                problem, state = f"its quant state can't be read: {exc}", {}
            if problem:
                found.problems.append(f"{weight}: {problem}")
            there = written.tensors.get(weight)
            found.weights[weight] = tuple(state.get("shape", there.shape if there is not None else ()))
            if state and math.prod(state["shape"]) % state["blocksize"]:
                found.uneven.add(weight)
            if state and found.settings is None:
                found.settings = {
                    "quant_type": state["quant_type"],
                    "double_quant": "nested_offset" in state,
                    "block_size": state["blocksize"],
                    "dtype": state.get("dtype"),
                }
        return found


class FourBitEncoder:
    """Quantizes as `bitsandbytes.functional` does on its device."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: str = "") -> None:
        self._recipe = recipe
        self._dtype = dtype
        self._device = device
        self._pairs: dict[Any, Tensor] = {}

    def load(self, dtypes: Collection[str]) -> None:
        """Nothing is compiled."""

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        merged, recipe = rows.merged(), self._recipe
        values = merged.values.contiguous()
        packed, state = bnb.functional().quantize_4bit(
            values, blocksize=recipe.block_size, compress_statistics=False, quant_type=recipe.quant_type
        )
        # A NaN or an infinity shows in the largest absolute value of its block.
        if not bool(state.absmax.isfinite().all()):
            raise NotFinite(f"{rows.name}: holds a NaN or an infinity")
        sums = row_sums(merged, self.restore(packed, state.absmax, values.shape))
        return Encoded(((rows.name, rows.first // 2, packed),), state.absmax, sums)

    def finish(self, name: str, shape: Shape, scales: Sequence[Tensor]) -> dict[str, Tensor]:
        import torch

        recipe, absmax = self._recipe, torch.cat(list(scales))
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
            state["absmax"], state["nested_absmax"] = bnb.quantize_absmax(absmax.sub_(mean))
            state["nested_quant_map"] = bnb.dynamic_map()
        raw = bytearray(quant_state_json(recipe, shape, offset, self._dtype))
        state[f"{_STATE[1:]}{recipe.quant_type}"] = torch.frombuffer(raw, dtype=torch.uint8)
        return {f"{name}.{key}": value.cpu() for key, value in state.items()}

    def restore(self, packed: Tensor, absmax: Tensor, shape: Shape) -> Tensor:
        """What codes stand for, before double quantization: float32 of a tile's shape."""
        import torch

        if packed.device not in self._pairs:
            code = four_bit_map(self._recipe.quant_type).to(packed.device)
            self._pairs[packed.device] = torch.cartesian_prod(code, code)
        block, count = self._recipe.block_size, math.prod(shape)
        restored = self._pairs[packed.device].index_select(0, packed.flatten().int()).flatten()[:count]
        whole = count // block
        restored[: whole * block].view(-1, block).mul_(absmax[:whole, None])
        if whole * block < count:
            restored[whole * block :].mul_(absmax[whole])
        return restored.view(shape)


class KernelEncoder(FourBitEncoder):
    """The same bits by the CPU kernels, which add what an additive change adds while they quantize."""

    def load(self, dtypes: Collection[str]) -> None:
        from converter.quantize import kernels

        kernels.load(kernel_dtypes(dtypes))

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        from converter.quantize import kernels

        if kernels_take(rows):
            return self._fused(rows, buffers)
        merged = rows.merged()
        encoded = self._fused(replace(rows, stored=merged.values, merge=None), buffers)
        assert encoded.scales is not None  # noqa: S101  (`_fused` gives them)
        restored = self.restore(encoded.pieces[0][2], encoded.scales, tuple(merged.values.shape))
        assert merged.delta is not None  # noqa: S101  (a merge changes something)
        four = (merged.exact, restored, merged.base, merged.delta)
        sums = kernels.sums_of(*(part.contiguous().numpy() for part in four))
        return Encoded(encoded.pieces, encoded.scales, sums)

    def _fused(self, rows: Rows, buffers: Buffers) -> Encoded:
        import numpy
        import torch

        from converter.quantize import jit, kernels

        recipe, (count, columns), block = self._recipe, rows.stored.shape, self._recipe.block_size
        packed = buffers.take("packed", torch.uint8, -(count * columns // -2))
        absmax = torch.empty(-(count * columns // -block), dtype=torch.float32)
        sums = numpy.empty((count, jit.SUMS))
        for strip in strips(rows, buffers, block=block):
            start, stop = strip.first * columns, strip.last * columns
            finite = kernels.quantize_rows(
                strip.source,
                quant_type=recipe.quant_type,
                block=block,
                packed=packed[start // 2 : -(stop // -2)].numpy(),
                absmax=absmax[start // block : -(stop // -block)].numpy(),
                sums=sums[strip.first : strip.last],
            )
            if not finite:
                raise NotFinite(f"{rows.name}: holds a NaN or an infinity")
        pieces = ((rows.name, rows.first // 2, packed),)
        return Encoded(pieces, absmax, sums if rows.merge is not None else sums[:, :2])


def quant_state_json(recipe: Recipe, shape: Shape, offset: float | None, dtype: str = "") -> bytes:
    """The part of a quant state that isn't tensors, as `bitsandbytes.utils.pack_dict_to_tensor` spells it.

    `offset` is the mean that double quant subtracts from absmax; None: single quant.
    """
    state: dict[str, Any] = {
        "quant_type": recipe.quant_type,
        "blocksize": recipe.block_size,
        "dtype": dtype or recipe.dtype,
        "shape": list(shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": bnb.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def _read_state(written: Checkpoint, tensor: TensorHeader) -> dict[str, Any]:
    """`BadCheckpoint` unless its sizes are some: what is computed with them would take what it likes."""
    if tensor.nbytes > MAX_STATE_BYTES:
        raise BadCheckpoint(f"{tensor.nbytes:,} bytes, expected at most {MAX_STATE_BYTES:,}")
    raw = bytearray(tensor.nbytes)
    written.folder.read_into(tensor.file, tensor.offset, memoryview(raw))
    state = parse_json_object(bytes(raw), tensor.name)
    blocks = [state.get("blocksize"), state.get("nested_blocksize", 1)]
    if not are_sizes(state.get("shape")) or not are_sizes(blocks) or 0 in blocks:
        raise BadCheckpoint("its shape or its block sizes are none")
    return state


def _problem_of(written: Checkpoint, weight: str, quant_type: str, state: dict[str, Any]) -> str | None:
    count, block = math.prod(state["shape"]), state["blocksize"]
    blocks = -(count // -block)
    nested = "nested_offset" in state
    expected = {"": ("U8", (-(count // -2), 1)), ".absmax": ("U8" if nested else "F32", (blocks,))}
    expected[".quant_map"] = ("F32", (16,))
    if nested:
        expected[".nested_absmax"] = ("F32", (-(blocks // -state["nested_blocksize"]),))
        expected[".nested_quant_map"] = ("F32", (256,))
    if nested and not math.isfinite(offset := float(state["nested_offset"])):
        return f"its quant state's offset is {offset}"
    if state["quant_type"] != quant_type:
        return f"its quant state says {state['quant_type']!r}, its name {quant_type!r}"
    for part, (dtype, shape) in expected.items():
        tensor = written.tensors.get(weight + part)
        if tensor is None:
            return f"{weight + part} is missing"
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            return f"{weight + part} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
    files = {written.tensors[weight + part].file for part in expected}
    return f"its tensors lie in {len(files)} shards, which transformers 4.46 can't load" if len(files) > 1 else None

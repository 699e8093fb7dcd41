"""The plan: everything that is decided from headers, as frozen values. Nothing has been written by then.

What happens to each tensor, every output name, dtype, shape and offset, the output's config, the predicted memory and
disk. It can be printed, compared and hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from converter.merge.change import Change, Rounding
from converter.merge.lora import Lora
from converter.plan.layout import LIMITS, ShardLayout, lay_out, pack_shards, shard_names
from converter.quantize.format import Output
from converter.read.side_files import SideFile
from converter.read.stored.stored import Source, is_stored
from converter.recipe import Recipe
from converter.resources import Resources

LAYOUT_VERSION = 1
"""Part of the fingerprint: raise it when equal plans would give other bytes."""


CutAs = tuple[str, int, bool]
"""Name, rows, and whether the rows are bytes: where these are the same, the tiles of one tensor fit the other."""


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor."""

    name: str
    """Its name in the output, which is the base's."""
    source: Source
    """Where its values come from."""
    action: Literal["quantize", "keep", "copy"]
    """copy: the bytes of a quantized base's weight go into the output as they are."""
    change: Change | None
    """What the adapter does to it."""
    transpose: bool
    """Stored as (in_features, out_features), quantized the other way round: GPT-2's Conv1D."""
    shape: tuple[int, ...]
    """In the output, before packing."""
    dtype: str
    """safetensors' name. Of a kept tensor: its dtype in the output. Of a quantized one: the dtype of compute."""
    tiles: tuple[int, ...]
    """Row numbers at which it is cut, (0, …, rows), in the orientation of the product B·A."""
    outputs: tuple[Output, ...]
    checked: bool
    """Whether a NaN or an infinity in it is an error. It is none in a tensor that the model doesn't have."""
    fused: tuple[TensorPlan, ...] = ()
    """The tensors that share a scale with it, itself included, without tiles. Their largest value gives the scale."""

    @property
    def rows(self) -> int:
        return self.tiles[-1]

    @property
    def cut_as(self) -> CutAs:
        return self.name, self.rows, self.action == "copy"

    @property
    def columns(self) -> int:
        if self.action == "copy":
            return 1  # a row is a byte
        return math.prod(self.shape) // self.rows if self.rows else 0

    @property
    def is_copy(self) -> bool:
        """Whether its bytes go into the output as they are."""
        as_it_is = not self.is_merged and not self.transpose and self.dtype == self.source.dtype
        return self.action == "copy" or (self.action == "keep" and as_it_is)

    @property
    def is_quantized(self) -> bool:
        """Whether it is quantized in the output."""
        return self.action != "keep"

    @property
    def is_touched(self) -> bool:
        """Whether the adapter has a part in it, or in what shares a scale with it."""
        return self.change is not None or any(part.change is not None for part in self.fused)

    @property
    def is_merged(self) -> bool:
        """Whether something of the adapter is merged into it."""
        return self.change is not None and bool(self.change.parts)

    @property
    def origin(self) -> Literal["base", "adapter"]:
        """Whose values it begins with."""
        return "base" if self.change is None or self.change.source is None else "adapter"

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and the row after the last, of each tile."""
        yield from zip(self.tiles, self.tiles[1:], strict=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its outputs; an upper bound, by a few bytes, for a quant state."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def header_bytes(self) -> int:
        """The most bytes that its outputs take of a shard's header."""
        return sum(output.header_bytes for output in self.outputs)

    @property
    def largest_tile(self) -> int:
        """Weights of its largest tile."""
        return max(end - start for start, end in self.spans()) * self.columns

    @property
    def whole(self) -> str | None:
        """Why it must be in memory as a whole; None: it is cut into tiles."""
        if self.transpose:
            return "its rows are not together on disk"
        return None if self.change is None else self.change.whole

    def rounding(self, recipe: Recipe) -> Rounding:
        """How base and sum are rounded. PEFT adds a delta to what it dequantizes of a base without rounding."""
        of_codes = is_stored(self.source) and recipe.merge_onto == "base" and isinstance(self.change, Lora)
        in_float32 = self.action == "keep" and self.dtype == "F32"  # whatever the model's dtype, so PEFT merges in it
        if of_codes or in_float32:
            return Rounding("float32", recipe.dtype)
        return Rounding.of(recipe)


@dataclass(frozen=True)
class ShardPlan:
    """One output file."""

    file: str
    tensors: tuple[TensorPlan, ...]
    """In the order in which they are made, which is the order of the base's bytes."""
    layout: ShardLayout

    @property
    def is_of_the_base_alone(self) -> bool:
        """Whether the adapter changes no tensor in it. Then other conversions may use the same file."""
        return not any(tensor.is_touched for tensor in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """The shard as JSON values."""
        return {
            "file": self.file,
            "bytes": self.layout.size,
            "tensors": [_tensor_json(tensor, self.layout) for tensor in self.tensors],
        }

    def essence(self) -> dict[str, Any]:
        """`as_json` without the tiles: they change no byte."""
        whole = self.as_json()
        for tensor in whole["tensors"]:
            del tensor["tiles"]
        return whole


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything that will happen."""

    recipe: Recipe
    """With its dtype decided."""
    class_name: str
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]
    """The output's config.json."""
    side_files: tuple[SideFile, ...]
    notes: tuple[str, ...]
    """What the user should know, but what is no reason to refuse."""
    base_bytes: int
    adapter_digest: str | None
    device: str
    """Where it computes: cpu, cuda, cuda:0, …"""
    resources: Resources
    """What it may use; no byte of the output depends on it."""
    memory: int
    """Predicted peak of memory above what Python and its libraries take, in bytes."""
    verifiable: bool = True
    """Whether transformers can build the model. It can't where the base's own code defines it."""
    beforehand: str = ""
    """The note that a user should read before it begins, if there is one."""
    loaders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Loader → what it would find wrong with the output, by its rules; empty: nothing that is known."""

    def tensors(self) -> Iterator[TensorPlan]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def output_bytes(self) -> int:
        """Bytes of the shards; a few bytes too many for each quantized weight."""
        return sum(shard.layout.size for shard in self.shards)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.counts().items()) if count)
        return (
            f"Plan({self.class_name}, {self.recipe.quant_type}: {counts}; {len(self.shards)} shards of at most "
            f"{self.output_bytes:,} bytes)"
        )

    def counts(self) -> dict[str, int]:
        """Tensors by what happens to them: merged, quantized, kept, replaced."""
        counter: Counter[str] = Counter()
        for tensor in self.tensors():
            counter[tensor.action] += 1
            counter["merged"] += tensor.is_merged
            counter["replaced"] += tensor.origin == "adapter"
        return dict(counter)

    @cached_property
    def digest(self) -> str:
        """sha256 of what will happen to each tensor, of the layout and of the recipe."""
        whole = self.as_json()
        for prediction in ("memory_bytes", "notes", "counts"):
            del whole[prediction]
        whole["shards"] = [shard.essence() for shard in self.shards]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    @cached_property
    def content(self) -> str:
        """sha256 of what will happen to each tensor, whatever shard it lies in: of what a loader gets."""
        whole = self.as_json()
        tensors = [tensor for shard in self.shards for tensor in shard.essence()["tensors"]]
        for tensor in tensors:
            for output in tensor["outputs"]:
                del output["offset"]
        del whole["recipe"]["max_shard_size"]
        kept = {key: whole[key] for key in ("layout_version", "architecture", "recipe", "config", "side_files")}
        kept["tensors"] = sorted(tensors, key=lambda tensor: str(tensor["name"]))
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values. Places and times are not part of it."""
        return {
            "layout_version": LAYOUT_VERSION,
            "architecture": self.class_name,
            "recipe": self.recipe.as_json(),
            "base_bytes": self.base_bytes,
            "output_bytes": self.output_bytes,
            "memory_bytes": self.memory,
            "counts": self.counts(),
            "notes": list(self.notes),
            "config": dict(self.config),
            "side_files": {side.name: side.origin for side in self.side_files},
            "shards": [shard.as_json() for shard in self.shards],
        }


def packed(
    tensors: Sequence[TensorPlan], recipe: Recipe, header_bytes: int = LIMITS.header_bytes
) -> list[list[TensorPlan]]:
    """Tensors, in their order, in groups that fit a shard. No tensors: no groups."""
    sizes, headers = [tensor.nbytes for tensor in tensors], [tensor.header_bytes for tensor in tensors]
    groups = pack_shards(sizes, recipe.max_shard_size, headers, header_bytes) if tensors else []
    return [[tensors[index] for index in group] for group in groups]


def in_shards(groups: Sequence[Sequence[TensorPlan]]) -> tuple[ShardPlan, ...]:
    """Shards of groups of tensors, named and laid out."""
    files = shard_names(len(groups))
    return tuple(
        ShardPlan(file, tuple(group), lay_out(output for tensor in group for output in tensor.outputs))
        for file, group in zip(files, groups, strict=True)
    )


def _tensor_json(tensor: TensorPlan, layout: ShardLayout) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": tensor.name,
        "action": tensor.action,
        "origin": tensor.origin,
        "source": {"dtype": tensor.source.dtype, "shape": list(tensor.source.shape), **_scheme(tensor.source)},
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "transpose": tensor.transpose,
        "tiles": len(tensor.tiles) - 1,
        "outputs": [
            {"name": o.name, "dtype": o.dtype, "shape": list(o.shape), "offset": layout.offsets.get(o.name)}
            for o in tensor.outputs
        ],
    }
    fused = {"fused": [part.name for part in tensor.fused]} if tensor.fused else {}
    return entry | fused | ({} if tensor.change is None else tensor.change.as_json())


def _scheme(source: Source) -> dict[str, Any]:
    """The scheme of a quantized base's weight, and all that it is read from."""
    if not is_stored(source):
        return {}
    parts = [{"name": part.name, "dtype": part.dtype, "shape": list(part.shape)} for part in source.parts]
    return {"scheme": source.scheme, "parts": parts}

"""The plan: everything decided from headers, as frozen values. Nothing has been written when it is made.

What happens to each tensor, every output name, dtype, shape and offset, the output's config, the predicted memory and
disk. It can be printed, compared and hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from converter.adapter import Adapter, LoraPair
from converter.architecture import Architecture, Role, check_output, describe
from converter.config import output_config, refuse_unconvertible
from converter.errors import AdapterMismatch, BadCheckpoint, Unsupported
from converter.layout import Output, ShardLayout, lay_out, outputs_of, pack_shards, shard_names, tile_bounds
from converter.match import Match, match
from converter.read import Checkpoint, TensorHeader, read_bytes
from converter.recipe import Recipe
from converter.side_files import MAX_SIDE_FILE_BYTES, SideFile, choose, largest_token

LAYOUT_VERSION = 1
"""Part of the fingerprint: raise it when equal plans would give other bytes."""
TILE_ELEMENTS = 4 << 20
"""Weights in memory at a time, where a tensor can be cut."""
BYTES_PER_ELEMENT = 44
"""Memory that one weight of a tile takes while it is merged, quantized and measured: its stored value, float32 base,
delta and sum, and what bitsandbytes and the error figures make of them. Measured; a test holds it."""

_FLOATING = ("F64", "F32", "F16", "BF16")
_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor."""

    name: str
    """Its name in the output, which is the base's."""
    origin: Literal["base", "adapter"]
    source: TensorHeader
    """Where its values come from."""
    action: Literal["quantize", "keep"]
    pair: LoraPair | None
    """The adapter's factors for it."""
    transpose: bool
    """Stored as (in_features, out_features), quantized the other way round: GPT-2's Conv1D."""
    shape: tuple[int, ...]
    """In the output, before packing."""
    dtype: str
    """In the output, of a tensor that is kept; of its quant state, else."""
    tiles: tuple[int, ...]
    """Row numbers at which it is cut, (0, …, rows), in the orientation of the product B·A."""
    outputs: tuple[Output, ...]
    checked: bool
    """Whether a NaN or an infinity in it is an error; not so in a tensor that the model doesn't have."""

    @property
    def rows(self) -> int:
        return self.tiles[-1]

    @property
    def columns(self) -> int:
        return math.prod(self.shape) // self.rows if self.rows else 0

    @property
    def is_copy(self) -> bool:
        """Whether its bytes go into the output as they are."""
        return self.action == "keep" and self.pair is None and self.dtype == self.source.dtype

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and the row after the last, of each tile."""
        yield from zip(self.tiles, self.tiles[1:], strict=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its outputs; an upper bound, by a few bytes, for a quant state."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def memory(self) -> int:
        """Predicted bytes of memory while it is converted."""
        rows = max(end - start for start, end in self.spans())
        tile = rows * self.columns * (BYTES_PER_ELEMENT if self.action == "quantize" or self.pair else 16)
        statistics = 0
        if self.action == "quantize":
            # absmax, its difference from the mean, and the codes of that.
            statistics = 12 * sum(math.prod(o.shape) for o in self.outputs if o.name.endswith((".absmax", ".SCB")))
        factors = 8 * (self.pair.a.shape[0] * sum(self.pair.shape)) if self.pair else 0
        return tile + statistics + factors + 32 * self.rows


@dataclass(frozen=True)
class ShardPlan:
    """One output file."""

    file: str
    tensors: tuple[TensorPlan, ...]
    """In the order in which they are made, which is the order of the base's bytes."""
    layout: ShardLayout


@dataclass(frozen=True)
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
    """What a user should know and nothing refuses."""
    base_bytes: int
    adapter_digest: str | None
    verifiable: bool = True
    """Whether transformers can be asked what it makes of the output; not so where the base's own code defines it."""

    def tensors(self) -> Iterator[TensorPlan]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def output_bytes(self) -> int:
        """Bytes of the shards; an upper bound by a few bytes a quantized weight."""
        return sum(shard.layout.size for shard in self.shards)

    @property
    def memory(self) -> int:
        """Predicted peak of memory above what Python and its libraries take, in bytes."""
        headers = sum(shard.layout.header_bytes for shard in self.shards)
        return max(tensor.memory for tensor in self.tensors()) + 12 * headers + (32 << 20)

    def counts(self) -> dict[str, int]:
        """Tensors by what happens to them: merged, quantized, kept, replaced."""
        counter: Counter[str] = Counter()
        for tensor in self.tensors():
            counter[tensor.action] += 1
            counter["merged"] += tensor.pair is not None
            counter["replaced"] += tensor.origin == "adapter"
        return dict(counter)

    @cached_property
    def digest(self) -> str:
        """sha256 of what will happen to each tensor, of the layout and of the recipe."""
        whole = self.as_json()
        for prediction in ("memory_bytes", "notes", "counts"):
            del whole[prediction]
        for shard in whole["shards"]:
            for tensor in shard["tensors"]:
                # The same bytes come out however they are cut.
                del tensor["tiles"], tensor["memory_bytes"]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

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
            "shards": [
                {
                    "file": shard.file,
                    "bytes": shard.layout.size,
                    "tensors": [_tensor_json(tensor, shard.layout) for tensor in shard.tensors],
                }
                for shard in self.shards
            ],
        }


def make_plan(
    base: Checkpoint, adapter: Adapter | None = None, recipe: Recipe = Recipe(), *, trust_remote_code: bool = False
) -> Plan:
    """Decide everything that will happen to an opened base and adapter, or refuse.

    Reads the adapter's values once, to check them; of the base, headers only. Raises a `ConversionRefused`.
    """
    refuse_unconvertible(base.config, base.folder.label, trust_remote_code=trust_remote_code)
    recipe = recipe.resolved(_weights_dtype(base))
    shapes = {tensor.name: tensor.shape for tensor in base}
    architecture = describe(
        base.config,
        shapes,
        quantize=recipe.quant_type != "none",
        dtype=recipe.dtype,
        keep=recipe.keep,
        remote_code=trust_remote_code,
    )
    found = match(adapter, architecture, shapes) if adapter is not None else Match()
    tensors = [
        _plan_tensor(header, architecture.roles[header.name], recipe, found)
        for header in sorted(base, key=lambda header: (header.file, header.offset))
    ]
    tensors += [
        _plan_tensor(replace(base.tensors[source], name=name), Role(name, "linear", quantize=False), recipe, found)
        for name, source in found.untied.items()
    ]
    if recipe.quant_type != "none" and not any(tensor.action == "quantize" for tensor in tensors):
        raise Unsupported(
            f"{architecture.class_name}: transformers would quantize none of its layers; use --quant-type none"
        )
    config = output_config(base.config, recipe, architecture, vocabulary=found.vocabulary, untied=bool(found.untied))
    side_files = choose(base.folder, adapter.folder if adapter else None, trust_remote_code=trust_remote_code)
    _check_tokenizer(side_files, adapter, architecture, tensors)
    if architecture.known:
        _check_statically(config, tensors)
    unknown = sum(role.parameter is None for role in architecture.roles.values())
    if unknown:
        found.notes.append(
            f"{unknown} tensors of the base are not part of {architecture.class_name}: copied as they are"
        )
    return Plan(
        recipe=recipe,
        class_name=architecture.class_name,
        shards=_in_shards(tensors, recipe),
        config=config,
        side_files=side_files,
        notes=tuple(found.notes + _notes_for_servers(tensors)),
        base_bytes=base.nbytes,
        adapter_digest=adapter.check_finite() if adapter is not None else None,
        verifiable=architecture.known,
    )


def _plan_tensor(header: TensorHeader, role: Role, recipe: Recipe, found: Match) -> TensorPlan:
    name = header.name
    pair = found.deltas.get(name)
    replacement = found.replacements.get(name)
    source = replacement if replacement is not None else header
    if header.dtype.startswith("F8"):
        raise Unsupported(f"{name}: dtype {header.dtype}; give a base in 16 or 32 bits")
    if (pair or role.quantize) and source.dtype not in ("F32", "F16", "BF16"):
        raise BadCheckpoint(f"{name}: dtype {source.dtype}, expected F32, F16 or BF16")
    transpose = role.kind == "conv1d" and (role.quantize or pair is not None)
    turned_on_disk = role.kind == "conv1d" and role.quantize
    shape = source.shape[::-1] if turned_on_disk else source.shape
    if role.parameter is None or source.dtype not in _FLOATING:
        dtype = source.dtype
    else:
        dtype = "F32" if role.float32 else _SAFETENSORS_DTYPE[recipe.dtype]
    computed = source.shape[::-1] if transpose else source.shape
    rows = computed[0] if computed else 1
    columns = math.prod(computed[1:])
    block = recipe.block_size if role.quantize and recipe.four_bit else 1
    tiles = (0, rows) if transpose else tile_bounds(rows, columns, block=block, most=TILE_ELEMENTS)
    return TensorPlan(
        name=name,
        origin="base" if replacement is None else "adapter",
        source=source,
        action="quantize" if role.quantize else "keep",
        pair=pair,
        transpose=transpose,
        shape=shape,
        dtype=dtype,
        tiles=tiles,
        outputs=outputs_of(name, shape, dtype, recipe, quantize=role.quantize),
        checked=role.parameter is not None,
    )


def _in_shards(tensors: list[TensorPlan], recipe: Recipe) -> tuple[ShardPlan, ...]:
    groups = pack_shards([tensor.nbytes for tensor in tensors], recipe.max_shard_size)
    shards = []
    for file, indices in zip(shard_names(len(groups)), groups, strict=True):
        members = tuple(tensors[index] for index in indices)
        layout = lay_out(output for tensor in members for output in tensor.outputs)
        shards.append(ShardPlan(file, members, layout))
    return tuple(shards)


def _weights_dtype(base: Checkpoint) -> str:
    """The dtype that most of the base's bytes have."""
    counter: Counter[str] = Counter()
    for tensor in base:
        counter[tensor.dtype] += tensor.nbytes
    return max(sorted(counter), key=lambda dtype: counter[dtype])


def _check_statically(config: Mapping[str, Any], tensors: list[TensorPlan]) -> None:
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    problems = check_output(config, shapes, [tensor.name for tensor in tensors if tensor.action == "quantize"])
    if problems:
        raise Unsupported(f"the output would not load: {problems[0]} ({len(problems)} in all)")


def _check_tokenizer(
    side_files: tuple[SideFile, ...],
    adapter: Adapter | None,
    architecture: Architecture,
    tensors: list[TensorPlan],
) -> None:
    """An adapter's tokenizer may have tokens that the embedding has no rows for."""
    own = SideFile("tokenizer.json", "adapter")
    rows = [tensor.shape[0] for tensor in tensors if tensor.name in architecture.embeddings and tensor.shape]
    if adapter is None or own not in side_files or not rows:
        return
    largest = largest_token(read_bytes(adapter.folder, own.name, limit=MAX_SIDE_FILE_BYTES))
    if largest >= min(rows):
        raise AdapterMismatch(
            f"{adapter.folder.label}: its tokenizer has a token {largest:,}, the embedding {min(rows):,} rows: "
            "the adapter's file lacks the resized embedding"
        )


def _notes_for_servers(tensors: list[TensorPlan]) -> list[str]:
    """VLLM fuses some weights, which must then be quantized all or not at all."""
    actions = {tensor.name: tensor.action for tensor in tensors}
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name, action in actions.items():
            head, dot, tail = name.partition(f".{parts[0]}.")
            if dot and any(actions.get(f"{head}.{part}.{tail}", action) != action for part in parts):
                listed = ", ".join(parts)
                return [f"{head}: {listed} are quantized in part; vLLM fuses them and needs all or none"]
    return []


def _tensor_json(tensor: TensorPlan, layout: ShardLayout) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": tensor.name,
        "action": tensor.action,
        "origin": tensor.origin,
        "source": {"dtype": tensor.source.dtype, "shape": list(tensor.source.shape)},
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "transpose": tensor.transpose,
        "tiles": len(tensor.tiles) - 1,
        "memory_bytes": tensor.memory,
        "outputs": [
            {"name": o.name, "dtype": o.dtype, "shape": list(o.shape), "offset": layout.offsets.get(o.name)}
            for o in tensor.outputs
        ],
    }
    if tensor.pair is not None:
        entry["lora"] = {"module": tensor.pair.module, "rank": tensor.pair.rank, "scaling": tensor.pair.scaling}
    return entry

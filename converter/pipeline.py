"""The conversion: for each output shard, for each tensor, for each tile of rows: read, merge, quantize, write.

Start reading here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from converter.digests import remember
from converter.inputs import Inputs, Reference
from converter.measure import Fidelity, Tally
from converter.merge import delta_rows, merge_tile
from converter.origin import already_made, origin_of
from converter.plan import Plan, TensorPlan, make_plan
from converter.quantize import Quantizer
from converter.receipt import fingerprint
from converter.recipe import Recipe
from converter.seal import Destination, Staging
from converter.side_files import read_side_files
from converter.tiles import as_bytes, read_factors, read_tile, refuse_not_finite, torch_device, torch_dtype
from converter.write import ShardWriter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    stage: str
    """fetching, converting or sealing"""
    done: int
    """Bytes of the base."""
    total: int
    name: str
    """The tensor, or the file that is fetched."""


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    out: Path
    plan: Plan
    fingerprint: str
    fidelity: dict[str, Fidelity]
    """By tensor name; empty if there was nothing to do."""
    nothing_to_do: bool = False
    """OUT was a finished conversion of the same inputs by the same recipe already."""


def convert(
    base: Reference | None,
    adapter: Reference | None,
    out: Reference,
    recipe: Recipe = Recipe(),
    *,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Merge an adapter into a base and write the result, quantized, as a checkpoint in the folder `out`.

    `base` and `adapter` are folders or ids on the Hub. Without `base`, the one that the adapter names is taken; without
    `adapter`, the base is quantized as it is. `device` is auto, cpu, cuda, cuda:0, … `overwrite` lets `out` be an
    earlier conversion. `out` appears only whole.

    Raises a `ConversionRefused` before anything is written, a `ConversionFailed` after.
    """
    with Inputs(base, adapter, base_revision, adapter_revision, offline=offline) as inputs:
        plan = make_plan(inputs.base, inputs.adapter, recipe, trust_remote_code=trust_remote_code)
        destination = Destination(Path(out), inputs=inputs.folders, overwrite=overwrite)
        processor = torch_device(device)
        if (known := already_made(destination, plan, inputs, processor.type)) is not None:
            return Report(destination.out, plan, known, {}, nothing_to_do=True)
        destination.refuse_if_taken()
        inputs.fetch(lambda name, done: progress(Progress("fetching", done, plan.base_bytes, name)))

        with Staging(destination) as staging, one_thread(), inputs.unchanged():
            quantizer = Quantizer(plan.recipe)
            fidelity: dict[str, Fidelity] = {}
            digests: dict[str, str] = {}
            done = 0
            for shard in plan.shards:
                with ShardWriter(staging.folder, shard) as writer:
                    for tensor in shard.tensors:
                        progress(Progress("converting", done, plan.base_bytes, tensor.name))
                        fidelity[tensor.name], digests[tensor.name] = convert_tensor(
                            tensor, inputs, quantizer, writer, processor
                        )
                        done += tensor.source.nbytes
                    writer.finish()

            progress(Progress("sealing", plan.base_bytes, plan.base_bytes, plan.shards[-1].file))
            remember(inputs.base, {t.name: digests[t.name] for t in plan.tensors() if t.origin == "base"})
            origin = origin_of(plan, inputs, processor.type, digests)
            staging.seal(plan, origin, read_side_files(plan.side_files, inputs.folder_of), fidelity)
        return Report(destination.out, plan, fingerprint(plan, origin), fidelity)


def plan_conversion(
    base: Reference | None,
    adapter: Reference | None,
    out: Reference | None = None,
    recipe: Recipe = Recipe(),
    *,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """What `convert` would do with the same arguments: its plan, and its refusals. Nothing is written, and of a base on
    the Hub no shard is downloaded."""
    with Inputs(base, adapter, base_revision, adapter_revision, offline=offline) as inputs:
        plan = make_plan(inputs.base, inputs.adapter, recipe, trust_remote_code=trust_remote_code)
        torch_device(device)
        if out is not None:
            Destination(Path(out), inputs=inputs.folders, overwrite=overwrite).refuse_if_taken()
        return plan


def convert_tensor(
    tensor: TensorPlan, inputs: Inputs, quantizer: Quantizer, writer: ShardWriter, device: torch.device
) -> tuple[Fidelity, str]:
    """Convert one tensor, tile by tile, and write it: its figures, and the xxh3-128 of the bytes that were read."""
    import torch

    recipe = quantizer.recipe
    folder = inputs.folder_of(tensor.origin)
    factors = read_factors(tensor.pair, inputs.folder_of("adapter"), device) if tensor.pair else None
    digest, tally, absmax, written = xxhash.xxh3_128(), Tally(), [], 0
    for start, end in tensor.spans():
        weight, raw = read_tile(tensor, folder, start, end)
        digest.update(raw)
        if tensor.is_copy:
            if tensor.checked:
                refuse_not_finite(tensor.name, weight)
            written += writer.write(tensor.name, written, raw)
            continue
        delta = delta_rows(factors[0], factors[1][start:end], tensor.pair.scaling) if tensor.pair and factors else None
        merged = merge_tile(weight.to(device), delta, recipe.merge_precision, torch_dtype(recipe.dtype))
        if tensor.action == "quantize":
            tile = quantizer.tile(tensor.name, merged.values)
            absmax.append(tile.absmax)
            tally.add(merged, tile.restored)
            written += writer.write(tensor.name, written, as_bytes(tile.packed))
        else:
            kept = merged.values.to(torch_dtype(tensor.dtype))
            refuse_not_finite(tensor.name, kept)
            tally.add(merged, kept.float())
            written += writer.write(tensor.name, written, as_bytes(kept.T if tensor.transpose else kept))
    if tensor.action == "quantize":
        for name, value in quantizer.statistics(tensor.name, torch.cat(absmax), tensor.shape).items():
            writer.write(name, 0, as_bytes(value))
    return tally.fidelity(), digest.hexdigest()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: the mean of absmax depends on their number, and so do the output's bytes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Shards of earlier outputs that later outputs can reuse unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.batch.planned import JobGroup
from converter.batch.run import BatchRun
from converter.batch.sharing import EarlierShard, not_reused
from converter.errors import BadOutput, ConverterError, ReadFailed
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan, TensorPlan, in_shards
from converter.quantize.measure import Fidelity
from converter.read.checkpoint import Checkpoint
from converter.read.digests import digests_of
from converter.read.folder import LocalFolder
from converter.seal.link import ReusableShard, identity_of
from converter.seal.production import Made
from converter.seal.receipt import identity, read_receipt
from converter.tensors import torch_device
from converter.write.sha256 import sha256_of


def earlier_shards(run: BatchRun, group: JobGroup) -> list[EarlierShard]:
    """Shared shards that a finished output has: one of this batch, or that of `--against`."""
    against = run.options.against
    folders = [job.destination.out for job in group.jobs.values() if job.known is not None]
    if against is not None:
        folders.insert(0, against)
    found: list[EarlierShard] = []
    job = next(iter(group.jobs.values()))
    device = torch_device(job.plan.device).type
    for folder in folders:
        left = not_reused(found, group.shared or {})
        if not left:
            break
        try:
            found += reusable_shards(folder, job.plan, left, job.inputs, device)
        except ConverterError as exc:
            if folder == against:
                raise
            group.notes.append(f"not linked to: {exc}")
    if against is not None and not found:
        raise BadOutput(
            f"`against` {against}: none of its shards can be linked to: it was made of another base, by another recipe "
            "or version, or each of its shards has something of its adapter"
        )
    return found


def reusable_shards(
    folder: Path, plan: Plan, shared: Mapping[str, TensorPlan], inputs: Inputs, device: str
) -> list[EarlierShard]:
    """Shards of a finished output that are, to the last byte, what would be made of some shared tensors.

    Their contents are read, and held against that output's receipt. `BadOutput` where it has none, or they differ.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        raise BadOutput(f"{folder}: no finished conversion of this tool: it has no receipt that can be read")
    stated = receipt.get("of_the_base_alone") or {}
    found: list[EarlierShard] = []
    local = LocalFolder(folder)
    try:
        with Checkpoint(local) as written:
            file_of = {tensor.name: tensor.file for tensor in written}
        # The order of the tensors in a shard is that of the base, which is that of `shared`.
        names_in: dict[str, list[str]] = {}
        for name in shared:
            if (file := file_of.get(name)) in stated:
                names_in.setdefault(str(file), []).append(name)
        digests = digests_of(inputs.base, [shared[name].source for names in names_in.values() for name in names])
        for file, names in sorted(names_in.items()):
            shard = in_shards([[shared[name] for name in names]])[0]
            if identity(shard, plan.recipe, inputs.hub_digests() or digests, device) == stated[file]["identity"]:
                made = [_made(shared[name], digests[name], receipt) for name in names]
                found.append(EarlierShard(_as_it_was_made(folder / file, receipt), tuple(made)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise BadOutput(f"{folder}: its receipt can't be understood ({type(exc).__name__})") from exc
    finally:
        local.close()
    return found


def _as_it_was_made(path: Path, receipt: Mapping[str, Any]) -> ReusableShard:
    try:
        file = path.resolve()  # in the Hub's cache it is a link, which means nothing elsewhere
        identity = identity_of(file)
        sha256 = sha256_of(file)
    except OSError as exc:
        raise ReadFailed(f"{path}: {exc.strerror}") from exc
    if sha256 != receipt["files"][path.name]["sha256"]:
        raise BadOutput(f"{path}: has changed since it was made: its sha256 is not the receipt's")
    return ReusableShard(file, sha256, identity)


def _made(tensor: TensorPlan, digest: str, receipt: Mapping[str, Any]) -> Made:
    figures = Fidelity(float(receipt["tensors"][tensor.name]["error"]), None)
    if not math.isfinite(figures.error):
        raise ValueError(figures.error)  # no receipt with it could be read again
    return Made(tensor.name, figures, digest, tensor.source.nbytes)

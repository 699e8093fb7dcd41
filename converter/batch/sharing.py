"""What outputs of one base have in common: tensors that no adapter touches lie in shards that are the same files."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import BadOutput, ReadFailed
from converter.plan.plan import Plan, TensorPlan, in_shards, packed
from converter.quantize.measure import Fidelity
from converter.read.checkpoint import Checkpoint
from converter.read.digests import digests_of
from converter.read.folder import LocalFolder
from converter.seal.link import ReusableShard, identity_of
from converter.seal.production import Made
from converter.seal.receipt import identity, read_receipt
from converter.seal.staging import sha256_of

if TYPE_CHECKING:
    from converter.plan.inputs import Inputs


@dataclass(frozen=True)
class Given:
    """A shard of an earlier output that later ones may have as it is."""

    shard: ReusableShard
    made: tuple[Made, ...]
    """Its tensors, in the order in which they were made."""

    @property
    def names(self) -> list[str]:
        return [made.name for made in self.made]


def untouched(plan: Plan) -> dict[str, TensorPlan]:
    """The tensors of a plan in which the adapter has no part."""
    return {tensor.name: _uncut(tensor) for tensor in plan.tensors() if not tensor.is_touched}


def in_common(one: Mapping[str, TensorPlan], other: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """The tensors that become the same in both."""
    return {name: tensor for name, tensor in one.items() if other.get(name) == tensor}


def left_by(given: Sequence[Given], tensors: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """The tensors that no given shard holds."""
    taken = {name for one in given for name in one.names}
    return {name: tensor for name, tensor in tensors.items() if name not in taken}


def laid_out(plan: Plan, given: Sequence[Given], common: Container[str]) -> tuple[Plan, int, int]:
    """The plan with its tensors in other shards: those that are given, those of what is in common, those of its own.

    With it, the number of shards that are given, and of those in common.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors()}
    of_given = [[tensors[name] for name in one.names] for one in given]
    left = left_by(given, tensors)
    of_common = packed([left.pop(name) for name in list(left) if name in common], plan.recipe)
    of_its_own = packed(list(left.values()), plan.recipe)
    relaid = replace(plan, shards=in_shards([*of_given, *of_common, *of_its_own]))
    return relaid, len(of_given), len(of_common)


def shards_of(plan: Plan, start: int, count: int) -> Plan:
    """A plan for some of its shards only."""
    return replace(plan, shards=plan.shards[start : start + count], adapter_digest=None, side_files=(), notes=())


def given_by(folder: Path, plan: Plan, common: Mapping[str, TensorPlan], inputs: Inputs, device: str) -> list[Given]:
    """Shards of a finished output that are, to the last byte, what would be made of some tensors in common.

    Their contents are read, and held against that output's receipt. `BadOutput` where it has none, or they differ.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        raise BadOutput(f"{folder}: no finished conversion of this tool: it has no receipt that can be read")
    stated = receipt.get("of_the_base_alone") or {}
    found: list[Given] = []
    local = LocalFolder(folder)
    try:
        with Checkpoint(local) as written:
            file_of = {tensor.name: tensor.file for tensor in written}
        # The order of the tensors in a shard is that of the base, which is that of `common`.
        names_in: dict[str, list[str]] = {}
        for name in common:
            if (file := file_of.get(name)) in stated:
                names_in.setdefault(str(file), []).append(name)
        digests = digests_of(inputs.base, [common[name].source for names in names_in.values() for name in names])
        for file, names in sorted(names_in.items()):
            shard = in_shards([[common[name] for name in names]])[0]
            if identity(shard, plan.recipe, inputs.hub_digests() or digests, device) == stated[file]["identity"]:
                made = [_made(common[name], digests[name], receipt) for name in names]
                found.append(Given(_as_it_was_made(folder / file, receipt), tuple(made)))
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


def _uncut(tensor: TensorPlan) -> TensorPlan:
    """How a tensor is cut into tiles makes no difference to its bytes."""
    return replace(tensor, tiles=(0, tensor.rows))

"""Whether an adapter's change has an effect, or is rounded away in every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from converter.merge.change import Change
from converter.plan.plan import Plan, TensorPlan
from converter.quantize.measure import Fidelity
from converter.read.folder import LocalFolder
from converter.read.header import read_header
from converter.seal.production import Production

_NOISE = 100
"""A survival that is further from 1 tells of the rounding errors of the base's weights, not of the adapter."""


def may_be_without_effect(plan: Plan, fidelity: Mapping[str, Fidelity]) -> bool:
    """Whether each survival is 0, or so far from 1 that it tells of rounding alone; nothing is replaced."""
    survivals = [of.survival for of in fidelity.values() if of.survival is not None]
    replaced = any(tensor.origin == "adapter" for tensor in plan.tensors())
    return bool(survivals) and not replaced and all(s == 0 or not abs(s - 1) < _NOISE for s in survivals)


def without_change(tensor: TensorPlan) -> TensorPlan:
    """The same tensor, made of the base alone. Zeros are added, so that it is computed as the other one was."""
    return replace(tensor, change=_zero(tensor.change), fused=tuple(_zeroed(part) for part in tensor.fused))


def _zeroed(part: TensorPlan) -> TensorPlan:
    return replace(part, change=_zero(part.change))


def _zero(change: Change | None) -> Change | None:
    return change.scaled(0.0) if change is not None and change.is_additive and change.parts else None


class Comparison:
    """Takes what a conversion would write, and compares it with the finished shards of an output."""

    def __init__(self, output: Production) -> None:
        self.differs = False
        self._folder = LocalFolder(output.staging.folder)
        headers = (read_header(self._folder, shard.file) for shard in output.plan.shards)
        self._there = {name: tensor for header in headers for name, tensor in header.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        there = bytearray(len(raw))
        self._folder.read_into(self._there[name].file, self._there[name].offset + start, memoryview(there))
        self.differs = self.differs or memoryview(there) != memoryview(raw)
        return len(raw)

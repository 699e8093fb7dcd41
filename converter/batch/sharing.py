"""What outputs of one base share: the shards of the tensors that no adapter touches, which are the same files."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from converter.plan.plan import Plan, ShardPlan, TensorPlan, in_shards, packed
from converter.seal.link import ReusableShard
from converter.seal.production import Made


@dataclass(frozen=True)
class EarlierShard:
    """A shard of an earlier output that later outputs can reuse unchanged, and the tensors in it."""

    shard: ReusableShard
    made: tuple[Made, ...]
    """In the order in which they were made."""

    @property
    def names(self) -> list[str]:
        return [made.name for made in self.made]


@dataclass(frozen=True)
class Layout:
    """A plan whose tensors lie in shards by who makes them. A shard has one of three roles."""

    plan: Plan
    reused: Mapping[str, EarlierShard]
    """File → the shard of an earlier output that it will be."""
    shared: frozenset[str]
    """Files that are made once for all outputs. Those that are neither reused nor shared are the output's own."""

    @property
    def not_own(self) -> list[str]:
        """Files of earlier outputs."""
        return [*self.reused, *self.shared]

    def shared_shards(self) -> list[ShardPlan]:
        return [shard for shard in self.plan.shards if shard.file in self.shared]

    def plan_of_shared(self) -> Plan:
        """What is made once for all outputs, as a plan of its own."""
        shards = tuple(self.shared_shards())
        return replace(self.plan, shards=shards, adapter_digest=None, side_files=(), notes=())


def untouched(plan: Plan) -> dict[str, TensorPlan]:
    """The tensors of a plan in which the adapter has no part."""
    return {tensor.name: _uncut(tensor) for tensor in plan.tensors() if not tensor.is_touched}


def same_in_both(one: Mapping[str, TensorPlan], other: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """The tensors that become the same in both."""
    return {name: tensor for name, tensor in one.items() if other.get(name) == tensor}


def not_reused(earlier: Sequence[EarlierShard], tensors: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """The tensors that are in none of the earlier shards."""
    reused = {name for shard in earlier for name in shard.names}
    return {name: tensor for name, tensor in tensors.items() if name not in reused}


def lay_out(plan: Plan, earlier: Sequence[EarlierShard], shared: Container[str]) -> Layout:
    """Put the tensors of a plan into shards by who makes them: first those of earlier shards, then those named in
    `shared`, then the output's own."""
    tensors = {tensor.name: tensor for tensor in plan.tensors()}
    left = not_reused(earlier, tensors)
    once = packed([left.pop(name) for name in list(left) if name in shared], plan.recipe)
    own = packed(list(left.values()), plan.recipe)
    shards = in_shards([*([tensors[name] for name in shard.names] for shard in earlier), *once, *own])
    files = [shard.file for shard in shards]
    reused, of_shared = files[: len(earlier)], files[len(earlier) : len(earlier) + len(once)]
    return Layout(replace(plan, shards=shards), dict(zip(reused, earlier, strict=True)), frozenset(of_shared))


def _uncut(tensor: TensorPlan) -> TensorPlan:
    """How a tensor is cut into tiles makes no difference to its bytes."""
    return replace(tensor, tiles=(0, tensor.rows))

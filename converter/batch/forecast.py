"""What the jobs of one base will take together: passes over it, memory, time. Nothing is written for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from converter.batch.members import Group, Member
from converter.errors import BadRecipe
from converter.plan import budget
from converter.plan.estimate import WRITE_RATE, Estimate, computed, estimate


@dataclass(frozen=True)
class Forecast:
    """Of jobs of one base and recipe."""

    base: str
    outputs: int
    """That are to be made."""
    passes: int
    memory: int
    """Bytes above the imports, at most."""
    disk: int
    """Bytes, with what the outputs have in common counted once."""
    estimate: Estimate

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"estimate": self.estimate.as_json()}


def forecast(group: Group) -> Forecast | None:
    """What is to come of a planned group, by short samples; None if all of it is made already."""
    pending = [member for member in group.members.values() if member.known is None]
    if not pending:
        return None
    plan = pending[0].plan
    # What is in common is made once, and is part of every plan.
    common, alone = computed((group.common or {}).values()), pending[0].values
    values = common + sum(member.values - common for member in pending)
    passes, memory = _passes(pending)
    disk = group.common_bytes + sum(member.output_bytes - group.common_bytes for member in pending)
    one = estimate(plan, group.base.checkpoint)
    together = Estimate(
        read=one.read * passes,
        compute=one.compute * values / alone if alone else 0.0,
        write=disk / WRITE_RATE,
        check=one.check,
    )
    return Forecast(group.base.checkpoint.folder.label, len(pending), passes, memory, disk, together)


def _passes(members: Sequence[Member]) -> tuple[int, int]:
    """How many passes, and the most memory that one of them takes."""
    plan = members[0].plan
    resources, tensors = plan.resources, list(plan.tensors())

    def memory_of(numbers: Sequence[int]) -> int | None:
        reserved = budget.together([members[number].need for number in numbers])
        _, memory, _ = budget.cut_into_tiles(tensors, plan.recipe, resources, reserved)
        return memory if budget.fits(memory, len(numbers), resources) else None

    most = []
    for _, found in budget.in_passes([member.need for member in members], resources, memory_of):
        if isinstance(found, BadRecipe):
            raise found
        most.append(found)
    return len(most), max(most)

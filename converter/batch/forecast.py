"""What jobs of one base and recipe will take: passes over the base, memory, disk, time. Nothing is written for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from converter.batch.memory import Reserve, fits, fitting_passes, reserve_of, reserved, split_into_passes
from converter.errors import BadRecipe
from converter.plan.budget import recut
from converter.plan.estimate import WRITE_RATE, Estimate, computed, estimate
from converter.plan.plan import Plan, TensorPlan
from converter.read.checkpoint import Checkpoint


@dataclass(frozen=True)
class Forecast:
    """What some outputs of one base and recipe take."""

    base: str
    outputs: int
    """That are to be made."""
    passes: int
    memory: int
    """Bytes above the imports, at most."""
    disk: int
    """Bytes; shared shards are counted once."""
    estimate: Estimate

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"estimate": self.estimate.as_json()}


@dataclass(frozen=True)
class Costs:
    """What one output takes."""

    values: int
    """Weights that are merged or quantized."""
    nbytes: int
    """On disk."""
    reserve: Reserve


def costs_of(plan: Plan) -> Costs:
    return Costs(computed(plan.tensors()), plan.output_bytes, reserve_of(plan))


def forecast(
    outputs: Sequence[Costs],
    shared: Iterable[TensorPlan],
    plan: Plan,
    base: Checkpoint,
    most: int,
    sample: Callable[[Plan, Checkpoint], Estimate] = estimate,
) -> Forecast:
    """What outputs take that share some tensors. `plan` is the plan of the first output, `most` the number of outputs
    that a pass makes at most; `sample` gives the seconds of a conversion of `plan` alone."""
    shared = list(shared)
    shared_values, shared_bytes = computed(shared), sum(tensor.nbytes for tensor in shared)
    # What is shared is made once, and is part of every plan.
    values = shared_values + sum(output.values - shared_values for output in outputs)
    disk = shared_bytes + sum(output.nbytes - shared_bytes for output in outputs)
    passes = _memory_of_passes([output.reserve for output in outputs], plan, most)
    one = sample(plan, base)
    together = Estimate(
        read=one.read * len(passes),
        compute=one.compute * values / outputs[0].values if outputs[0].values else 0.0,
        write=disk / WRITE_RATE,
        check=one.check,
    )
    return Forecast(base.folder.label, len(outputs), len(passes), max(passes), disk, together)


def _memory_of_passes(outputs: Sequence[Reserve], plan: Plan, most: int) -> list[int]:
    """Bytes that each pass takes."""
    resources = plan.resources

    def attempt(numbers: Sequence[int]) -> int | None:
        memory = recut(plan, reserved([outputs[number] for number in numbers])).memory
        return memory if fits(memory, len(numbers), resources) else None

    passes = []
    for _, memory in fitting_passes(split_into_passes(outputs, resources, most), attempt):
        if isinstance(memory, BadRecipe):
            raise memory
        passes.append(memory)
    return passes

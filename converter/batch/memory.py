"""Memory of a pass that makes several outputs from the same tiles: how many of them fit the budget together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from converter.errors import BadRecipe
from converter.plan.budget import FIXED, in_flight
from converter.plan.plan import Plan
from converter.resources import DEFAULT_MEMORY, Resources

T = TypeVar("T")

PER_TENSOR = 8_000
"""Bytes of Python's objects for a tensor that an adapter changes: its plan, its place, its line of the receipt."""


@dataclass(frozen=True)
class Reserve:
    """Bytes of the budget that one output takes, and tiles can't have."""

    in_flight: int
    """Of tensors that are not finished, and of the adapter's factors."""
    objects: int
    """Python's, of the tensors that its adapter changes."""

    @property
    def nbytes(self) -> int:
        return self.in_flight + self.objects


def reserve_of(plan: Plan) -> Reserve:
    """What the output of a plan reserves."""
    tensors = list(plan.tensors())
    objects = PER_TENSOR * sum(tensor.is_touched for tensor in tensors)
    return Reserve(in_flight(tensors, plan.recipe, plan.resources), objects)


def reserved(outputs: Sequence[Reserve]) -> int:
    """Bytes that tiles can't have while these outputs are made together; for one, as many as in a conversion of it."""
    if not outputs:
        return FIXED
    # `FIXED` has the objects of one output.
    return FIXED + sum(output.nbytes for output in outputs) - min(output.objects for output in outputs)


def split_into_passes(outputs: Sequence[Reserve], resources: Resources, most: int) -> list[list[int]]:
    """Which outputs are made together, as indices: at most `most`, and as many as leave a quarter of the budget to
    tiles."""
    room = (resources.memory or DEFAULT_MEMORY) * 3 // 4 - FIXED
    passes: list[list[int]] = [[]]
    left = room
    for index, output in enumerate(outputs):
        if passes[-1] and (output.nbytes > left or len(passes[-1]) == most):
            passes.append([])
            left = room
        passes[-1].append(index)
        left -= output.nbytes
    return passes


def fitting_passes(
    passes: Sequence[Sequence[int]], attempt: Callable[[Sequence[int]], T | None]
) -> Iterator[tuple[Sequence[int], T | BadRecipe]]:
    """Passes, as indices of their outputs, and what `attempt` makes of each.

    Where it gives None for several outputs, or raises `BadRecipe`, a tensor that can't be cut leaves them too little
    memory: it is called for half of them, then for the other half. For a single output, the error is given.
    """
    left = deque(passes)
    while left:
        numbers = left.popleft()
        made: T | BadRecipe | None
        try:
            made = attempt(numbers)
        except BadRecipe as exc:
            made = exc if len(numbers) == 1 else None
        if made is not None:
            yield numbers, made
        else:
            left.extendleft([numbers[len(numbers) // 2 :], numbers[: len(numbers) // 2]])


def fits(memory: int, outputs: int, resources: Resources) -> bool:
    """Whether so many outputs may take `memory` bytes together: one alone may take more than the default."""
    return outputs == 1 or resources.memory is not None or memory <= DEFAULT_MEMORY

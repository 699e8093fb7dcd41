"""When each file of the base is needed: from the first tensor that is read from it to the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from converter.plan.plan import TensorPlan
from converter.read.stored.stored import is_stored


class Need(NamedTuple):
    """A file of the base, and the tensors that are read from it, by their place in the order of work."""

    file: str
    first: int
    last: int


def needs_of(tensors: Sequence[TensorPlan]) -> list[Need]:
    """The files of the base that tensors are read from, in the order in which they are needed first."""
    found: dict[str, Need] = {}
    for number, tensor in enumerate(tensors):
        for file in sorted(_files_of(tensor)):
            found[file] = Need(file, found[file].first if file in found else number, number)
    return list(found.values())


def most_at_once(needs: Sequence[Need], size: Callable[[str], int], ahead: int) -> int:
    """The most bytes of these files that lie on the disk at one time, if a file is removed after its last tensor and
    the next `ahead` files come early."""
    held = (
        sum(size(need.file) for need in needs[: number + ahead + 1] if need.last >= current.first)
        for number, current in enumerate(needs)
    )
    return max(held, default=0)


def _files_of(tensor: TensorPlan) -> set[str]:
    """The files of the base that are read for a tensor, and for those that share a scale with it."""
    files: set[str] = set()
    for part in (tensor, *tensor.fused):
        if part.origin == "base":
            files |= {one.file for one in part.source.parts} if is_stored(part.source) else {part.source.file}
    return files

"""How a batch is divided among the nodes of a cluster: parts of one base, each of which one worker makes in one pass.

Everything here is a value: what nodes have, what a job is predicted to take, what each part asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from converter.batch.forecast import costs_of, forecast
from converter.batch.memory import split_into_passes
from converter.batch.options import BatchOptions
from converter.batch.sharing import untouched
from converter.errors import ConversionRefused
from converter.job import Job
from converter.plan.decide import make_plan
from converter.plan.estimate import computed
from converter.plan.inputs import Inputs
from converter.resources import DEFAULT_MEMORY

IMPORTS = 400_000_000
"""Bytes that Python and the libraries take in a worker, above which the budget counts."""


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has."""

    cpus: int
    gpus: int
    memory: int
    """Bytes that it gives to work."""


@dataclass(frozen=True)
class Ask:
    """What a worker takes of its node while it makes a part."""

    cpus: int
    gpus: int
    memory: int
    """Bytes, imports included."""

    def fits(self, node: Node) -> int:
        """How many of these a node can take at a time."""
        counts = [node.cpus // self.cpus, node.memory // self.memory]
        return min([*counts, node.gpus // self.gpus] if self.gpus else counts)

    def __str__(self) -> str:
        cpus = "a CPU" if self.cpus == 1 else f"{self.cpus} CPUs"
        gpu = ", a GPU" if self.gpus else ""
        return f"{cpus}{gpu} and {self.memory:,} bytes of memory"


@dataclass(frozen=True)
class Prediction:
    """What jobs of one base and recipe take, as the plan of one of them says."""

    base_bytes: int
    alone: int
    """Bytes above the imports that one output takes."""
    further: int
    """Of these, what each further output of the same pass takes, and at most what the outputs share."""
    budget: int
    """Bytes that outputs of one pass keep to together, whatever their number: tiles become smaller."""
    most: int
    """Outputs that one pass takes."""
    read: float
    """Seconds in which the base is read once."""
    own: float
    """Seconds for what is one output's own."""

    def memory(self, count: int) -> int:
        """Bytes that a worker takes for a pass of so many outputs."""
        return IMPORTS + min(self.alone + (count + 1) * self.further, max(self.alone, self.budget))


@dataclass(frozen=True)
class Part:
    """Jobs that one worker makes, and what it takes for them."""

    indices: tuple[int, ...]
    ask: Ask
    base_bytes: int


def predict(job: Job, options: BatchOptions) -> Prediction:
    """What jobs like this one take. Raises the refusals of planning it, but doesn't look at its OUT."""
    # This machine may have no GPU; for sizes it is near enough.
    options = replace(options, device="cpu")
    with Inputs.of(job, options) as inputs:
        plan = make_plan(inputs.base, inputs.adapter, job.recipe, **options.of_plan())
        costs, shared = costs_of(plan), untouched(plan).values()
        alone = forecast([costs], shared, plan, inputs.base, options.outputs_per_pass)
    own_values = 1 - computed(shared) / costs.values if costs.values else 0.0
    own_bytes = 1 - sum(tensor.nbytes for tensor in shared) / costs.nbytes
    reserves = [costs.reserve] * options.outputs_per_pass
    return Prediction(
        plan.base_bytes,
        alone.memory,
        costs.reserve.nbytes,
        options.resources.memory or DEFAULT_MEMORY,
        len(split_into_passes(reserves, options.resources, options.outputs_per_pass)[0]),
        alone.estimate.read,
        max(own_values * alone.estimate.compute, own_bytes * alone.estimate.write),
    )


def on_gpus(device: str, nodes: Sequence[Node]) -> bool:
    """Whether parts are made on GPUs: all of them or none, as the kind of device shapes bytes."""
    return device.startswith("cuda") or (device == "auto" and any(node.gpus for node in nodes))


def divide(
    groups: Sequence[tuple[Sequence[int], Prediction]], nodes: Sequence[Node], *, threads: int, gpus: int
) -> list[Part]:
    """The jobs of each group in parts that keep all nodes busy. A part takes at most `threads` CPUs.

    Raises `ConversionRefused` where no node has what a part of one job takes.
    """
    cpus = max(1, min(threads, max((node.cpus for node in nodes), default=0)))
    count = sum(len(indices) for indices, _ in groups)
    parts = []
    for indices, found in groups:
        one = Ask(cpus, gpus, found.memory(1))
        slots = sum(one.fits(node) for node in nodes)
        if not slots:
            raise ConversionRefused(f"`address`: no node has {one}, which a part takes")
        largest = max(node.memory for node in nodes if one.fits(node))
        most = found.most
        while most > 1 and found.memory(most) > largest:
            most -= 1
        sizes = part_sizes(len(indices), ceil(slots * len(indices) / count), most, found.read, found.own)
        start = 0
        for size in sizes:
            some = tuple(indices[start : start + size])
            parts.append(Part(some, Ask(cpus, gpus, found.memory(size)), found.base_bytes))
            start += size
    return parts


def part_sizes(count: int, slots: int, most: int, read: float, own: float) -> list[int]:
    """`count` jobs in even parts: enough for all `slots`, none of more jobs than one pass takes, `most`.

    Each part takes at least as long as reading the base twice: shorter ones would mostly read what others read, too.
    Times are in seconds.
    """
    size = ceil(count / slots)
    if read > 0:
        size = max(size, ceil(min(2 * read / own, count)) if own > 0 else count)
    parts = ceil(count / min(size, most))
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]

"""How fast an output answers, beside the merged model in 16 bits and the base with the adapter unmerged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converter.compare import Sources
from converter.errors import ConversionFailed
from converter.job import RunOptions
from converter.latency.measure import Measured, Server, Workload, measure
from converter.latency.variants import About, prepared
from converter.layers.texts import window_of
from converter.observer import Observer
from converter.read.folder import LocalFolder

UNDER_WAY = "latency was measured"


@dataclass(frozen=True)
class Setting:
    """What every server is told."""

    dtype: str
    """bfloat16 or float16."""
    room: int
    """Tokens of prompt and answer."""
    device: str
    tick: Callable[[], None]
    """A server calls this while it waits. It raises `Interrupted` when the user wants to stop."""


Opening = Callable[[Setting], Server]


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on."""

    processors: int
    load: float
    """The load average of the minute before the start."""

    @classmethod
    def this(cls) -> Machine:
        return cls(len(os.sched_getaffinity(0)), os.getloadavg()[0])


@dataclass(frozen=True)
class Benchmark:
    """What was measured."""

    output: str
    """What the output's weights are in."""
    workload: Workload
    machine: Machine
    servers: tuple[Measured, ...]

    @property
    def notes(self) -> list[str]:
        """Reasons not to trust the figures."""
        machine = self.machine
        if machine.load < 0.5:
            return []
        return [f"a busy machine: as it began, load {machine.load:.1f} on {machine.processors} processors"]


def benchmark_output(
    out: Path,
    against: Sources,
    workload: Workload,
    servers: Sequence[Opening],
    options: RunOptions = RunOptions(),
    observer: Observer = Observer(),
    scratch: Path | None = None,
) -> Benchmark:
    """Measure an output through servers. The merged model is made in a folder below `scratch`, by default the system's,
    and removed.

    What can't run says why. `ConversionFailed` if nothing can; `BadRecipe` for more tokens than the model takes.
    """
    machine, folder = Machine.this(), LocalFolder(out.expanduser()).path
    about = About.of(folder)
    window_of(workload.tokens, about.config, "prompt_tokens` and `new_tokens")
    with prepared(folder, against, scratch, options, observer) as made:
        steps = len(servers) * len(made.variants) * workload.rounds * (workload.requests + 1)
        done = 0

        def tick(name: str) -> None:
            nonlocal done
            observer.stop_if_asked(UNDER_WAY)
            observer.tell("measuring", made.nbytes * done // steps, made.nbytes, name)
            done += 1

        setting = Setting(about.dtype, workload.tokens, options.device, lambda: observer.stop_if_asked(UNDER_WAY))
        found = [measure(opening(setting), made.variants, workload, about.vocabulary, tick=tick) for opening in servers]
        found = [replace(one, why_not=made.why_not | one.why_not) for one in found]
    if not any(one.latencies for one in found):
        why = "; ".join(f"{one.through}, {name}: {said}" for one in found for name, said in one.why_not.items())
        raise ConversionFailed(f"nothing could be measured: {why}")
    return Benchmark(about.kind, workload, machine, tuple(found))

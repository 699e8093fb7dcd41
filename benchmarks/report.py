"""The benchmark's result as Markdown: what was to be reached, then what was measured of each model and each stage.

    python benchmarks/report.py build/bench/result.json

prints them anew from an earlier run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

BUDGET = 512_000_000
SHORT = 0.5
"""Seconds for a command that converts nothing."""

SLOWER = 1.25
"""How many times as long as NF4's encoder the one of a format that servers run fast may take."""

_ALONE = {"encoders": "merge, rank 16, and encode alone", "readers": "read and dequantize alone"}
_KINDS = {"qv": "q_proj and v_proj", "all": "all linear layers"}

Result = dict[str, Any]


def table(result: Result) -> str:
    """All tables."""
    parts = [_conditions(result), _goals(result)]
    if result["models"]:
        parts += [_models(result), _stages(result)]
    if "paths" in result:
        parts.append(_paths(result["paths"]))
    if "schemes" in result:
        parts += [_rates(result["schemes"][kind], what) for kind, what in _ALONE.items()]
    if "batch" in result:
        parts.append(_batches(result))
    if "tuners" in result:
        parts.append(_tuners(result["tuners"]))
    if "evaluation" in result:
        parts.append(_on_a_text(result["evaluation"], "`convert evaluate`"))
    if "calibration" in result:
        parts.append(_on_a_text(result["calibration"], "`--calibrate`"))
    return "\n\n".join([*parts, _commands(result)])


def _on_a_text(found: Result, command: str) -> str:
    """What a command takes that runs a model on 2,048 tokens, a layer in memory at a time."""
    lines = [f"| {command}, 2,048 tokens | base | peak of memory | time |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} B | {run['base_bytes'] / 1e9:.1f} GB | {run['peak'] / 1e9:.2f} GB | {run['seconds']:.0f} s |"
        for name, run in found.items()
    ]
    return "\n".join(lines)


def seconds(runs: Sequence[dict[str, Any]]) -> float:
    """The median of the wall time."""
    return float(median(run["seconds"] for run in runs))


def peak(runs: Sequence[dict[str, Any]], key: str = "peak") -> int:
    """The largest of a figure, which is the peak of memory unless `key` says otherwise."""
    return max(int(run[key]) for run in runs)


def plain_seconds(model: Result) -> float:
    """The base read with a cold cache, and the output's bytes written and synced."""
    return seconds(model["read cold"]) + seconds(model["write"])


def _paths(found: Result) -> str:
    """Processor time of each path, and its ratio to NF4's."""
    cpu = {path: float(median(run["cpu_seconds"] for run in runs)) for path, runs in found["runs"].items()}
    lines = [f"| {found['model']} B | processor's time | to NF4's | VmHWM |", "| --- | --- | --- | --- |"]
    for path, time in cpu.items():
        memory = peak(found["runs"][path]) / 1e6
        lines.append(f"| {path} | {time:.1f} s | {time / cpu['NF4']:.2f} × | {memory:.0f} MB |")
    return "\n".join(lines)


def _conditions(result: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"Python {result['python']}, {versions}; {result['processors']} processors, "
        f"{result['memory'] / 1e9:.0f} GB of memory."
    )


def _goals(result: Result) -> str:
    models, imports = result["models"], result["imports"]
    lines: list[Sequence[str]] = []

    def goal(
        what: str, model: str, value: Callable[[Result], float], most: float, show: Callable[[float], str]
    ) -> None:
        if model in models:
            lines.append(_goal(what, value(models[model]), most, show))

    def share(value: float) -> str:
        return f"1/{1 / value:.1f}"

    for name, most in (("1.1", 1 / 10), ("3.2", 1 / 20)):
        if models.get(name, {}).get("reference"):
            for kind, text in (("cold", "with start-up"), ("first", "the very first conversion of a user")):
                goal(
                    f"{name} B, {text}, to the reference flow",
                    name,
                    lambda model, kind=kind: seconds(model[kind]) / seconds(model["reference"]),  # type: ignore[misc]
                    most,
                    share,
                )
    goal(
        "3.2 B, without start-up, to the plain work",
        "3.2",
        lambda model: (seconds(model["cold"]) - seconds(imports)) / plain_seconds(model),
        1.5,
        _times,
    )
    for name in models:
        what = "one tensor of 2.1 GB" if name == "wide" else f"{name} B"
        goal(
            f"{what}, peak memory above the imports' {_mb(peak(imports))}",
            name,
            lambda model: peak(_conversions(model)) - peak(imports),
            BUDGET,
            _mb,
        )
    if "3.2" in models:
        smallest = peak(_conversions(models["0.3"]))
        goal("3.2 B to 0.3 B, peak memory", "3.2", lambda model: peak(_conversions(model)) / smallest, 1.05, _times)
    for name in ("w4a16", "fp8", "nvfp4a16") if "schemes" in result else ():
        encoders = result["schemes"]["encoders"]
        times = encoders["nf4"]["1 thread"] / encoders[name]["1 thread"]
        lines.append(_goal(f"{name}, merge and encode, time on one thread, to NF4's", times, SLOWER, _times))
    if "batch" in result:
        lines += _goals_of_batches(result["batch"], peak(imports))
    if "tuners" in result:
        lines += _goals_of_tuners(result["tuners"])
    return _markdown(("", "measured", "to reach", "reached"), lines)


def _goals_of_batches(batch: Result, floor: int) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = []
    many = f"{batch['model']} B, {batch['adapters']} adapters"
    if few := batch.get("qv"):
        time = seconds(few["batch"]) / seconds(few["alone"])
        disk = peak(few["batch"], "disk_bytes") / peak(few["alone"], "disk_bytes")
        lines.append(_goal(f"{many} on q_proj and v_proj, time, to one alone", time, 2, _times))
        lines.append(_goal("the same, disk used by the outputs, to one output", disk, 2, _times))
    if whole := batch.get("all"):
        time = seconds(whole["batch"]) / sum(run["seconds"] for run in whole["alone"])
        lines.append(_goal(f"{many} on all linear layers, time, to as many runs", time, 0.6, _times))
    for kind in [kind for kind in _KINDS if kind in batch]:
        for which, who in (("alone", "1 adapter"), ("batch", f"{batch['adapters']} adapters")):
            what = f"{batch['model']} B, {who} on {_KINDS[kind]}, peak memory above the imports' {_mb(floor)}"
            lines.append(_goal(what, peak(batch[kind][which]) - floor, BUDGET, _mb))
    return lines


def _goals_of_tuners(tuners: Result) -> list[Sequence[str]]:
    slower = _work(tuners, "DoRA") / _work(tuners, "LoRA")
    lines = [_goal(f"{tuners['model']} B, DoRA, processor time without start-up, to LoRA", slower, 2, _times)]
    for kind, runs in tuners["kinds"].items():
        said = peak(runs, "predicted_memory_bytes")
        lines.append(_goal(f"the same, {kind}, memory (RssAnon) above the imports'", _above(tuners, kind), said, _mb))
    return lines


def _floor(tuners: Result, kind: str) -> list[dict[str, Any]]:
    """What a conversion with such an adapter imports."""
    floor: list[dict[str, Any]] = tuners["imports" if kind in ("LoRA", "DoRA") else "imports with PEFT"]
    return floor


def _work(tuners: Result, kind: str) -> float:
    """Seconds of processor time, less those of the imports."""
    runs, floor = tuners["kinds"][kind], _floor(tuners, kind)
    return float(median(r["cpu_seconds"] for r in runs) - median(r["cpu_seconds"] for r in floor))


def _above(tuners: Result, kind: str) -> int:
    return peak(tuners["kinds"][kind], "anonymous") - min(run["anonymous"] for run in _floor(tuners, kind))


def _goal(what: str, found: float, most: float, show: Callable[[float], str]) -> Sequence[str]:
    return what, show(found), f"≤ {show(most)}", "yes" if found <= most else "no"


def _models(result: Result) -> str:
    lines = []
    for name, model in result["models"].items():
        rows = [
            ("converter, first time", model["first"]),
            ("converter", model["cold"]),
            ("converter, base in the file cache", model["cached"]),
            ("reference flow", model["reference"]),
        ]
        for what, runs in rows:
            if runs:
                spread = f"{min(r['seconds'] for r in runs):.1f}–{max(r['seconds'] for r in runs):.1f}"
                cells = [name, what, f"{seconds(runs):.1f} s", spread if len(runs) > 1 else ""]
                memory = [_mb(peak(runs)), _mb(peak(runs, "anonymous"))]
                children = _mb(peak(runs, "children")) if peak(runs, "children") else ""
                lines.append((*cells, f"{median(r['cpu_seconds'] for r in runs):.1f} s", *memory, children))
        plain = [
            (f"reading {_gb(model['base_bytes'])}, cold", model["read cold"]),
            (f"reading {_gb(model['base_bytes'])}, cached", model["read cached"]),
            (f"writing and syncing {_gb(model['output_bytes'])}", model["write"]),
        ]
        for what, runs in plain:
            spread = f"{min(r['seconds'] for r in runs):.1f}–{max(r['seconds'] for r in runs):.1f}"
            lines.append((name, what, f"{seconds(runs):.1f} s", spread if len(runs) > 1 else "", *[""] * 4))
    header = ("model", "", "time", "from–to", "CPU time", "VmHWM", "RssAnon", "its children")
    return _markdown(header, lines)


def _rates(rates: dict[str, dict[str, float]], what: str) -> str:
    lines = [
        (name, threads, f"{rate:.2f} GB/s", f"{rate / rates['nf4'][threads]:.2f} ×")
        for name, of_threads in rates.items()
        for threads, rate in of_threads.items()
    ]
    return _markdown((what, "", "bytes of bfloat16 weights", "to NF4"), lines)


def _batches(result: Result) -> str:
    batch = result["batch"]
    lines = []
    for kind, text in _KINDS.items():
        for which, runs in batch.get(kind, {}).items():
            who = "1 adapter" if which == "alone" else f"{batch['adapters']} adapters"
            spread = f"{min(r['seconds'] for r in runs):.1f}–{max(r['seconds'] for r in runs):.1f}"
            cells = [f"{who} on {text}", str(len(runs)), f"{seconds(runs):.1f} s", spread if len(runs) > 1 else ""]
            memory = [_mb(peak(runs)), _mb(peak(runs, "anonymous"))]
            disk = _gb(peak(runs, "disk_bytes"))
            lines.append((*cells, f"{median(r['cpu_seconds'] for r in runs):.1f} s", *memory, disk))
    header = (f"batches, {batch['model']} B", "runs", "time", "from–to", "CPU time", "VmHWM", "RssAnon", "disk")
    return _markdown(header, lines)


def _tuners(tuners: Result) -> str:
    lines = []
    for kind, runs in tuners["kinds"].items():
        spread = f"{min(r['cpu_seconds'] for r in runs):.1f}–{max(r['cpu_seconds'] for r in runs):.1f}"
        cells = [kind, f"{median(r['cpu_seconds'] for r in runs):.1f} s", spread, f"{_work(tuners, kind):.1f} s"]
        memory = [_mb(_above(tuners, kind)), _mb(peak(runs, "predicted_memory_bytes"))]
        lines.append((*cells, _times(_work(tuners, kind) / _work(tuners, "LoRA")), *memory))
    header = (
        f"adapters, {tuners['model']} B",
        "CPU time",
        "from–to",
        "less imports",
        "to LoRA",
        "RssAnon above imports",
    )
    return _markdown((*header, "as predicted"), lines)


def _stages(result: Result) -> str:
    lines = [
        (stage, threads, f"{rate:.2f} GB/s")
        for stage, rates in result["stages"].items()
        for threads, rate in rates.items()
    ]
    for what in ("read cold", "read cached", "write"):
        model = list(result["models"].values())[-1]
        runs = model[what]
        lines.append((what, "", f"{median(run['bytes'] / run['seconds'] for run in runs) / 1e9:.2f} GB/s"))
    return _markdown(("stage alone", "", "bytes of the base; of the output where it writes"), lines)


def _commands(result: Result) -> str:
    plans = result.get("plan of a 70B", {})
    rows = [
        ("imports of a conversion", result["imports"], None),
        ("`convert --help`", result["help"], SHORT),
        ("refusal of a missing folder", result["refusal"], SHORT),
        ("plan of a 70B, first time", plans.get("first"), None),
        ("plan of a 70B", plans.get("again"), None),
    ]
    lines = [
        (
            what,
            f"{seconds(runs):.2f} s",
            _mb(peak(runs)),
            _mb(peak(runs, "children")) if peak(runs, "children") else "",
            f"< {most} s" if most else "",
        )
        for what, runs, most in rows
        if runs
    ]
    return _markdown(("command", "time", "VmHWM", "its children", "to reach"), lines)


def _conversions(model: Result) -> list[dict[str, Any]]:
    return [*model["first"], *model["cold"], *model["cached"]]


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    print(table(json.loads(parser.parse_args().result.read_text())))

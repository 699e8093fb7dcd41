"""The report of an output as one HTML file without outside resources, from its receipt. The only import of jinja2."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import quote

from converter.errors import BadCheckpoint
from converter.gates import Gates, QualityGates, in_words
from converter.quantize.measure import Fidelity, calibrated_in, figures_of
from converter.samples import Sample, rates, stages
from converter.seal.receipt import RECEIPT, fidelity_of

BINS = 20
WORST = 10
_LAYER = re.compile(r"\.(\d+)\.")
_HUB = "https://huggingface.co/"
_FAINTEST, _STRONGEST = 0.04, 0.55
"""How much of the colour a cell has: text on it must be readable in light and dark."""


def page(receipt: Mapping[str, Any], name: str, gates: Gates = Gates(), samples: Sequence[Sample] = ()) -> str:
    """The whole report. `name` is what the output is called, `samples` are those of the run that made it, if that has
    just ended. `BadCheckpoint` for a receipt that can't be understood."""
    try:
        figures = fidelity_of(receipt)
        made = _Figures(receipt, figures)
        text = _template("page.html").render(
            name=name,
            **_head(receipt, gates),
            gates=_gates(gates, made),
            inputs=_inputs(receipt),
            sizes=_sizes(receipt),
            maps=[one for one in (_map(made.survivals, "survival", min), _map(made.errors, "error", max)) if one],
            worst=_worst(made),
            run=_run(samples),
            recipe=[*receipt["recipe"].items(), *receipt["versions"].items()],
        )
        return str(text)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BadCheckpoint(f"{RECEIPT}: can't be understood: {type(exc).__name__}: {exc}") from exc


def head(receipt: Mapping[str, Any], gates: Gates = Gates()) -> str:
    """The report's head as HTML: verdict and figures. For notebooks, too."""
    return str(_template("head.html").render(_head(receipt, gates)))


def _head(receipt: Mapping[str, Any], gates: Gates) -> dict[str, Any]:
    figures = fidelity_of(receipt)
    made, misses = _Figures(receipt, figures), gates.misses(figures)
    if misses:
        verdict = f"a gate is missed: {in_words(misses)}"
    else:
        verdict = "complete" + (", and every gate is reached" if gates else "; no gate was asked for")
    rows = [("architecture", receipt["architecture"]), ("format", receipt["recipe"]["quant_type"])]
    rows.append(("tensors", ", ".join(f"{count} {what}" for what, count in made.counts.items() if count)))
    figures_said = [("relative error", made.errors, max), ("survival", made.survivals, min)]
    for what, values, worst in [*figures_said, ("error of outputs, on the text", calibrated_in(figures), max)]:
        if found := figures_of(values, worst):
            rows.append((what, f"mean {found['mean']:.4f}, worst {found['worst']:.4f} ({found['worst_tensor']})"))
    return {"verdict": verdict, "reached": not misses, "rows": rows}


class Made(NamedTuple):
    """One of several outputs."""

    name: str
    receipt: Mapping[str, Any]
    gates: Gates = Gates()


def batch_page(
    made: Sequence[Made], name: str, not_made: Mapping[str, str] = {}, samples: Sequence[Sample] = ()
) -> str:
    """A report of several outputs. `not_made`: of outputs that were asked for, too, what was in the way. `samples` are
    those of the run that has just ended. `BadCheckpoint` for a receipt that can't be understood."""
    try:
        outputs = [_output(*one) for one in made]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BadCheckpoint(f"{RECEIPT}: can't be understood: {type(exc).__name__}: {exc}") from exc
    most = max((one["own"] + one["shared"] for one in outputs), default=0) or 1
    for one in outputs:
        one |= {f"{key}_width": round(200 * one[key] / most) for key in ("own", "shared")}
    missed = sum(one["missed"] for one in outputs)
    verdict = "1 output is complete" if len(outputs) == 1 else f"{len(outputs)} outputs are complete"
    verdict += f"; {missed} of them miss a gate" if missed else ""
    verdict += f"; {len(not_made)} are not made" if not_made else ""
    shown = {"verdict": verdict, "reached": not (missed or not_made), "outputs": outputs, "not_made": not_made}
    return str(_template("batch.html").render(name=name, run=_run(samples), **shown))


def _output(name: str, receipt: Mapping[str, Any], gates: Gates) -> dict[str, Any]:
    figures, origin = fidelity_of(receipt), receipt["origin"]
    made = _Figures(receipt, figures)
    survival, error = figures_of(made.survivals, min), figures_of(made.errors, max)
    linked = [file for file, shard in receipt["of_the_base_alone"].items() if "link" in shard]
    whole = sum(file["bytes"] for file_name, file in receipt["files"].items() if file_name.endswith(".safetensors"))
    shared = sum(receipt["files"][file]["bytes"] for file in linked)
    return {
        "name": name,
        "adapter": origin["adapter_name"] or (f"sha256 {origin['adapter'][:12]}…" if origin["adapter"] else "none"),
        "mean": f"{survival['mean']:.4f}" if survival else "–",
        "worst": f"{survival['worst']:.4f}" if survival else "–",
        "error": f"{error['worst']:.4f}" if error else "–",
        "missed": bool(gates.misses(figures)),
        "own": whole - shared,
        "shared": shared,
    }


def benchmark_page(told: Mapping[str, Any], name: str) -> str:
    """A report of latency, from the JSON values of `convert benchmark`; `name` is what the output is called."""
    work, machine = told["workload"], told["machine"]
    how = [(key.replace("_", " "), value) for key, value in work.items()]
    how.append(("processors", machine["processors"]))
    how.append(("load of the machine as it began", f"{machine['load']:.1f}"))
    servers = [server | {"rows": _latencies(server, told["output"])} for server in told["servers"]]
    return str(_template("benchmark.html").render(name=name, servers=servers, how=how, notes=told["notes"]))


def evaluation_page(told: Mapping[str, Any], name: str, gates: QualityGates) -> str:
    """A report of what an output makes of a text, from the JSON values of `convert evaluate`, and from the gates that
    were asked for; `name` is what the output is called."""
    compared = told["comparison"] or {}
    figures: list[tuple[str, Any, str]] = [("perplexity", told["perplexity"], "")]
    if compared:
        figures += [
            ("perplexity of the 16-bit model", compared["perplexity"], ""),
            ("perplexity ratio", compared["ratio"], "max_perplexity_ratio"),
            ("KL divergence, nats a token", compared["divergence"], "max_kl"),
            ("top-1 agreement", compared["agreement"], "min_top1"),
        ]
    rows = []
    for what, figure, gate in figures:
        texts = [f"{figure['value']:.4f}", "–" if figure["error"] is None else f"{figure['error']:.4f}"]
        row: dict[str, Any] = {"what": what, "figures": texts, "gate": ""}
        if gate and (asked := getattr(gates, gate)) is not None:
            row["gate"] = f"{'at least' if gate.startswith('min_') else 'at most'} {asked:g}"
            row["reached"] = gates.reaches(gate, figure["value"])
        rows.append(row)
    how = [("tokens that were predicted", f"{told['tokens']:,}"), ("windows", f"{told['windows']:,}")]
    how += [("tokens of a window, at most", f"{told['window']:,}"), ("computed in", told["dtype"])]
    verdict = f"gates that are missed: {len(told['missed'])}" if told["missed"] else "every gate is reached"
    verdict = verdict if gates else "measured; no gate was asked for"
    shown = {"reached": not told["missed"], "notes": told["notes"], "compared": bool(compared)}
    return str(_template("evaluation.html").render(name=name, verdict=verdict, rows=rows, how=how, **shown))


def _latencies(server: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    most = max((of["token"]["median"] for of in server["latencies"].values()), default=1)
    rows = []
    for name, of in server["latencies"].items():
        shown = [(of["first_token"], 1000), (of["token"], 1000), (of["rate"], 1)]
        figures = [f"{k * one['median']:.1f} ({k * one['least']:.1f} to {k * one['most']:.1f})" for one, k in shown]
        ratios = server["ratios"].get(name)
        figures += [f"{ratios[figure]:.2f}" if ratios else "–" for figure in ("first_token", "token")]
        width = round(200 * of["token"]["median"] / most)
        rows.append({"name": f"{name}, {kind}" if name == "output" else name, "figures": figures, "width": width})
    return rows


class _Figures:
    """What a receipt says of its tensors."""

    def __init__(self, receipt: Mapping[str, Any], figures: Mapping[str, Fidelity]) -> None:
        tensors = receipt["tensors"]
        self.all = figures
        quantized = {name for name, tensor in tensors.items() if tensor["action"] == "quantize"}
        self.errors = {name: of.error for name, of in figures.items() if name in quantized}
        self.survivals = {name: of.survival for name, of in figures.items() if of.survival is not None}
        kept = sum(tensor["action"] == "keep" for tensor in tensors.values())
        self.counts = {"merged": len(self.survivals), "quantized": len(quantized), "kept": kept}


def _gates(gates: Gates, made: _Figures) -> list[dict[str, Any]]:
    rows = []
    for name, asked, values, worst in (
        ("survival at least", gates.min_survival, made.survivals, min),
        ("relative error at most", gates.max_error, {name: of.error for name, of in made.all.items()}, max),
    ):
        if asked is not None:
            found = figures_of(values, worst) or {"worst": math.nan, "worst_tensor": "none"}
            figure, tensor = found["worst"], found["worst_tensor"]
            reached = figure >= asked if worst is min else figure <= asked
            rows.append({"name": name, "asked": asked, "worst": f"{figure:.4f}", "tensor": tensor, "reached": reached})
    return rows


def _inputs(receipt: Mapping[str, Any]) -> list[dict[str, str]]:
    origin, rows = receipt["origin"], []
    for what, digest in (("base", origin["base_config"]), ("adapter", origin["adapter"])):
        if digest is None:
            continue
        name, commit = origin[f"{what}_name"], origin[f"{what}_commit"]
        of = "config" if what == "base" else "config and tensors"
        text = (name or f"a local {what}") + (f" at {commit[:12]}" if commit else "")
        text += f" (sha256 of its {of}: {digest[:12]}…)"
        # Of a folder the name is what its adapter calls it, and no commit is known.
        link = f"{_HUB}{quote(name)}/tree/{quote(commit)}" if name and commit else ""
        rows.append({"what": what, "text": text, "link": link})
    rows.append({"what": "device", "text": origin["device"], "link": ""})
    rows.append({"what": "fingerprint", "text": f"{receipt['fingerprint'][:12]}…", "link": ""})
    return rows


def _sizes(receipt: Mapping[str, Any]) -> list[dict[str, Any]]:
    output = sum(file["bytes"] for name, file in receipt["files"].items() if name.endswith(".safetensors"))
    base = (receipt.get("summary") or {}).get("bytes", {}).get("base")
    sizes = [("before: the base", base), ("after: this output", output)]
    most = max(base or 0, output, 1)
    return [
        {"what": what, "text": f"{size:,} bytes", "width": round(300 * size / most)}
        for what, size in sizes
        if size is not None
    ]


def _map(values: Mapping[str, float], figure: str, worst: Callable[..., float]) -> dict[str, Any] | None:
    """The worst value of each module in each layer, and how many tensors have which value."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not finite:
        return None
    cells: dict[tuple[int, str], list[float]] = {}
    for name, value in finite.items():
        cells.setdefault(_place(name), []).append(value)
    modules = list(dict.fromkeys(module for _, module in cells))
    low, high = min(finite.values()), max(finite.values())

    def cell(layer: int, module: str) -> dict[str, Any] | None:
        if (layer, module) not in cells:
            return None
        value = worst(cells[layer, module])
        badness = (high - value if worst is min else value - low) / ((high - low) or 1)
        alpha = _FAINTEST + (_STRONGEST - _FAINTEST) * badness
        return {"text": f"{value:.4f}", "alpha": f"{alpha:.2f}", "alarm": figure == "survival" and value < 0.5}

    rows = [
        {"layer": layer if layer >= 0 else "–", "cells": [cell(layer, module) for module in modules]}
        for layer in sorted({layer for layer, _ in cells})
    ]
    title = "Survival" if figure == "survival" else "Relative error"
    return {
        "title": title,
        "figure": title.lower(),
        "caption": f"The darker, the worse; from {low:.4f} to {high:.4f}. Of several tensors in one place, the worst.",
        "modules": modules,
        "rows": rows,
        "bins": _bins(list(finite.values()), low, high),
        "count": len(finite),
    }


def _place(name: str) -> tuple[int, str]:
    """Layer and module of a tensor; layer -1 outside of the layers. Experts of one layer are one module."""
    found = _LAYER.search(name)
    module = name.removesuffix(".weight")
    if found is None:
        return -1, module
    return int(found[1]), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module[found.end() :])


def _bins(values: list[float], low: float, high: float) -> list[dict[str, Any]]:
    step = (high - low) / BINS or 1e-9
    counts = [0] * BINS
    for value in values:
        counts[min(int((value - low) / step), BINS - 1)] += 1
    width, most = 640 / BINS, max(counts)
    return [
        {
            "x": round(number * width + 1, 1),
            "middle": round((number + 0.5) * width, 1),
            "y": round(170 - 150 * count / most, 1),
            "width": round(width - 2, 1),
            "height": round(150 * count / most, 1),
            "low": f"{low + number * step:.4f}",
            "high": f"{low + (number + 1) * step:.4f}",
            "count": count,
        }
        for number, count in enumerate(counts)
    ]


def _worst(made: _Figures) -> list[dict[str, str]]:
    def badness(name: str) -> tuple[float, float]:
        return (made.survivals.get(name, math.inf), -made.all[name].error)

    names = sorted(made.survivals or made.errors, key=badness)[:WORST]
    return [
        {
            "name": name,
            "survival": f"{made.survivals[name]:.4f}" if name in made.survivals else "–",
            "error": f"{made.all[name].error:.4f}",
        }
        for name in names
    ]


def _run(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Memory and rate over time; None where nothing is known of the run."""
    if not samples:
        return None
    rows = [
        {
            "name": stage.name,
            "seconds": f"{stage.seconds:.1f} s",
            "rate": f"{stage.done / stage.seconds / 1e6:,.0f} MB/s" if stage.done and stage.seconds else "–",
            "memory": f"{stage.memory / 1e6:,.0f} MB",
        }
        for stage in stages(samples)
    ]
    memory = [(sample.seconds, sample.memory / 1e6) for sample in samples]
    rate = [(seconds, bytes_a_second / 1e6) for seconds, bytes_a_second in rates(samples)]
    lines = [_line("Memory of the process", "MB", memory), _line("Bytes of the base a second", "MB/s", rate)]
    return {"stages": rows, "lines": [line for line in lines if line is not None]}


def _line(title: str, unit: str, points: Sequence[tuple[float, float]]) -> dict[str, str] | None:
    """A line over time; None where there are not two points."""
    if len(points) < 2:
        return None
    start, end = points[0][0], points[-1][0]
    most = max(value for _, value in points) or 1.0
    return {
        "title": title,
        "points": " ".join(
            f"{640 * (seconds - start) / ((end - start) or 1):.1f},{130 - 110 * value / most:.1f}"
            for seconds, value in points
        ),
        "most": f"{most:,.0f} {unit}",
        "start": f"{start:.1f} s",
        "end": f"{end:.1f} s",
    }


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader

    return Environment(autoescape=True, loader=PackageLoader("converter"), trim_blocks=True, lstrip_blocks=True)


def _template(name: str) -> Any:
    return _environment().get_template(name)

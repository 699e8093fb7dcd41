"""The benchmark's picture: time and peak memory against the size of the model.

    python benchmarks/picture.py build/bench/result.json docs/performance.png

draws it anew from an earlier run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import peak, plain_seconds, seconds

OURS, REFERENCE, PLAIN = "#1f6feb", "#b35900", "#777777"

Points = list[tuple[float, float]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw two panels into a PNG file."""
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    models = {name: model for name, model in result["models"].items() if name != "wide"}
    both = {name: model for name, model in models.items() if model["reference"]}
    figure = Figure(figsize=(9.5, 3.8), dpi=150, layout="constrained")
    time, memory = figure.subplots(1, 2)

    _line(time, [(float(n), seconds(m["reference"])) for n, m in both.items()], REFERENCE, "s", "merge, save, reload")
    _line(time, [(float(n), seconds(m["cold"])) for n, m in models.items()], OURS, "o", "convert")
    _line(time, [(float(n), plain_seconds(m)) for n, m in models.items()], PLAIN, "", "reading and writing alone")
    _finish(time, "time (s)", "{:.0f} s")

    _line(memory, [(float(n), peak(m["reference"]) / 1e9) for n, m in both.items()], REFERENCE, "s", "")
    _line(memory, [(float(n), peak(m["cold"]) / 1e9) for n, m in models.items()], OURS, "o", "")
    _line(memory, [(float(n), m["base_bytes"] / 1e9) for n, m in models.items()], PLAIN, "", "size of the base")
    _finish(memory, "peak memory (GB)", "{:g} GB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _line(axes: Axes, points: Points, colour: str, marker: str, label: str) -> None:
    if not points:
        return
    style: dict[str, Any] = {"marker": marker, "linewidth": 2} if marker else {"linestyle": "--", "linewidth": 1.2}
    axes.plot(*zip(*points, strict=True), color=colour, label=label or None, **style)
    if marker:
        for x, y in points:
            text = f"{y:.1f}" if y < 10 else f"{y:.0f}"
            axes.annotate(text, (x, y), (0, 7), textcoords="offset points", ha="center", color=colour, fontsize=9)


def _finish(axes: Axes, title: str, form: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("billions of parameters")
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 1.6)
    axes.yaxis.set_major_formatter(lambda value, _: form.format(value))
    axes.grid(axis="y", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best", fontsize=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)

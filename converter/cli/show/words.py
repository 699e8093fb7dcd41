"""Words and shapes of what is printed: amounts, durations, tables, JSON."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converter.cli.printing import as_options
from converter.errors import printable


def from_here(path: Path) -> Path:
    """A path as people would write it here: without the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def amount(count: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def share(done: int, total: int) -> str:
    """Bytes of a whole, for people: 0.3/1.2 GB."""
    whole, unit = amount(total).split()
    digits = len(whole.partition(".")[2])
    return f"{done * float(whole) / total if total else 0:.{digits}f}/{whole} {unit}"


def duration(seconds: float, *, whole: bool = False) -> str:
    """Seconds for people: 1 h 5 min. `whole`: without tenths, as a guess deserves."""
    if seconds < 60:
        return f"{seconds:.0f} s" if whole else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory() -> int:
    """The most memory that this process has had, in bytes (VmHWM)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def json_text(value: dict[str, Any]) -> str:
    """One JSON object, as it is printed."""
    return json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """The same without infinities, which configs may have and JSON has not, but for Python: as texts."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else f"{value}".replace("inf", "Infinity")


def text_of(lines: Iterable[str]) -> str:
    """Lines for a terminal: names of files, of classes and of outputs may have control characters."""
    return "".join(f"{printable(as_options(line))}\n" for line in lines)


def loader_lines(loaders: Mapping[str, Sequence[str]]) -> list[str]:
    """Which loaders take an output, by their rules, and why the others don't."""
    taking = [loader for loader, problems in loaders.items() if not problems]
    return [f"loaders that take it, by their rules: {', '.join(taking)}"] * bool(taking) + refusing_lines(loaders)


def refusing_lines(loaders: Mapping[str, Sequence[str]]) -> list[str]:
    """Why some loaders don't take an output."""
    return [
        f"not {loader}: {problems[0]}" + (f" ({len(problems)} in all)" if len(problems) > 1 else "")
        for loader, problems in loaders.items()
        if problems
    ]


def table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

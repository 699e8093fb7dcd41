"""The figures of `benchmark`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.show.words import table, text_of
from converter.latency.measure import OUTPUT

if TYPE_CHECKING:
    from converter.latency.benchmark import Benchmark
    from converter.latency.measure import Latency, Measured, Spread

HEAD = ("", "first token, ms", "time per token, ms", "tokens a second", "× first", "× token")


def benchmark_text(out: Path, found: Benchmark) -> str:
    """A table for each server: medians, least and most of them in brackets, ratios to the merged model; then notes."""
    work = found.workload
    requests = f"{work.rounds} × {work.requests} requests"
    lines = [f"{out}: {work.prompt_tokens} tokens in, {work.new_tokens} out, {requests}, medians (least to most)"]
    for server in found.servers:
        lines.append(f"through {server.through} {server.version}, on {server.device}; merged, 16 bits = 1.00")
        rows = [HEAD] + [_row(name, of, server, found.output) for name, of in server.latencies.items()]
        lines += [f"  {row}" for row in table(rows)]
        lines += [f"  not measured: {name}: {why}" for name, why in server.why_not.items()]
        lines += [f"  note: {note}" for note in server.notes]
    return text_of([*lines, *(f"note: {note}" for note in found.notes)])


def _row(name: str, of: Latency, server: Measured, kind: str) -> tuple[str, ...]:
    ratios = server.ratios.get(name, {})
    said = [f"{ratios[figure]:.2f}" if ratios else "–" for figure in ("first_token", "token")]
    figures = [_spread(of.first_token, 1000), _spread(of.token, 1000), _spread(of.rate)]
    return (f"{name}, {kind}" if name == OUTPUT else name, *figures, *said)


def _spread(of: Spread, times: float = 1) -> str:
    return f"{times * of.median:.1f} ({times * of.least:.1f} to {times * of.most:.1f})"


def benchmark_json(found: Benchmark) -> dict[str, Any]:
    """The same, as JSON values."""
    return {**asdict(found), "notes": found.notes}

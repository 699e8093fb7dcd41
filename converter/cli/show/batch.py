"""The outcomes of a batch, one line each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from converter.batch.forecast import Forecast
from converter.batch.jobs import group_key
from converter.batch.outcomes import Outcome
from converter.cli.printing import as_options
from converter.cli.show.plan import times
from converter.cli.show.words import amount, peak_memory, table, text_of
from converter.job import Job
from converter.quantize.measure import figures_of


def batch_text(
    outcomes: Sequence[Outcome], seconds: float, forecasts: Sequence[Forecast] = (), *, verbose: bool = False
) -> str:
    """The outcome of each job, a line each, and of the whole batch; of a dry run, also what it would take."""
    rows: list[tuple[str, ...]] = [("output", "", "bytes", "shared", "by", "survival", "")]
    for outcome in outcomes:
        figures = _batch_figures(outcome)
        survival = figures["survival"]
        rows.append(
            (
                outcome.job.label,
                outcome.status,
                amount(outcome.output_bytes) if outcome.output_bytes else "",
                amount(outcome.shared_bytes) if outcome.shared_bytes else "",
                outcome.link,
                "" if survival is None else f"{survival['mean']:.4f}, worst {survival['worst']:.4f}",
                outcome.why,
            )
        )
    lines = table(rows)
    if verbose:
        lines += [f"note: {outcome.job.label}: {note}" for outcome in outcomes for note in outcome.notes]
    else:
        notes = Counter(note for outcome in outcomes for note in outcome.notes)
        lines += [f"note, of {count} outputs: {note}" for note, count in notes.items()]
    for found in forecasts:
        passes = "one pass" if found.passes == 1 else f"{found.passes} passes"
        lines.append(f"{found.outputs} of {found.base} in {passes} over it: write at most {amount(found.disk)}")
        lines += [f"memory: at most {amount(found.memory)} above the libraries", times(found.estimate)]
    lines.append(f"disk: {amount(_disk(outcomes))} in all, what is shared counted once where it is linked")
    counts = Counter(outcome.status for outcome in outcomes)
    whole = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines.append(f"{whole} in {seconds:.1f} s, peak memory {amount(peak_memory())}")
    return text_of(lines)


def batch_json(outcomes: Sequence[Outcome], seconds: float, forecasts: Sequence[Forecast] = ()) -> dict[str, Any]:
    """The same, as JSON values."""
    return {
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "counts": dict(Counter(outcome.status for outcome in outcomes)),
        "outputs": [
            {
                "out": str(outcome.job.out),
                "adapter": _adapters(outcome.job),
                "status": outcome.status,
                "message": as_options(outcome.message),
                "fingerprint": outcome.fingerprint,
                "output_bytes": outcome.output_bytes,
                "shared_bytes": outcome.shared_bytes,
                "link": outcome.link,
                **_batch_figures(outcome),
                "notes": list(outcome.notes),
                "checked": outcome.checked,
            }
            for outcome in outcomes
        ],
        **({"forecasts": [found.as_json() for found in forecasts]} if forecasts else {}),
    }


def _disk(outcomes: Sequence[Outcome]) -> int:
    """Bytes of the outputs; what several of one base and recipe share is counted once unless it is copied."""
    whole = 0
    shared: dict[tuple[str, str, str], int] = {}
    for outcome in outcomes:
        if outcome.link == "copy":
            whole += outcome.output_bytes
        else:
            whole += outcome.output_bytes - outcome.shared_bytes
            key = group_key(outcome.job)
            shared[key] = max(shared.get(key, 0), outcome.shared_bytes)
    return whole + sum(shared.values())


def _adapters(job: Job) -> str | list[str] | None:
    if job.adapter is None or isinstance(job.adapter, str | os.PathLike):
        return None if job.adapter is None else str(job.adapter)
    return [str(one) for one in job.adapter]


def _batch_figures(outcome: Outcome) -> dict[str, Any]:
    """Of the tensors that the adapter changed."""
    survivals = {name: f.survival for name, f in outcome.fidelity.items() if f.survival is not None}
    errors = {name: f.error for name, f in outcome.fidelity.items() if f.survival is not None}
    return {"error": figures_of(errors, max), "survival": figures_of(survivals, min)}

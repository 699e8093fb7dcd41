"""What people and programs are told: the plan, the progress, the summary."""

from __future__ import annotations

import json
import math
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO, cast

from converter.batch.forecast import Forecast
from converter.batch.jobs import group_key
from converter.batch.members import Outcome
from converter.errors import printable
from converter.observer import Progress
from converter.pipeline import Report
from converter.plan.estimate import WRITE_RATE, DryRun, Estimate
from converter.plan.plan import Plan, TensorPlan
from converter.verify import Verification

Clock = Callable[[], float]


def plan_text(dry_run: DryRun, *, verbose: bool = False) -> str:
    """The plan as a table: alike tensors in one line, or every tensor."""
    plan = dry_run.plan
    rows: list[tuple[str, ...]] = [("tensors", "", "shape", "from", "to", "what happens")]
    rows += [_plan_row(tensors) for tensors in _alike(plan.tensors(), one_by_one=verbose)]
    lines = _table(rows)
    lines += [""]
    lines += [f"note: {note}" for note in plan.notes]
    skipped = (plan.config.get("quantization_config") or {}).get("llm_int8_skip_modules")
    if skipped:
        lines.append(
            f"kept in 16 bits, by name in the config: {', '.join(skipped[:6])}{' …' if len(skipped) > 6 else ''}"
        )
    files = f"{len(plan.shards)} shard{'s' if len(plan.shards) > 1 else ''}"
    lines += [
        f"{plan.class_name}, {plan.recipe.quant_type}, {plan.recipe.dtype}, merged in {plan.recipe.merge_precision}",
        f"read {amount(plan.base_bytes)}, write at most {amount(plan.output_bytes)} in {files}, "
        f"and beside them {', '.join(side.name for side in plan.side_files) or 'no other files'}",
        f"memory: at most {amount(plan.memory)} above the libraries; disk: {amount(plan.output_bytes)}",
        _times(dry_run.estimate),
        "dry run: nothing was written",
    ]
    return _text(lines)


def _times(found: Estimate) -> str:
    read, compute, write = (duration(seconds) for seconds in (found.read, found.compute, found.write))
    return (
        f"time: about {duration(found.seconds)}: reading {read} and computing {compute} by samples taken now, "
        f"writing {write} to a disk that takes {amount(WRITE_RATE)}/s; they overlap"
        + (f"; before them the sha256 of the base, {duration(found.check)}" if found.check else "")
    )


def summary(report: Report, seconds: float, *, verbose: bool = False) -> str:
    """What was done, in a few lines."""
    if report.nothing_to_do:
        return _text([f"{report.out}: made of the same inputs by the same recipe already; nothing to do"])
    figures = summary_json(report, seconds)
    lines = []
    if verbose:
        rows: list[tuple[str, ...]] = [("tensor", "error", "survival")]
        for name, fidelity in report.fidelity.items():
            survival = "" if fidelity.survival is None else f"{fidelity.survival:.4f}"
            rows.append((name, f"{fidelity.error:.4f}", survival))
        lines += [*_table(rows), ""]
    lines.append(
        f"{report.out}: {amount(figures['output_bytes'])} from {amount(figures['base_bytes'])} "
        f"in {seconds:.1f} s, peak memory {amount(figures['peak_memory_bytes'])}"
    )
    lines.append(", ".join(f"{count} {what}" for what, count in figures["tensors"].items() if count))
    if figures["computed_by"] != "kernels":
        lines.append(f"computed by {figures['computed_by']}")
    for key, text in (("error", "relative error"), ("survival", "survival of the delta")):
        if figure := figures[key]:
            lines.append(f"{text}: mean {figure['mean']:.4f}, worst {figure['worst']:.4f} ({figure['worst_tensor']})")
    if stated := Counter(by for files in report.checked.values() for by in files.values()):
        lines.append(f"sha256 checked: {', '.join(f'{count} by {by}' for by, count in sorted(stated.items()))}")
    lines += [f"note: {note}" for note in report.plan.notes]
    return _text(lines)


def summary_json(report: Report, seconds: float) -> dict[str, Any]:
    """What was done, as JSON values: bytes, seconds, tensors by what happened, mean and worst figures."""
    quantized = {t.name for t in report.plan.tensors() if t.action == "quantize"}
    errors = {name: f.error for name, f in report.fidelity.items() if name in quantized}
    survivals = {name: f.survival for name, f in report.fidelity.items() if f.survival is not None}
    counts = report.plan.counts()
    sizes = [path.stat().st_size for path in report.out.glob("*.safetensors")]
    return {
        "out": str(report.out),
        "nothing_to_do": report.nothing_to_do,
        "fingerprint": report.fingerprint,
        "base_bytes": report.plan.base_bytes,
        "output_bytes": sum(sizes),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "predicted_memory_bytes": report.plan.memory,
        "computed_by": _computed_by(report.plan),
        "tensors": {
            "merged": counts.get("merged", 0),
            "quantized": counts.get("quantize", 0),
            "kept": counts.get("keep", 0),
            "replaced": counts.get("replaced", 0),
        },
        "error": _figures(errors, max),
        "survival": _figures(survivals, min),
        "notes": list(report.plan.notes),
        "checked": report.checked,
    }


def batch_text(
    outcomes: Sequence[Outcome], seconds: float, forecasts: Sequence[Forecast] = (), *, verbose: bool = False
) -> str:
    """What came of each job, a line each, and of the whole; of a dry run, also what it would take."""
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
                outcome.message,
            )
        )
    lines = _table(rows)
    if verbose:
        lines += [f"note: {outcome.job.label}: {note}" for outcome in outcomes for note in outcome.notes]
    else:
        notes = Counter(note for outcome in outcomes for note in outcome.notes)
        lines += [f"note, of {count} outputs: {note}" for note, count in notes.items()]
    for found in forecasts:
        passes = "one pass" if found.passes == 1 else f"{found.passes} passes"
        lines.append(f"{found.outputs} of {found.base} in {passes} over it: write at most {amount(found.disk)}")
        lines += [f"memory: at most {amount(found.memory)} above the libraries", _times(found.estimate)]
    lines.append(f"disk: {amount(_disk(outcomes))} in all, what is shared counted once where it is linked")
    counts = Counter(outcome.status for outcome in outcomes)
    whole = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines.append(f"{whole} in {seconds:.1f} s, peak memory {amount(peak_memory())}")
    return _text(lines)


def batch_json(outcomes: Sequence[Outcome], seconds: float, forecasts: Sequence[Forecast] = ()) -> dict[str, Any]:
    """The same, as JSON values."""
    return {
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "counts": dict(Counter(outcome.status for outcome in outcomes)),
        "outputs": [
            {
                "out": str(outcome.job.out),
                "adapter": None if outcome.job.adapter is None else str(outcome.job.adapter),
                "status": outcome.status,
                "message": outcome.message,
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


def _batch_figures(outcome: Outcome) -> dict[str, Any]:
    """Of the tensors that the adapter changed."""
    survivals = {name: f.survival for name, f in outcome.fidelity.items() if f.survival is not None}
    errors = {name: f.error for name, f in outcome.fidelity.items() if f.survival is not None}
    return {"error": _figures(errors, max), "survival": _figures(survivals, min)}


def verification_text(out: Path, found: Verification) -> str:
    """What was looked at, and what is wrong."""
    looked = [f"{found.tensors} tensors read"]
    if found.has_receipt:
        looked.insert(0, f"{found.files} files as the receipt says" if found.is_good else f"{found.files} files")
    if found.recomputed:
        looked.append(f"{found.recomputed} made again and compared")
    lines = [f"{out}: {', '.join(looked)}: {'good' if found.is_good else f'{len(found.problems)} problems'}"]
    if not found.has_receipt:
        lines.append("note: no receipt; not made by this tool, or not finished")
    return _text([*lines, *found.problems])


def verification_json(found: Verification) -> dict[str, Any]:
    """The same, as JSON values."""
    return {"good": found.is_good, **asdict(found)}


class _Terminal:
    """Standard error, for a bar: the terminal may go meanwhile, which is no reason to fail."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[tuple[Callable[[Progress], None], Clock]]:
    """A function to report progress to, and a clock of seconds since the start. The bar needs a terminal."""
    started = time.monotonic()

    def clock() -> float:
        return time.monotonic() - started

    if not shown or not sys.stderr.isatty():
        yield (lambda _: None), clock
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Bar(*columns, console=Console(file=cast(TextIO, _Terminal(sys.stderr))), transient=True) as bar:
        task = bar.add_task("planning", total=None, memory="")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.stage,
                completed=progress.done,
                total=progress.total,
                memory=f"{amount(_memory())} of memory",
            )

        yield show, clock


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


def amount(count: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 1 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory() -> int:
    """The most memory that this process has had, in bytes (VmHWM)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _computed_by(plan: Plan) -> str:
    if plan.device == "cpu" and plan.recipe.four_bit:
        return "kernels" if plan.resources.kernels else "bitsandbytes, several times slower: numba is not installed"
    return f"torch and bitsandbytes on {plan.device}"


def _figures(values: dict[str, float], worst: Callable[..., str]) -> dict[str, Any] | None:
    if not values:
        return None
    tensor = worst(values, key=lambda name: values[name])
    return {"mean": statistics.fmean(values.values()), "worst": values[tensor], "worst_tensor": tensor}


@dataclass(frozen=True)
class _Likeness:
    name: str
    what: str
    shape: tuple[int, ...]
    source: str
    target: str


def _likeness(tensor: TensorPlan) -> _Likeness:
    what = []
    if tensor.origin == "adapter":
        what.append("replaced by the adapter's")
    if tensor.change is not None and tensor.change.label:
        what.append(tensor.change.label)
    if tensor.action == "quantize":
        what.append("quantize" + (", transposed" if tensor.transpose else ""))
    else:
        what.append("copy" if tensor.is_copy else "keep")
    target = tensor.outputs[0].dtype if tensor.action == "keep" else "quantized"
    return _Likeness(re.sub(r"\d+", "*", tensor.name), ", ".join(what), tensor.shape, tensor.source.dtype, target)


def _alike(tensors: Iterator[TensorPlan], *, one_by_one: bool) -> Iterator[list[TensorPlan]]:
    if one_by_one:
        yield from ([tensor] for tensor in tensors)
        return
    order = sorted(tensors, key=lambda tensor: (_likeness(tensor).name, repr(_likeness(tensor))))
    for _, group in groupby(order, key=_likeness):
        yield list(group)


def _plan_row(tensors: list[TensorPlan]) -> tuple[str, ...]:
    like = _likeness(tensors[0])
    name = like.name if len(tensors) > 1 else tensors[0].name
    shape = " × ".join(map(str, like.shape)) or "scalar"
    return name, f"× {len(tensors)}" if len(tensors) > 1 else "", shape, like.source, like.target, like.what


def _text(lines: Iterable[str]) -> str:
    """Lines for a terminal: names of files, of classes and of outputs may have control characters."""
    return "".join(f"{printable(line)}\n" for line in lines)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

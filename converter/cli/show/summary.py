"""The summary of a conversion."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import asdict
from typing import Any

from converter.cli.show.words import amount, peak_memory, refusing_lines, table, text_of
from converter.pipeline import Report
from converter.plan.plan import Plan
from converter.quantize.formats import format_of
from converter.quantize.measure import calibrated_in
from converter.read.stored.stored import is_stored
from converter.seal.receipt import summary_of

_LOW_SURVIVAL = 0.5
"""Mean survival below which a user of a quantized base is told of the 16-bit one."""


def summary(report: Report, seconds: float, *, verbose: bool = False) -> str:
    """What was done, in a few lines."""
    if report.nothing_to_do:
        return text_of([f"{report.label}: made of the same inputs by the same recipe already; nothing to do"])
    figures = summary_json(report, seconds)
    lines = []
    if verbose:
        rows: list[tuple[str, ...]] = [("tensor", "error", "survival")]
        for name, fidelity in report.fidelity.items():
            survival = "" if fidelity.survival is None else f"{fidelity.survival:.4f}"
            rows.append((name, f"{fidelity.error:.4f}", survival))
        lines += [*table(rows), ""]
    lines.append(
        f"{report.label}: {amount(figures['output_bytes'])} from {amount(figures['base_bytes'])} "
        f"in {seconds:.1f} s, peak memory {amount(figures['peak_memory_bytes'])}"
    )
    lines.append(", ".join(f"{count} {what}" for what, count in figures["tensors"].items() if count))
    if figures["computed_by"] != "kernels":
        lines.append(f"computed by {figures['computed_by']}")
    names = {
        "error": "relative error",
        "survival": "survival of the delta",
        "output_error": "error of outputs, on the text",
    }
    for key, text in names.items():
        if figure := figures[key]:
            lines.append(f"{text}: mean {figure['mean']:.4f}, worst {figure['worst']:.4f} ({figure['worst_tensor']})")
    if figures["output_error"] and (left := figures["tensors"]["quantized"] - len(calibrated_in(report.fidelity))):
        lines.append(f"{left} of the quantized weights have the nearest codes: no layer calls them with the text")
    survival = figures["survival"]
    if survival and survival["mean"] < _LOW_SURVIVAL and any(is_stored(t.source) for t in report.plan.tensors()):
        lines.append(
            f"only {survival['mean']:.0%} of the adapter's change survived on this quantized base: merge it into the "
            "16-bit model that the base was made from"
        )
    if stated := Counter(by for files in report.checked.values() for by in files.values()):
        lines.append(f"sha256 checked: {', '.join(f'{count} by {by}' for by, count in sorted(stated.items()))}")
    if (found := report.agreement) is not None:
        lines.append(
            f"{found.tiles} tiles of {report.plan.device} made again on the CPU: at most {found.codes:.3%} of a tile's "
            f"codes differ, scales by at most {found.scales:.2g} of their value"
        )
    lines += [f"note: {note}" for note in report.plan.notes]
    lines += refusing_lines(report.plan.loaders)
    if report.store is not None:
        return text_of([*lines, f"published: {report.store.seen_at}"])
    publish = f"hf upload ORG/NAME {shlex.quote(str(report.out))}"
    return text_of([*lines, f"load with: {_load(report)}", f"publish with: {publish}"])


def _load(report: Report) -> str:
    """What loads the output."""
    name, library = report.plan.class_name, format_of(report.plan.recipe).library
    if library == "compressed-tensors" and name.endswith("ForCausalLM"):
        return f"vllm serve {shlex.quote(str(report.out))}"
    loader = "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name
    return f"transformers.{loader}.from_pretrained({json.dumps(str(report.out), ensure_ascii=False)})"


def summary_json(report: Report, seconds: float) -> dict[str, Any]:
    """What was done, as JSON values: bytes, seconds, tensors by what happened, mean and worst figures."""
    whole = summary_of(report.plan, report.fidelity)
    return {
        "out": report.label,
        "nothing_to_do": report.nothing_to_do,
        "fingerprint": report.fingerprint,
        "base_bytes": report.plan.base_bytes,
        "output_bytes": report.output_bytes,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "predicted_memory_bytes": report.plan.memory,
        "computed_by": _computed_by(report.plan),
        "tensors": whole["tensors"],
        "error": whole["relative_error"],
        "survival": whole["survival"],
        "output_error": whole.get("output_error"),
        "notes": list(report.plan.notes),
        "checked": report.checked,
        "made_again_on_the_cpu": None if report.agreement is None else asdict(report.agreement),
    } | ({"seen_at": report.store.seen_at} if report.store is not None else {})


def _computed_by(plan: Plan) -> str:
    library = format_of(plan.recipe).library
    if plan.device == "cpu" and (plan.recipe.four_bit or library == "compressed-tensors"):
        by = "bitsandbytes" if plan.recipe.four_bit else "torch"
        return "kernels" if plan.resources.kernels else f"{by}, several times slower: numba is not installed"
    return f"torch and bitsandbytes on {plan.device}"

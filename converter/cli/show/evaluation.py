"""The figures of `evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.cli.show.words import table, text_of
from converter.evaluation import Evaluation
from converter.layers.figures import Estimate


def evaluation_text(out: Path, found: Evaluation) -> str:
    """Every figure with its standard error, then the gates that are missed."""
    windows = "1 window" if found.windows == 1 else f"{found.windows:,} windows"
    lines = [f"{out}: {found.tokens:,} tokens predicted, in {windows} of at most {found.window:,}"]
    rows: list[tuple[str, ...]] = [("perplexity", _figure(found.perplexity))]
    if (other := found.comparison) is not None:
        rows += [
            ("of the 16-bit model", _figure(other.perplexity)),
            ("perplexity ratio", _figure(other.ratio)),
            ("KL divergence, nats a token", _figure(other.divergence)),
            ("top-1 agreement", _figure(other.agreement)),
        ]
    lines += [f"  {row}" for row in table(rows)]
    lines += [f"note: {note}" for note in found.notes]
    if found.windows == 1:
        lines.append("note: one window, so there is no standard error: give more text, or a smaller --window")
    lines += [f"missed: {miss}" for miss in found.missed]
    return text_of(lines)


def _figure(estimate: Estimate) -> str:
    """Four decimal places, and more where the figure is small; ± its standard error."""
    digits = 4 if abs(estimate.value) >= 0.1 else 6
    text = f"{estimate.value:.{digits}f}"
    return text if estimate.error is None else f"{text} ± {estimate.error:.{digits}f}"


def evaluation_json(found: Evaluation) -> dict[str, Any]:
    """The same, as JSON values."""
    return {"good": found.is_good, **asdict(found)}

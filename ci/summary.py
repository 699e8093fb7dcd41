"""The page of a CI run: what each step of each output found, as Markdown, from the state file of `convert pipeline`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STEPS = ("fetch", "convert", "verify", "gates", "publish", "announce")


def page(state: dict[str, Any]) -> str:
    """A table of all outputs, then the reason of each failure."""
    lines = [
        "| output | reached | error, worst | survival, worst | KL divergence | where |",
        "|---|---|---|---|---|---|",
    ]
    reasons = []
    for out, steps in state["outputs"].items():
        last = next((name for name in reversed(STEPS) if name in steps), "nothing")
        step = steps.get(last, {})
        reached = f"**{last} failed**" if step.get("state") == "failed" else last
        found = steps.get("convert", {}).get("figures", {})
        kl = steps.get("gates", {}).get("figures", {}).get("evaluation", {}).get("comparison", {}).get("divergence", {})
        where = steps.get("publish", {}).get("figures", {}).get("seen_at", "")
        figures = [(found.get(key) or {}).get("worst") for key in ("relative_error", "survival")] + [kl.get("value")]
        cells = [out, reached, *(_figure(one) for one in figures), where]
        lines.append(f"| {' | '.join(_cell(one) for one in cells)} |")
        if step.get("reason"):
            reasons.append(f"- {_cell(out)}: {_cell(step['reason'])}")
    return "\n".join(["## convert", "", *lines, *([""] if reasons else []), *reasons]) + "\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    """In a cell of a table; names and reasons may have anything in them."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'").split())


def main(file: str) -> None:
    path = Path(file)
    nothing = "## convert\n\nNothing was begun; see the log.\n"
    print(page(json.loads(path.read_text())) if path.exists() else nothing, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])

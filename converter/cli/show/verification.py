"""The findings of `verify`."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from converter.cli.show.words import loader_lines, text_of
from converter.verification import Verification

MOST_OF_A_KIND = 10
"""Problems that are listed; of the others, only how many there are."""
_VARIES = re.compile(r"[0-9a-f]{12}…|\d[\d,]*|\[[\d, ]*\]|\b(?:F|BF|I|U)\d+\b")


def verification_text(out: str, found: Verification) -> str:
    """What was checked, and what is wrong."""
    checked = [f"{found.tensors} tensors read"]
    if found.has_receipt:
        checked.insert(0, f"{found.files} files as the receipt says" if not found.problems else f"{found.files} files")
    if found.recomputed:
        checked.append(f"{found.recomputed} made again and compared")
    count = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
    good = "good" if found.is_converted else "whole, but no conversion"
    verdict = (good if found.is_good else "a gate is missed") if not found.problems else count
    lines = [f"{out}: {', '.join(checked)}: {verdict}"]
    if not found.is_converted:
        lines.append("note: no receipt, and no weight is quantized: a model as it was saved, or merged by another tool")
    elif not found.has_receipt:
        lines.append("note: no receipt; not made by this tool, or not finished")
    elif not found.recomputed:
        lines.append(f"note: not compared with its base and adapter; to compare: {_how_to_compare(out, found)}")
    lines += [*_listed(found.problems), *_first(found.missed)]
    return text_of([*lines, *([] if found.problems else loader_lines(found.loaders))])


def _how_to_compare(out: str, found: Verification) -> str:
    if found.base_name is not None and (found.adapter_name is not None or not found.has_adapter):
        return f"convert verify {out} --compare"
    adapter = f" --adapter {found.adapter_name or 'ADAPTER'}" if found.has_adapter else ""
    return f"convert verify {out} --base {found.base_name or 'BASE'}{adapter}"


def _listed(problems: list[str]) -> list[str]:
    """Problems by kind, the first ones of each."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_VARIES.sub("#", problem.partition(": ")[2]), []).append(problem)
    lines = []
    for alike in kinds.values():
        lines += _first(alike)
    return lines


def _first(alike: list[str]) -> list[str]:
    more = len(alike) - MOST_OF_A_KIND
    return alike[:MOST_OF_A_KIND] + ([f"… and {more:,} more like these"] if more > 0 else [])


def verification_json(found: Verification) -> dict[str, Any]:
    """The same, as JSON values."""
    return {"good": found.is_good, **asdict(found)}

"""The findings of `verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.cli.show.words import text_of
from converter.verify import Verification


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
    return text_of([*lines, *found.problems])


def verification_json(found: Verification) -> dict[str, Any]:
    """The same, as JSON values."""
    return {"good": found.is_good, **asdict(found)}

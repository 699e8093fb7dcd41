"""What a pipeline did: a table of steps, JSON, and a line of JSON for each event."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from converter.cli.printing import as_options, print_text
from converter.cli.show.words import duration, table, text_of
from converter.delivery.delivery import Event
from converter.delivery.output import Output
from converter.delivery.state import STEPS, State, finite
from converter.write.durable import writing

_SAID = {"done": "done", "skipped": "before", "failed": "failed", "began": "begun"}


class EventLines:
    """Writes events to a file, to stdout (`-`), or nowhere (None)."""

    def __init__(self, place: str | None) -> None:
        self._place, self._stack = place, ExitStack()

    def __enter__(self) -> Self:
        self._file = None
        if self._place not in (None, "-"):
            path = Path(str(self._place)).expanduser()
            with writing(path):
                self._file = self._stack.enter_context(path.open("a", encoding="utf-8"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, event: Event) -> None:
        """Add a line, at once."""
        if self._place is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = {"time": now, "event": "step", "out": event.out, "step": event.step, "state": event.state}
        told |= {"result": finite(event.result)} if event.result else {}
        told |= {"reason": as_options(event.reason)} if event.reason else {}
        line = json.dumps(told) + "\n"
        if self._file is None:
            print_text(line)
            return
        with writing(Path(self._file.name)):
            self._file.write(line)
            self._file.flush()


def pipeline_text(outputs: Sequence[Output], state: State, seconds: float) -> str:
    """What was done of each output, and where it is."""
    if all(output.had_nothing_to_do for output in outputs):
        return text_of([f"{output.label}: published already; nothing to do" for output in outputs])
    rows: list[tuple[str, ...]] = [("output", *STEPS)]
    for output in outputs:
        before = "before" if output.error is None else ""
        rows.append((output.label, *(_SAID[output.did[name]] if name in output.did else before for name in STEPS)))
    lines = table(rows)
    for output in outputs:
        if output.error is None:
            lines.append(f"published: {output.result(state)['seen_at']}")
    return text_of([*lines, f"{state.path} has the figures of each step; {duration(seconds)}"])


def pipeline_json(outputs: Sequence[Output], state: State, seconds: float) -> dict[str, Any]:
    """The same, as JSON values, with every figure."""
    return {
        "seconds": round(seconds, 3),
        "state": str(state.path),
        "outputs": [
            {
                "out": output.label,
                "published": output.error is None,
                "nothing_to_do": output.had_nothing_to_do,
                "did": dict(output.did),
                "error": None if output.error is None else as_options(str(output.error)),
                "steps": state.as_json(output.noted_as),
            }
            for output in outputs
        ],
    }

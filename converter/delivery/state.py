"""What is done of each output's steps, in a file: a later run skips it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from converter.errors import BadOutput, ConverterError
from converter.read.folder import LocalFolder
from converter.read.strict_json import read_json
from converter.write.durable import LOCAL_DISK

STATE = "state.json"
FORMAT = 1
Name = Literal["fetch", "convert", "verify", "gates", "publish", "announce"]
STEPS: tuple[Name, ...] = ("fetch", "convert", "verify", "gates", "publish", "announce")


@dataclass(frozen=True)
class Step:
    """How a step of an output ended."""

    state: Literal["done", "failed"]
    key: str
    """sha256 of all that it depends on: with the same key, what is done need not be done again."""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    """Why it failed."""
    exit_code: int = 0


class State:
    """The state file of a folder. `BadOutput` if something else has its name."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        self._outputs: dict[str, dict[str, Step]] = {}
        if not os.path.lexists(self.path):
            return
        try:
            stated = read_json(LocalFolder(folder), STATE)
            if stated["format"] != FORMAT:
                raise KeyError(stated["format"])
            for out, steps in stated["outputs"].items():
                self._outputs[out] = {name: Step(**step) for name, step in steps.items() if name in STEPS}
        except (ConverterError, KeyError, TypeError, AttributeError) as exc:
            raise BadOutput(f"{self.path}: not a state file of this version; delete it to begin anew") from exc

    def step(self, out: str, name: Name) -> Step | None:
        return self._outputs.get(out, {}).get(name)

    def is_done(self, out: str, name: Name, key: str) -> bool:
        """Whether this step was done, and all that it depends on is as it was then."""
        step = self.step(out, name)
        return step is not None and step.state == "done" and step.key == key

    def put(self, out: str, name: Name, step: Step) -> None:
        """Note how a step ended, durably. What came after it, in an earlier run, no longer counts."""
        steps = self._outputs.setdefault(out, {})
        for later in STEPS[STEPS.index(name) :]:
            steps.pop(later, None)
        steps[name] = replace(step, figures=finite(step.figures))
        self._write()

    def as_json(self, out: str) -> dict[str, Any]:
        """The steps of an output, as JSON values."""
        return {name: _without_empty(asdict(step)) for name, step in self._outputs.get(out, {}).items()}

    def _write(self) -> None:
        whole = {"format": FORMAT, "outputs": {out: self.as_json(out) for out in self._outputs}}
        LOCAL_DISK.put(self.path, (json.dumps(whole, indent=2, allow_nan=False) + "\n").encode())


def key_of(*parts: Any) -> str:
    """sha256 of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def finite(value: Any) -> Any:
    """JSON values, without infinities and what is no number: JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_empty(step: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in step.items() if name in ("state", "key", "seconds") or value}

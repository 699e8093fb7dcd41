"""A file of jobs for the bundled model, and what delivers it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from converter import Resources
from converter.batch.job_file import read_file
from converter.delivery.delivery import DeliveryObserver, Event, deliver, exit_code_of
from converter.delivery.output import Output
from converter.job import RunOptions
from tests.conftest import REPOSITORY
from tests.limits import HANG

BASE, ADAPTER = REPOSITORY / "fixtures" / "tiny-base", REPOSITORY / "fixtures" / "tiny-adapter"
TEXT = "def convert(base, adapter):\n    return merge(base, adapter)\n" * 8
ONE_THREAD = RunOptions(Resources(threads=1))


class Delivered(NamedTuple):
    outputs: list[Output]
    code: int
    steps: list[tuple[str, str]]
    """Step and how it went, in their order, without those that began."""
    events: list[Event]


def job_file(folder: Path, out: str, **values: Any) -> Path:
    """`job.toml` for one job. A value that is a dict is a table."""
    (folder / "text.txt").write_text(TEXT)
    plain = {"base": str(BASE), "adapter": str(ADAPTER), "out": out}
    plain |= {name: value for name, value in values.items() if not isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file = folder / "job.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def delivered(file: Path, work: Path, options: RunOptions = ONE_THREAD) -> Delivered:
    """Deliver what a file asks for, in this process."""
    events: list[Event] = []
    outputs, _ = deliver(read_file(file, stores=True), work, options, DeliveryObserver(event=events.append))
    steps = [(event.step, event.state) for event in events if event.state != "began"]
    return Delivered(outputs, exit_code_of(outputs), steps, events)


def killed(file: Path, work: Path, step: str, state: str) -> int:
    """The code with which a process ends that kills itself there."""
    command: Sequence[object] = [sys.executable, "-m", "tests.delivery.killed", file, work, step, state]
    ran = subprocess.run([*map(str, command)], cwd=REPOSITORY, capture_output=True, timeout=HANG, check=False)
    return ran.returncode

"""A batch under the faults of a process: each output is absent or whole, and the same command then succeeds."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from chaos.processes import Scene, errors, instants, kills, new
from chaos.trial import Lab, Row

KIND = "a batch of three"
ERRORS = [
    ("ENOSPC", "pwrite64 write fallocate mkdir link linkat"),
    ("EIO", "pwrite64 fsync fdatasync rename renameat2 ftruncate unlink link linkat"),
    ("EIO", "pread64 preadv read"),
]


def _one_made(lab: Lab, place: Path) -> Path:
    """The first output is there already, and gives its shards to the others."""
    out, name = new(lab, place), next(iter(lab.adapters))
    shutil.copytree(lab.place / "second" / name, out / name)
    return out


SCENES: list[Scene] = [(KIND, new, ()), (f"{KIND} of which one is made", _one_made, ())]


def batch(lab: Lab, every: int, every_error: int, count: int) -> Iterator[Row]:
    """Kills at every call, errors from some, signals at any instant."""
    yield from kills(lab, every, SCENES, "batch")
    yield from errors(lab, every_error, ERRORS, "batch")
    yield from instants(lab, count, (signal.SIGKILL, signal.SIGTERM), "batch")

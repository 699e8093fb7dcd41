"""What the workers of a cluster do in a test: a part, with marks of how far it is, held as long as other marks are.

The folder of the marks is `$MARKS`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converter import BatchOptions, Job, Outcome
from converter.batch.cluster.worker import convert_part
from converter.batch.run import Access
from converter.observer import Progress
from converter.plan.inputs import Base
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from converter.seal.destination import Destination
from converter.seal.staging import Staging


def marks() -> Path:
    return Path(os.environ["MARKS"])


def here() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


class SlowFolder(LocalFolder):
    """Marks that tiles are read, and takes its time for each while `slow` is marked."""

    def expect(self, name: str, offset: int) -> None:
        (marks() / f"reading on {here()}").touch()
        if (marks() / "slow").exists():
            time.sleep(0.2)
        super().expect(name, offset)


class HeldStaging(Staging):
    """Marks that OUT is about to be sealed, and waits while `hold OUT` is marked."""

    def __init__(self, destination: Destination, *rest: Any, **how: Any) -> None:
        super().__init__(destination, *rest, **how)
        self._name = destination.out.name

    def seal(self, *what: Any) -> None:
        (marks() / f"sealing {self._name} on {here()}").touch()
        while (marks() / f"hold {self._name}").exists():
            time.sleep(0.05)
        super().seal(*what)


def slow_base(reference: Path, revision: str | None = None, **how: Any) -> Base:
    opened = Base(reference, revision, **how)
    opened.checkpoint.close()
    opened.checkpoint = Checkpoint(SlowFolder(Path(reference)))
    return opened


def held_part(
    jobs: list[Job], options: BatchOptions, expected: dict[str, str], hear: Callable[[Outcome | Progress], None]
) -> list[Outcome]:
    return convert_part(jobs, options, expected, hear, access=Access(base=slow_base, staging=HeldStaging))

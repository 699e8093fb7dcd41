"""A program: a batch that notes every tensor at once, and kills itself at the N-th call of note, accept or spend.

It imports nothing of the tests: pytest, transformers and PEFT take longer than all that it does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter import BatchOptions, Job, Resources
from converter.batch.batch import convert_jobs
from converter.batch.run import Access
from converter.seal.destination import Destination
from converter.seal.staging import Staging


class Death:
    """Comes when it is called for the N-th time."""

    def __init__(self, where: str) -> None:
        self._where, _, count = where.partition(":")
        self._left = int(count)

    def at(self, where: str) -> None:
        if where == self._where:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


class Instead:
    """Does what something else does, but for what a test changes."""

    def __init__(self, real: Any, death: Death) -> None:
        self._real, self._death = real, death

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class DeadlyJournal(Instead):
    def add(self, entry: Any) -> None:
        self._death.at("note")
        self._real.add(entry)


class DeadlyDestination(Instead):
    def accept(self) -> None:
        self._death.at("accept")
        self._real.accept()


class DeadlyStaging(Staging):
    def __init__(
        self, death: Death, destination: Destination, job: Mapping[str, Any], shards: list[str], *, resume: bool
    ) -> None:
        super().__init__(DeadlyDestination(destination, death), job, shards, resume=resume)  # type: ignore[arg-type]
        self.journal = DeadlyJournal(self.journal, death)  # type: ignore[assignment]
        self._death = death

    def spend(self) -> None:
        self._death.at("spend")
        super().spend()


def main(where: str, base: str, out: str, *adapters: str) -> None:
    death = Death(where)
    jobs = [Job(Path(out) / Path(adapter).name, adapter, base) for adapter in adapters]
    convert_jobs(
        jobs,
        BatchOptions(Resources(journal_seconds=0.0)),
        access=Access(staging=lambda *arguments, **how: DeadlyStaging(death, *arguments, **how)),
    )


main(*sys.argv[1:])

"""A program: a pipeline that kills itself when a step of it begins or ends.

It imports nothing of the tests: pytest, transformers and PEFT take longer than all that it does.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from converter import Resources
from converter.batch.job_file import read_file
from converter.delivery.delivery import DeliveryObserver, Event, deliver
from converter.job import RunOptions


def main(file: str, work: str, step: str, state: str) -> None:
    def hear(event: Event) -> None:
        if (event.step, event.state) == (step, state):
            os.kill(os.getpid(), signal.SIGKILL)

    options = RunOptions(Resources(threads=1, journal_seconds=0))
    deliver(read_file(Path(file), stores=True), Path(work), options, DeliveryObserver(event=hear))


if __name__ == "__main__":
    main(*sys.argv[1:])

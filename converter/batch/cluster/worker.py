"""One part of a batch, on whatever node it was given to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from converter.batch.batch import convert_jobs
from converter.batch.observer import BatchObserver
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcome, Status
from converter.batch.run import Access
from converter.errors import ConversionRefused, ConverterError, Interrupted
from converter.job import Job
from converter.observer import Progress
from converter.recipe import versions

LOCK_SECONDS = 60.0
"""How long a part waits for outputs that another process is writing: a worker of a lost node may live for a moment."""
_SHOW_SECONDS = 0.3
"""Between two reports of the progress."""


def convert_part(
    jobs: Sequence[Job],
    options: BatchOptions,
    expected: Mapping[str, str],
    hear: Callable[[Outcome | Progress], None],
    *,
    access: Access = Access(),
    lock_seconds: float = LOCK_SECONDS,
    wait: Callable[[float], None] = time.sleep,
) -> list[Outcome]:
    """Make the jobs of a part; returns their outcomes, in their order. `hear` is called on the way.

    `expected` are the versions of the machine that divided the batch; others would give other bytes. An output that
    another process is writing is tried again for `lock_seconds`. The only error that is raised is `Interrupted`, when
    the part was cancelled.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when the libraries are imported, as in cli.py
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    batch = _Part(jobs, options, hear, access)
    status: Status = "failed"
    try:
        _refuse_other_versions(expected)
        with _cancelled() as cancelled:
            return batch.convert(cancelled, lock_seconds, wait)
    except Interrupted:
        raise
    except ConverterError as exc:
        message = str(exc)
        status = "refused" if isinstance(exc, ConversionRefused) else "failed"
    except Exception as exc:  # of these jobs, and no reason to end the others
        message = str(ConverterError(f"{type(exc).__name__}: {exc}"))
    return [Outcome(job, status, message) for job in jobs]


class _Part:
    """The jobs of a part, on their way."""

    def __init__(
        self,
        jobs: Sequence[Job],
        options: BatchOptions,
        hear: Callable[[Outcome | Progress], None],
        access: Access,
    ) -> None:
        self._jobs, self._options, self._hear, self._access = jobs, options, hear, access
        self._known: dict[Path, Outcome] = {}
        self._shown = 0.0

    def convert(
        self, cancelled: Callable[[], int | None], lock_seconds: float, wait: Callable[[float], None]
    ) -> list[Outcome]:
        """The batch; what was locked is tried again for a while."""
        observer = BatchObserver(self._show, cancelled, ended=self._end)
        until = time.monotonic() + lock_seconds
        left = list(self._jobs)
        while True:
            convert_jobs(left, self._options, observer, access=self._access)
            left = [job for job in left if self._known[job.out].is_locked]
            if not left or time.monotonic() > until or cancelled() is not None:
                return [self._known[job.out] for job in self._jobs]
            wait(1)

    def _show(self, item: Progress) -> None:
        if time.monotonic() - self._shown > _SHOW_SECONDS:
            self._shown = time.monotonic()
            self._hear(item)

    def _end(self, outcome: Outcome) -> None:
        self._known[outcome.job.out] = outcome
        if not outcome.is_locked:
            self._hear(outcome)


def _refuse_other_versions(expected: Mapping[str, str]) -> None:
    here = versions()
    for name, version in expected.items():
        if here.get(name) != version:
            raise ConversionRefused(
                f"`address`: the node {os.uname().nodename} has {name} {here.get(name)} instead of {version}, and "
                "would write other bytes; install the same versions on all nodes"
            )


@contextmanager
def _cancelled() -> Iterator[Callable[[], int | None]]:
    """SIGINT, by which Ray cancels a task, ends the part between two tiles and keeps what is done."""
    received: int | None = None

    def receive(signum: int, _frame: object) -> None:
        nonlocal received
        received = signum

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGINT, receive)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGINT, before)

"""One part of a batch, on whatever node it was given to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from converter.batch.batch import convert_batch
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcome
from converter.errors import ConversionRefused, ConverterError, Interrupted
from converter.job import Job
from converter.observer import Progress
from converter.recipe import versions

LOCK_SECONDS = 60.0
"""How long a part waits for outputs that another process is writing: a worker of a lost node may live for a moment."""
_SHOW_SECONDS = 0.3


def convert_part(
    jobs: Sequence[Job], options: BatchOptions, expected: Mapping[str, str], hear: Callable[[Outcome | Progress], None]
) -> list[Outcome]:
    """What came of the jobs, in their order; `hear` is told on the way.

    `expected` are the versions of the machine that divided the batch; others would give other bytes. Raises no error of
    its own: `Interrupted` is the end of a part that was cancelled.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when the libraries are imported, as in cli.py
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        _refuse_other_versions(expected)
        with _cancelled() as cancelled:
            return _convert_unlocked(jobs, options, hear, cancelled)
    except Interrupted:
        raise
    except ConverterError as exc:
        status, message = ("refused" if isinstance(exc, ConversionRefused) else "failed"), str(exc)
    except Exception as exc:  # of these jobs, and no reason to end the others
        status, message = "failed", str(ConverterError(f"{type(exc).__name__}: {exc}"))
    return [Outcome(job, status, message) for job in jobs]  # type: ignore[arg-type]


def _convert_unlocked(
    jobs: Sequence[Job],
    options: BatchOptions,
    hear: Callable[[Outcome | Progress], None],
    cancelled: Callable[[], int | None],
) -> list[Outcome]:
    """The batch; what was locked is tried again for a while."""
    known: dict[Path, Outcome] = {}
    shown = 0.0

    def show(item: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown > _SHOW_SECONDS:
            shown = time.monotonic()
            hear(item)

    def tell(outcome: Outcome) -> None:
        known[outcome.job.out] = outcome
        if not outcome.is_locked:
            hear(outcome)

    until = time.monotonic() + LOCK_SECONDS
    left = list(jobs)
    while left:
        convert_batch(left, options, progress=show, tell=tell, stop=cancelled)
        left = [job for job in left if known[job.out].is_locked]
        if left and (time.monotonic() > until or cancelled() is not None):
            break
        time.sleep(1 if left else 0)
    return [known[job.out] for job in jobs]


def _refuse_other_versions(expected: Mapping[str, str]) -> None:
    here = versions()
    for name, version in expected.items():
        if here.get(name) != version:
            raise ConversionRefused(
                f"--ray: the node {os.uname().nodename} has {name} {here.get(name)}, and not {version}: "
                "the bytes of its outputs would be others"
            )


@contextmanager
def _cancelled() -> Iterator[Callable[[], int | None]]:
    """SIGINT, with which Ray cancels a task, ends the part between two tiles and keeps what is done."""
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

"""One part of a batch on its node: it ends early when it is cancelled, and waits for what a lost worker still holds."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from converter import BatchOptions, Job, Outcome
from converter.batch.cluster.worker import convert_part
from converter.batch.run import Access
from converter.errors import Interrupted
from converter.observer import Progress
from converter.recipe import versions
from converter.seal.destination import Destination
from converter.seal.staging import Staging
from tests.models import save_adapter, save_base


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("worker")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture
def job(inputs: tuple[Path, Path], tmp_path: Path) -> Job:
    base, adapter = inputs
    return Job(tmp_path / "out", adapter, base)


def test_it_tells_what_it_does_and_gives_back_what_came_of_it(job: Job) -> None:
    told: list[Outcome | Progress] = []

    outcomes = convert_part([job], BatchOptions(), versions(), told.append)

    assert [outcome.status for outcome in outcomes] == ["made"]
    assert [item for item in told if isinstance(item, Outcome)] == outcomes
    assert any(isinstance(item, Progress) for item in told)


def test_an_output_that_another_process_writes_is_made_when_that_one_has_gone(job: Job) -> None:
    holder = Staging(Destination(job.out, inputs=(), overwrite=False), {}, (), resume=False)
    told: list[Outcome | Progress] = []
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        holder.spend()
        holder.close()

    outcomes = convert_part([job], BatchOptions(), versions(), told.append, wait=wait)

    assert len(waited) == 1
    assert [outcome.status for outcome in outcomes] == ["made"]
    assert [item for item in told if isinstance(item, Outcome)] == outcomes  # nothing of the lock


def test_an_output_that_stays_locked_is_refused(job: Job) -> None:
    with Staging(Destination(job.out, inputs=(), overwrite=False), {}, (), resume=False):
        (outcome,) = convert_part([job], BatchOptions(), versions(), lambda _: None, lock_seconds=-1.0)

    assert (outcome.status, outcome.is_locked) == ("refused", True)
    assert "another conversion is writing it" in outcome.message


def test_a_cancelled_part_ends_between_two_tiles_and_keeps_what_is_done(job: Job) -> None:
    before = signal.getsignal(signal.SIGINT)

    def cancel(item: Outcome | Progress) -> None:
        if isinstance(item, Progress):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="run the same command to resume"):
        convert_part([job], BatchOptions(), versions(), cancel)

    assert signal.getsignal(signal.SIGINT) is before
    assert not job.out.exists()
    assert list(job.out.parent.glob("*.partial"))
    assert [outcome.status for outcome in convert_part([job], BatchOptions(), versions(), lambda _: None)] == ["made"]


def test_in_another_thread_it_works_but_hears_no_cancellation(job: Job) -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.extend(convert_part([job], BatchOptions(), versions(), lambda _: None))
    )
    thread.start()
    thread.join()
    assert [outcome.status for outcome in outcomes] == ["made"]


def test_a_node_with_another_version_refuses_its_part(job: Job) -> None:
    (outcome,) = convert_part([job], BatchOptions(), {**versions(), "torch": "1.0"}, lambda _: None)

    assert outcome.status == "refused"
    assert " instead of 1.0, and would write other bytes" in outcome.message
    assert not job.out.exists()


def test_an_error_that_nobody_foresaw_is_told_of_the_jobs(job: Job) -> None:
    def unforeseen(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of all things")

    (outcome,) = convert_part([job], BatchOptions(), versions(), lambda _: None, access=Access(base=unforeseen))

    assert (outcome.status, outcome.message) == ("failed", "ZeroDivisionError: of all things")

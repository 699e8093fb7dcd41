"""The ledger of what comes of each job."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter import Job, Outcome
from converter.batch.outcomes import Outcomes, Status
from converter.errors import BadRecipe, ConverterError, NotFinite, OutputLocked, WriteFailed

JOBS = [Job(Path(name), "adapter", "base") for name in "abc"]


def test_outcomes_are_in_the_order_of_the_jobs_and_told_once_each_as_they_come() -> None:
    told: list[Outcome] = []
    outcomes = Outcomes(JOBS, told.append)

    for index, status in ((2, "made"), (0, "nothing to do"), (0, "made")):
        outcomes.end(index, status)  # type: ignore[arg-type]

    assert [(outcome.job.out.name, outcome.status) for outcome in outcomes] == [("a", "nothing to do"), ("c", "made")]
    assert told == list(reversed(list(outcomes)))
    assert (0 in outcomes, 1 in outcomes, len(outcomes)) == (True, False, 2)


def test_a_good_outcome_replaces_a_bad_one_and_no_bad_one_a_good_one() -> None:
    told: list[Outcome] = []
    outcomes = Outcomes(JOBS, told.append)

    outcomes.fail(0, WriteFailed("full"))
    outcomes.fail(0, WriteFailed("still full"))
    outcomes.end(0, "made")
    outcomes.fail(0, WriteFailed("too late"))

    assert [(outcome.status, outcome.message) for outcome in told] == [("failed", "full"), ("made", "")]


@pytest.mark.parametrize(
    ("error", "status", "locked", "resumable"),
    [
        (BadRecipe("no"), "refused", False, False),
        (OutputLocked("another writes it"), "refused", True, False),
        (WriteFailed("full"), "failed", False, True),
        (NotFinite("NaN"), "failed", False, False),
    ],
)
def test_an_error_says_whether_it_refuses_and_whether_the_work_can_be_resumed(
    error: ConverterError, status: Status, locked: bool, resumable: bool
) -> None:
    outcomes = Outcomes(JOBS)
    outcomes.fail(1, error)
    (outcome,) = outcomes
    assert (outcome.job, outcome.status, outcome.message) == (JOBS[1], status, str(error))
    assert (outcome.is_good, outcome.is_locked) == (False, locked)
    assert outcomes.unfinished == ({1} if resumable else set())


def test_an_outcome_that_comes_from_elsewhere_gets_the_job_as_it_was_given() -> None:
    outcomes = Outcomes(JOBS)
    outcomes.record(0, Outcome(Job(Path("/absolute/a"), "adapter", "base"), "made", notes=("n",)))
    assert list(outcomes) == [Outcome(JOBS[0], "made", notes=("n",))]

"""Samples of a run: how far it was, and how much memory it held."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from converter.observer import Progress
from converter.samples import MOST, Sample, Samples, rates, resident_memory, stages, thinned


def heard(steps: int, seconds: float) -> list[Sample]:
    """Samples of a run of so many steps, each of which takes so long."""
    clock = itertools.count()
    samples = Samples(clock=lambda: next(clock) * seconds, memory=lambda: 7)
    for step in range(steps):
        samples.progress(Progress("converting", step, steps, "a"))
    samples.progress(Progress("sealing", steps, steps, "b"))
    return samples.ended()


def test_a_short_run_has_every_step() -> None:
    assert heard(3, 1.0) == [
        Sample(0.0, "planning", 0, 7),
        Sample(1.0, "converting", 0, 7),
        Sample(2.0, "converting", 1, 7),
        Sample(3.0, "converting", 2, 7),
        Sample(4.0, "sealing", 3, 7),
        Sample(5.0, "sealing", 3, 7),
    ]


def test_steps_that_follow_at_once_are_left_out() -> None:
    assert [sample.stage for sample in heard(1000, 1e-6)] == ["planning", "converting", "sealing", "sealing"]


def test_a_long_run_is_thinned_and_keeps_its_ends() -> None:
    samples = heard(100_000, 1.0)

    assert MOST / 4 < len(samples) <= MOST + 1
    assert samples[0].stage == "planning"
    assert samples[-1].done == 100_000
    assert [sample.seconds for sample in samples] == sorted(sample.seconds for sample in samples)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=60))
def test_thinning_keeps_the_order_and_the_ends_of_each_stage(drawn: list[tuple[str, int]]) -> None:
    samples = [Sample(float(number), stage, done, 1) for number, (stage, done) in enumerate(drawn)]

    left = thinned(samples)

    assert [sample for sample in samples if sample in left] == left
    runs = [list(run) for _, run in itertools.groupby(samples, lambda sample: sample.stage)]
    assert all(run[0] in left and run[-1] in left for run in runs)


def test_a_stage_lasts_until_the_next_begins_and_counts_its_own_bytes() -> None:
    samples = [Sample(0.0, "a", 0, 5), Sample(1.0, "b", 40, 9), Sample(3.0, "b", 100, 6), Sample(4.0, "c", 100, 7)]

    assert stages(samples) == [("a", 1.0, 0, 9), ("b", 3.0, 60, 9), ("c", 0.0, 0, 7)]
    assert rates(samples) == [(3.0, 30.0)]
    assert stages([]) == rates([]) == []


def test_a_stage_that_has_several_turns_is_told_once() -> None:
    drawn = [("a", 0, 5), ("b", 40, 9), ("a", 0, 6), ("a", 30, 8), ("b", 0, 7)]
    samples = [Sample(float(number), stage, done, memory) for number, (stage, done, memory) in enumerate(drawn)]

    assert stages(samples) == [("a", 3.0, 30, 9), ("b", 1.0, 0, 9)]


def test_what_the_process_holds_is_told() -> None:
    assert 10_000_000 < resident_memory() < 1 << 40

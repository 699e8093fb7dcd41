"""The arithmetic of latency, with a clock and servers of the tests' own: nothing here takes time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from converter.errors import BadRecipe, ConversionFailed
from converter.latency.measure import (
    MERGED,
    OUTPUT,
    UNMERGED,
    CannotRun,
    Measured,
    Spread,
    Variant,
    Workload,
    measure,
)

VARIANTS = [Variant(name, Path(name)) for name in (UNMERGED, MERGED, OUTPUT)]


class Clock:
    """Stands still until a server works."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Fake:
    """A server that takes so long for the first token and for each other one, by variant; `each_round` seconds longer
    from round to round. The first answer after loading takes a minute more."""

    name = "fake"
    version = "1"
    device = "none"

    def __init__(self, clock: Clock, seconds: dict[str, tuple[float, float]], each_round: float = 0.0) -> None:
        self.clock, self.seconds, self.each_round = clock, seconds, each_round
        self.opened_: list[str] = []
        self.open, self.warm = 0, False
        self.prompts: dict[str, list[list[int]]] = {}

    @contextmanager
    def opened(self, variant: Variant) -> Iterator[Fake]:
        if variant.name not in self.seconds:
            raise CannotRun("no kernel for it")
        assert self.open == 0, "another model is loaded"
        self.open, self.warm = 1, False
        self.opened_.append(variant.name)
        self.clock.seconds += 1000
        yield self
        self.open = 0

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Iterator[object]:
        name = self.opened_[-1]
        self.prompts.setdefault(name, []).append(list(prompt))
        first, each = self.seconds[name]
        self.clock.seconds += first + (0 if self.warm else 60)
        self.clock.seconds += self.each_round * (self.opened_.count(name) - 1)
        self.warm = True
        yield 7
        for _ in range(new_tokens - 1):
            self.clock.seconds += each
            yield 7


def run(server: Fake, workload: Workload = Workload(), variants: Sequence[Variant] = VARIANTS) -> Measured:
    return measure(server, variants, workload, 1000, server.clock)


def test_medians_and_ratios_are_those_of_the_servers_times() -> None:
    server = Fake(Clock(), {UNMERGED: (4.0, 2.0), MERGED: (2.0, 1.0), OUTPUT: (1.0, 1.5)})

    found = run(server, Workload(new_tokens=5))

    assert found.latencies.keys() == {UNMERGED, MERGED, OUTPUT}
    assert found.latencies[UNMERGED].first_token == Spread(4, 4, 4)
    assert found.latencies[UNMERGED].token == Spread(2, 2, 2)
    assert found.latencies[UNMERGED].rate.median == pytest.approx(5 / 12)
    assert found.ratios[MERGED] == {"first_token": 1, "token": 1, "rate": 1}
    assert found.ratios[UNMERGED] == pytest.approx({"first_token": 2, "token": 2, "rate": 0.5})
    assert found.ratios[OUTPUT]["first_token"] == 0.5
    assert found.notes == ()
    assert (found.through, found.version, found.device) == ("fake", "1", "none")


def test_the_median_is_the_middle_one_and_least_and_most_are_said() -> None:
    server = Fake(Clock(), dict.fromkeys((UNMERGED, MERGED, OUTPUT), (1.0, 1.0)), each_round=3)

    found = run(server, Workload(rounds=3, requests=1))

    assert found.latencies[MERGED].first_token == Spread(4, 1, 7)


def test_loading_and_the_first_answer_after_it_are_not_in_the_figures() -> None:
    found = run(Fake(Clock(), {MERGED: (1.0, 1.0)}), variants=[VARIANTS[1]])

    assert found.latencies[MERGED].first_token.most == 1
    assert found.latencies[MERGED].rate.least == 1


def test_variants_take_turns_one_at_a_time_and_each_round_begins_with_another_one() -> None:
    server = Fake(Clock(), dict.fromkeys((UNMERGED, MERGED, OUTPUT), (1.0, 1.0)))
    heard: list[str] = []

    measure(server, VARIANTS, Workload(rounds=4, requests=2), 1000, server.clock, heard.append)

    u, m, o = UNMERGED, MERGED, OUTPUT
    assert server.opened_ == [u, m, o, m, o, u, o, u, m, u, m, o]
    assert heard == [name for name in server.opened_ for _ in range(3)]


def test_all_variants_get_the_same_prompts_and_no_prompt_twice() -> None:
    server = Fake(Clock(), dict.fromkeys((UNMERGED, MERGED, OUTPUT), (1.0, 1.0)))

    run(server, Workload(prompt_tokens=9, rounds=3, requests=2))

    prompts = server.prompts[MERGED]
    assert server.prompts == dict.fromkeys((UNMERGED, MERGED, OUTPUT), prompts)
    assert [len(prompt) for prompt in prompts] == [9] * 9
    assert len({prompt[0] for prompt in prompts}) == 9, "a server would remember how it began"
    assert {token for prompt in prompts for token in prompt} <= set(range(250, 500))


@pytest.mark.parametrize("vocabulary", [2, 3, 9])
def test_a_small_vocabulary_is_enough(vocabulary: int) -> None:
    prompts = Workload(prompt_tokens=2).prompts(vocabulary)

    assert {token < vocabulary for of_round in prompts for prompt in of_round for token in prompt} == {True}


def test_what_cannot_run_says_why_and_the_others_are_measured() -> None:
    server = Fake(Clock(), {UNMERGED: (4.0, 2.0), MERGED: (2.0, 1.0)})

    found = run(server)

    assert found.why_not == {OUTPUT: "no kernel for it"}
    assert found.latencies.keys() == found.ratios.keys() == {UNMERGED, MERGED}


def test_without_the_merged_model_there_are_no_ratios() -> None:
    found = run(Fake(Clock(), {UNMERGED: (4.0, 2.0)}))

    assert found.latencies.keys() == {UNMERGED}
    assert (found.ratios, found.notes) == ({}, ())


def test_an_answer_that_is_too_short_is_no_measurement() -> None:
    class Short(Fake):
        def generate(self, prompt: Sequence[int], new_tokens: int) -> Iterator[object]:
            yield from list(super().generate(prompt, new_tokens))[:3]

    found = run(Short(Clock(), {MERGED: (1.0, 1.0)}), variants=[VARIANTS[1]])

    assert found.why_not == {MERGED: "it generated 3 tokens, expected 32"}


def test_a_difference_smaller_than_the_spread_is_noted() -> None:
    server = Fake(Clock(), {UNMERGED: (4.0, 2.0), MERGED: (2.0, 1.0)}, each_round=1.5)

    found = run(server, Workload(requests=1), VARIANTS[:2])

    assert found.notes == (
        "base + adapter, first token: the medians differ by 2000.0 ms, single requests by up to 3000.0 ms: more rounds "
        "would tell more",
    )


@pytest.mark.parametrize(("name", "least"), [("prompt_tokens", 1), ("new_tokens", 2), ("rounds", 1), ("requests", 1)])
def test_a_workload_of_nothing_is_refused(name: str, least: int) -> None:
    with pytest.raises(BadRecipe, match=f"`{name}` {least - 1}: expected at least {least}"):
        Workload(**{name: least - 1})


def test_other_errors_end_it() -> None:
    class Broken(Fake):
        def generate(self, prompt: Sequence[int], new_tokens: int) -> Iterator[object]:
            raise ConversionFailed("the disk")

    with pytest.raises(ConversionFailed, match="the disk"):
        run(Broken(Clock(), {MERGED: (1.0, 1.0)}), variants=[VARIANTS[1]])

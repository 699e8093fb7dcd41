"""How many outputs fit the memory of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter import Resources
from converter.batch.memory import Reserve, fits, fitting_passes, reserved, split_into_passes
from converter.errors import BadRecipe
from converter.plan.budget import FIXED
from converter.resources import DEFAULT_MEMORY

reserves = st.builds(Reserve, st.integers(0, 200_000_000), st.integers(0, 50_000_000))


@given(st.lists(reserves, min_size=1, max_size=30), st.integers(100_000_000, 10**9), st.integers(1, 10))
def test_passes_hold_every_output_once_in_their_order_and_leave_a_quarter_to_tiles(
    outputs: list[Reserve], memory: int, most: int
) -> None:
    passes = split_into_passes(outputs, Resources(memory=memory), most)

    assert [number for numbers in passes for number in numbers] == list(range(len(outputs)))
    assert all(1 <= len(numbers) <= most for numbers in passes)
    for numbers in passes:
        assert len(numbers) == 1 or reserved([outputs[n] for n in numbers]) <= memory * 3 // 4


@given(st.lists(reserves, min_size=1, max_size=30), st.integers(100_000_000, 10**9), st.integers(1, 10))
def test_a_pass_is_as_large_as_it_can_be(outputs: list[Reserve], memory: int, most: int) -> None:
    passes = split_into_passes(outputs, Resources(memory=memory), most)
    for numbers, following in pairwise(passes):
        together = sum(outputs[number].nbytes for number in [*numbers, following[0]])
        assert len(numbers) == most or FIXED + together > memory * 3 // 4


def test_one_output_reserves_what_a_conversion_of_it_does_and_each_further_one_its_own() -> None:
    one, other = Reserve(in_flight=10_000_000, objects=1_000_000), Reserve(in_flight=20_000_000, objects=3_000_000)
    assert reserved([]) == FIXED
    assert reserved([one]) == FIXED + 10_000_000
    assert reserved([one, other]) == FIXED + 10_000_000 + 20_000_000 + 3_000_000


def test_a_pass_that_does_not_fit_is_halved_until_it_does() -> None:
    tried: list[Sequence[int]] = []

    def attempt(numbers: Sequence[int]) -> int | None:
        tried.append(numbers)
        return sum(numbers) if len(numbers) <= 2 else None

    found = list(fitting_passes([[0, 1, 2, 3, 4], [5]], attempt))

    assert found == [([0, 1], 1), ([2], 2), ([3, 4], 7), ([5], 5)]
    assert tried[0] == [0, 1, 2, 3, 4]


def test_what_one_output_alone_lacks_is_given_and_the_others_have_their_turn() -> None:
    lacking = BadRecipe("`memory` 1: 2 bytes are needed")

    def attempt(numbers: Sequence[int]) -> str:
        if 1 in numbers:
            raise lacking
        return "fits"

    assert list(fitting_passes([[0, 1, 2]], attempt)) == [([0], "fits"), ([1], lacking), ([2], "fits")]


@pytest.mark.parametrize(
    ("memory", "outputs", "asked", "fitting"),
    [
        (DEFAULT_MEMORY + 1, 1, None, True),  # one alone may take more than the default
        (DEFAULT_MEMORY + 1, 2, None, False),
        (DEFAULT_MEMORY, 2, None, True),
        (DEFAULT_MEMORY + 1, 2, 2 * DEFAULT_MEMORY, True),  # the plan was held against what was asked for
    ],
)
def test_several_outputs_keep_to_the_default(memory: int, outputs: int, asked: int | None, fitting: bool) -> None:
    assert fits(memory, outputs, Resources(memory=asked)) is fitting

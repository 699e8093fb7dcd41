"""Every parser of foreign files, on files that were changed at random: our own errors or none, in bounded time of the
processor.

The same targets run for long by `make fuzz`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS, Target, mutated
from tests.limits import cpu_below

EXAMPLES = {name: 60 if name == "patterns" else 300 for name in TARGETS}
"""An expression is matched in a process of its own, which takes a hundred times as long as the other parsers."""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples overwrite in turn."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_raises_nothing_but_our_own_errors(name: str, scratch: Path) -> None:
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES[name], derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(raw=st.one_of(mutated(target.seeds), st.binary(max_size=200)))
    def it_holds(raw: bytes) -> None:
        with cpu_below(5):
            target.parse(raw, scratch)

    it_holds()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_the_seeds_of_the_corpus_are_understood(target: Target, scratch: Path) -> None:
    assert all(target.parse(seed, scratch) for seed in target.seeds)

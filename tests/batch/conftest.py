"""A base, three adapters on it, and what a batch of them leaves; made once for all tests of the room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from converter import Inputs, Plan, convert_batch, make_plan
from tests.batch.scenes import SMALL_SHARDS, adapters, jobs_for
from tests.models import save_adapter, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("batch") / "base", "llama", sharded=True)


@pytest.fixture(scope="session")
def three(base: Path) -> list[Path]:
    """Two adapters of the same attention layers, and one of all layers."""
    return adapters(base.parent, base)


@pytest.fixture(scope="session")
def undisturbed(base: Path, three: list[Path]) -> Path:
    """The outputs of a batch of the three that nothing happened to."""
    out = base.parent / "undisturbed"
    convert_batch(jobs_for(three, base, out))
    return out


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of several shards of a megabyte, and next to it the adapters q_proj and down_proj of these modules."""
    base = save_base(tmp_path_factory.mktemp("large") / "base", "llama", num_hidden_layers=1, vocab_size=9000)
    for name in ("q_proj", "down_proj"):
        save_adapter(base.parent / name, base, "llama", target_modules=[name])
    return base


@pytest.fixture(scope="session")
def inputs(large: Path) -> Iterator[list[Inputs]]:
    some = [Inputs(large, large.parent / name) for name in ("q_proj", "down_proj")]
    yield some
    for one in some:
        one.close()


@pytest.fixture(scope="session")
def plans(inputs: list[Inputs]) -> list[Plan]:
    return [make_plan(one.base, one.adapter, SMALL_SHARDS) for one in inputs]

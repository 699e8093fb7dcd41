"""A conversion of four shards, for all stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter import convert
from tests.folders import contents
from tests.models import save_adapter, save_base
from tests.write.stores.settings import ONE_THREAD, SHARDS, SMALL_SHARDS


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose conversion makes four shards, and an adapter."""
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", sharded=True, num_hidden_layers=1, vocab_size=9000)
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture(scope="session")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same conversion writes to a folder."""
    report = convert(*inputs, tmp_path_factory.mktemp("folder") / "out", SMALL_SHARDS, ONE_THREAD)
    assert len(report.plan.shards) == SHARDS
    return contents(report.out)

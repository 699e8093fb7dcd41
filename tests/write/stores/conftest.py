"""A conversion of four shards, for all stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter import convert
from tests.folders import contents
from tests.models import save_large_pair
from tests.write.stores.settings import ONE_THREAD, SHARDS, SMALL_SHARDS


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose conversion makes four shards, and an adapter."""
    return save_large_pair(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same conversion writes to a folder."""
    report = convert(*inputs, tmp_path_factory.mktemp("folder") / "out", SMALL_SHARDS, ONE_THREAD)
    assert len(report.plan.shards) == SHARDS
    return contents(report.out)

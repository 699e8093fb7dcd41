"""What people see is what the golden files have. After an intended change: `make golden`, and read the diff."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.screens import COMMANDS, WIDTHS, golden, made_before, prepared, screen
from tests.conftest import new_cache


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> Path:
    """The folder as each width finds it."""
    folder = prepared(tmp_path_factory.mktemp("before").resolve())
    made_before(folder, {"XDG_CACHE_HOME": str(new_cache(tmp_path_factory.mktemp("cache"), answers))})
    return folder


@pytest.fixture(scope="module", params=WIDTHS, ids=str)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, answers: Path, before: Path
) -> tuple[int | None, Path, dict[str, str]]:
    """Columns, the folder that the commands are run in, their environment."""
    environment = {"XDG_CACHE_HOME": str(new_cache(tmp_path_factory.mktemp("cache"), answers))}
    folder = tmp_path_factory.mktemp("screens").resolve()
    shutil.copytree(before, folder, dirs_exist_ok=True)
    return request.param, folder, environment


@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_shows_what_it_showed_before(name: str, place: tuple[int | None, Path, dict[str, str]]) -> None:
    columns, folder, environment = place

    assert screen(name, columns, folder, environment) == golden(name, columns).read_text()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("help") or name == "alone"])
@pytest.mark.parametrize("columns", [80, 40])
def test_help_that_people_see_is_not_broken_by_the_terminal(name: str, columns: int) -> None:
    assert max(map(len, golden(name, columns).read_text().splitlines())) < columns

"""Several adapters by one word."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.batch.adapters import adapters_of, names_several
from converter.errors import BadRecipe


def save(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").touch()
    return folder


def test_adapters_are_in_the_order_of_their_paths_and_called_by_them(tmp_path: Path) -> None:
    save(tmp_path / "ads", "b", "a", "c")
    expected = {name: tmp_path / "ads" / name for name in "abc"}

    for word, parent in (("ads/*", tmp_path), ("ads", tmp_path), (f"{tmp_path}/ads/*", Path("/nowhere"))):
        found = adapters_of(word, parent)
        assert found == expected
        assert list(found) == ["a", "b", "c"]


def test_an_adapter_is_called_by_its_path_after_the_part_without_wildcards(tmp_path: Path) -> None:
    save(tmp_path / "runs", "x/final", "y/final", "y/checkpoint-5")
    assert list(adapters_of("runs/*/final", tmp_path)) == ["x-final", "y-final"]
    assert list(adapters_of("runs/y/*", tmp_path)) == ["checkpoint-5", "final"]
    assert list(adapters_of("runs/**", tmp_path)) == ["x-final", "y-checkpoint-5", "y-final"]


def test_what_is_no_adapter_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, "ads/a", "ads/.hidden")
    (tmp_path / "ads" / "logs").mkdir()
    (tmp_path / "ads" / "notes.txt").touch()
    assert list(adapters_of("ads/*", tmp_path)) == ["a"]


@pytest.mark.parametrize("word", ["ads/*", "nowhere/*", "ads/logs", "ads/x*"])
def test_where_there_is_none_that_is_said(word: str, tmp_path: Path) -> None:
    (tmp_path / "ads" / "logs").mkdir(parents=True)
    with pytest.raises(BadRecipe, match="no adapters there: no folder that it matches has an adapter_config"):
        adapters_of(word, tmp_path)


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "ads/a/b", "ads/a-b")
    with pytest.raises(BadRecipe, match="would be called a-b"):
        adapters_of("ads/**", tmp_path)


def test_wildcards_in_the_name_of_the_folder_that_a_word_is_relative_to_mean_themselves(tmp_path: Path) -> None:
    parent = save(tmp_path / "[x]*", "ads/a")
    assert adapters_of("ads/*", parent) == {"a": parent / "ads" / "a"}


@pytest.mark.parametrize(
    ("word", "several"),
    [("ads", True), ("ads/*", True), ("ads/a", False), ("logs", False), ("org/id", False), ("[r]", False),
     ("x" * 300, False), ("no?", True)],
)  # fmt: skip
def test_a_word_names_several_if_it_is_a_glob_or_a_folder_of_adapters(word: str, several: bool, tmp_path: Path) -> None:
    save(tmp_path, "ads/a", "[r]")
    (tmp_path / "logs").mkdir()
    assert names_several(word, tmp_path) is several

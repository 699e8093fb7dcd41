"""Jobs by their adapters, clashes of outputs, groups, slices."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.batch.jobs import are_named, clashing, grouped, named_jobs, slice_of
from converter.errors import BadRecipe
from converter.job import Job, RunOptions
from converter.recipe import Recipe
from tests.limits import cpu_below


def test_outputs_are_named_by_their_adapters_or_as_they_are_told() -> None:
    jobs = named_jobs(["some/where/a", "org/b", "c=some/where/a/"], Path("z"), "x", Recipe())
    assert [job.out for job in jobs] == [Path("z/a"), Path("z/b"), Path("z/c")]
    assert [job.adapter for job in jobs] == ["some/where/a", "org/b", "some/where/a/"]


@pytest.mark.parametrize("adapters", [["x/a", "y/a"], ["x=a", "x=b"]])
def test_names_that_clash_are_refused_with_a_hint(adapters: list[str]) -> None:
    with pytest.raises(BadRecipe, match="NAME=PATH"):
        named_jobs(adapters, Path("z"), "x", Recipe())


@pytest.mark.parametrize("name", ["..", ".", ".hidden"])
def test_a_name_that_is_no_folder_of_out_is_refused(name: str) -> None:
    with pytest.raises(BadRecipe, match="can't be a folder's name"):
        named_jobs([f"{name}=a", "b"], Path("z"), "x", Recipe())


@pytest.mark.parametrize("second", ["z/a", "z/a/b", "z"])
def test_an_out_that_is_holds_or_lies_in_another_clashes(second: str, tmp_path: Path) -> None:
    jobs = [Job(tmp_path / "z/a", "one"), Job(tmp_path / "y", "two"), Job(tmp_path / second, "three")]
    assert list(clashing(jobs)) == [2]


@given(st.lists(st.lists(st.sampled_from("xyz"), min_size=1, max_size=4), max_size=12))
def test_of_outs_that_clash_the_first_is_made(outs: list[list[str]]) -> None:
    jobs = [Job(Path("/nowhere", *parts), "a") for parts in outs]

    clashes = clashing(jobs)

    made: list[Path] = []
    for index, job in enumerate(jobs):
        clash = any(job.out == out or job.out in out.parents or out in job.out.parents for out in made)
        assert (index in clashes) == clash
        if not clash:
            made.append(job.out)


def test_twenty_thousand_outs_are_compared_in_seconds() -> None:
    jobs = [Job(Path(f"/nowhere/{number % 100}/{number}"), "a") for number in range(20_000)]
    with cpu_below(20):
        assert clashing(jobs) == {}


@given(st.lists(st.sampled_from(["x", "y", "z"]), max_size=20), st.integers(1, 7))
def test_slices_are_a_partition_of_the_jobs_as_even_as_can_be(bases: list[str], count: int) -> None:
    jobs = [Job(Path(f"z/{number}"), "a", base) for number, base in enumerate(bases)]

    parts = [slice_of(jobs, number, count) for number in range(1, count + 1)]

    assert sorted((job for part in parts for job in part), key=jobs.index) == jobs
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("number", [0, 4])
def test_slices_are_counted_from_one(number: int) -> None:
    with pytest.raises(BadRecipe, match="counted from 1: 1/3 to 3/3"):
        slice_of([], number, 3)


def test_the_jobs_of_one_base_stay_in_one_slice_where_sizes_allow() -> None:
    jobs = [Job(Path(f"z/{number}"), "a", "xy"[number % 2]) for number in range(6)]
    assert [{job.base for job in slice_of(jobs, number, 2)} for number in (1, 2)] == [{"x"}, {"y"}]


def test_what_follows_an_equals_sign_may_be_longer_than_a_name() -> None:
    assert named_jobs(["a=" + "x" * 300], Path("z"), "x", Recipe())[0].adapter == "x" * 300


def test_a_path_with_an_equals_sign_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r=8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [(job.out, job.adapter) for job in named_jobs(["r=8"], Path("z"), "x", Recipe())] == [(Path("z/r=8"), "r=8")]


def test_a_name_too_long_for_a_folder_is_an_id_or_nothing() -> None:
    refused: dict[int, Exception] = {}
    assert grouped([Job(Path("z"), "a" * 300)], refused.__setitem__, RunOptions(offline=True)) == []
    assert "no such folder" in str(refused[0])


@pytest.fixture
def ads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two adapters, a note, and a folder that is none; it is the current folder's."""
    for name in ("one", "two"):
        (tmp_path / "ads" / name).mkdir(parents=True)
        (tmp_path / "ads" / name / "adapter_config.json").touch()
    (tmp_path / "ads" / "logs").mkdir()
    (tmp_path / "ads" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ads"


@pytest.mark.parametrize("word", ["ads/*", "ads", "ads/", "./ads", "ads/[ot]*"])
def test_a_folder_or_a_glob_stands_for_all_adapters_there(word: str, ads: Path) -> None:
    jobs = named_jobs([word, "org/three"], Path("z"), "x", Recipe())
    assert [(job.out, Path(str(job.adapter))) for job in jobs] == [
        (Path("z/one"), Path("ads/one")),
        (Path("z/two"), Path("ads/two")),
        (Path("z/three"), Path("org/three")),
    ]


def test_a_name_goes_with_one_adapter(ads: Path) -> None:
    with pytest.raises(BadRecipe, match="`adapter` all=ads: all can't name several adapters; leave all= out"):
        named_jobs(["all=ads"], Path("z"), "x", Recipe())


@pytest.mark.parametrize(
    ("adapters", "named"),
    [(["ads/one"], False), (["org/one"], False), (["ads/*"], True), (["ads"], True), (["n=ads/one"], True),
     (["a", "b"], True), ([], False)],
)  # fmt: skip
def test_outputs_have_names_where_there_may_be_several(adapters: list[str], named: bool, ads: Path) -> None:
    assert are_named(adapters) is named

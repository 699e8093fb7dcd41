"""Files of jobs, names of outputs, slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.errors import BadRecipe
from converter.jobs import Job, named_jobs, read_jobs, refuse_clashes, slice_of
from converter.recipe import Recipe


def test_a_toml_file_has_defaults_and_jobs(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    file = tmp_path / "jobs.toml"
    file.write_text(
        'base = "x"\nout = "z"\n[recipe]\nquant-type = "fp4"\n'
        '[[jobs]]\nadapter = "org/one"\n'
        '[[jobs]]\nadapter = "./two"\nname = "second"\nquant_type = "int8"\nkeep = "lm_head"\n'
        '[[jobs]]\nadapter = "org/three"\nout = "elsewhere"\nbase = "org/base"\nbase_revision = "v1"\n'
    )

    one, two, three = read_jobs(file)

    assert one == Job(tmp_path / "z" / "one", "org/one", str(tmp_path / "x"), Recipe(quant_type="fp4"))
    assert two.out == tmp_path / "z" / "second"
    assert two.recipe == Recipe(quant_type="int8", keep=("lm_head",))
    assert two.adapter == str(tmp_path / "two")
    assert (three.out, three.base, three.base_revision) == (tmp_path / "elsewhere", "org/base", "v1")


def test_a_file_of_json_lines_has_a_job_a_line(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    rows = [{"adapter": "a/b", "out": "one"}, {"base": "c/d", "out": "two", "recipe": {"double-quant": False}}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")

    assert read_jobs(file) == [
        Job(tmp_path / "one", "a/b"),
        Job(tmp_path / "two", None, "c/d", Recipe(double_quant=False)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"adapter": "a", "out": "z", "quant": 4}', "job 1: 'quant' is not known"),
        ('{"adapter": "a", "out": "z", "quant_type": "q4"}', "job 1: --quant-type q4"),
        ('{"adapter": "a"}', "job 1: has no out"),
        ('{"out": "z"}', "neither adapter nor base"),
        ('{"adapter": "a", "out": "z", "double_quant": "false"}', "job 1: double_quant is neither true nor false"),
        ('{"adapter": "a", "out": "z", "keep": [1]}', "job 1: keep is not a list of texts"),
        ('{"adapter": "a", "out": "z", "keep": 1}', "job 1: "),
        ('{"adapter": "a", "out": "z", "max_shard_size": "5GB"}', "job 1: max_shard_size is not a number of bytes"),
        ('{"adapter": "a", "out": "z", "recipe": 4}', "expected a table"),
        ('{"adapter": "a", "out": "z"}\n{"adapter": "b"}', "job 2: has no out"),
        ('{"adapter": 1, "out": "z"}', "adapter is not a text"),
        ("[]", "job 1: not an object"),
        ("{", "Expecting"),
        ("", "has no jobs"),
    ],
)
def test_a_job_that_is_not_understood_is_refused_by_number(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(line)
    with pytest.raises(BadRecipe, match=message.replace("[", r"\[")):
        read_jobs(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="No such file"):
        read_jobs(tmp_path / "nowhere.toml")


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
    assert list(refuse_clashes(jobs)) == [2]


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


def test_a_folder_beside_the_file_is_meant_before_an_id_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "org" / "one").mkdir(parents=True)
    (tmp_path / "jobs.jsonl").write_text('{"adapter": "org/one", "base": "org/two", "out": "z"}')
    (job,) = read_jobs(tmp_path / "jobs.jsonl")
    assert (job.adapter, job.base) == (str(tmp_path / "org" / "one"), "org/two")


def test_a_path_with_an_equals_sign_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r=8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [(job.out, job.adapter) for job in named_jobs(["r=8"], Path("z"), "x", Recipe())] == [(Path("z/r=8"), "r=8")]

"""Files of jobs, names of outputs, slices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.batch.jobs import grouped, named_jobs, read_jobs, refuse_clashes, slice_of
from converter.errors import BadRecipe
from converter.job import Job
from converter.recipe import Recipe
from tests.limits import cpu_below, no_hang


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
        ("[]", "job 1: holds list, expected an object"),
        ('{"adapter": "a", "adapter": "b", "out": "z"}', "job 1: not valid JSON: key 'adapter' occurs twice"),
        ('{"adapter": "a", "out": "z", "block_size": 64.0}', "job 1: block_size is not a number"),
        ('{"adapter": "a", "out": "z", "keep": {"lm_head": 1}}', "job 1: keep is not a list of texts"),
        ('{"adapter": "a", "out": "z\\u0000"}', "job 1: out is not a text"),
        ('{"adapter": "a", "out": "z\\ud800"}', "job 1: out is not a text"),
        ('{"adapter": "a", "base": "\\ud800", "out": "z"}', "job 1: base is not a text"),
        ('{"adapter": "a", "out": "~nobody-of-this-name/z"}', "job 1: Could not determine home"),
        ('{"adapter": "~nobody-of-this-name/a", "out": "z"}', "job 1: Could not determine home"),
        ("[" * 200_000, "job 1: nested too deeply"),
        ("{", "Expecting"),
        ("", "has no jobs"),
    ],
)
def test_a_job_that_is_not_understood_is_refused_by_number(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(line)
    with pytest.raises(BadRecipe, match=message.replace("[", r"\[")):
        read_jobs(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[jobs]]\nadapter = "a"\nname = "../a"\n', r"'\.\./a' can't be a folder's name"),
        ('[[jobs]]\nadapter = "a"\nname = "/etc/a"\n', "'/etc/a' can't be a folder's name"),
        ('[[jobs]]\nadapter = ".."\n', r"'\.\.' can't be a folder's name"),
        ('[[jobs]]\nadapter = "/"\n', "'' can't be a folder's name"),
        ('[[jobs]]\nadapter = "a"\nblock-size = 0x' + "f" * 5_000, "block_size is not a number"),
        ('[[jobs]]\nadapter = "a"\nmax-shard-size = 0x' + "f" * 5_000, "max_shard_size is not a number of bytes"),
        ('[[jobs]]\nadapter = "a"\nquant-type = {' + "a = {" * 500 + "}" * 500 + "}", "recursion|deeply"),
        ('[[jobs]]\nadapter = "a"\nrecipe = ' + "[" * 100 + "]" * 100, "list: expected a table"),
        ("a." * 50_000 + "a = 1", "more than 100 dots"),
        ("[" + "a." * 50_000 + "a]", "more than 100 dots"),
        ("a = {" + "a." * 50_000 + "a = 1}", "more than 100 dots"),
        ('a."b.\\".".' * 50_000 + "a = 1", "more than 100 dots"),
        ('a = ["""\n\' """, {' + "a." * 50_000 + 'a = 1}, "\'"]', "more than 100 dots"),
        ('a = ["""a"""", {' + "a." * 50_000 + "a = 1}]", "more than 100 dots"),
        ('a = "' + '\\"' * 1_000_000, "Unterminated string"),
        ('a = "' + '"""\\"' * 1_000_000, "after a statement"),
        ("a = " + "[" * 50_000, "recursion"),
        (b"\xff", "can't decode"),
    ],
)
def test_a_toml_file_that_is_not_understood_is_refused_soon(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_bytes(text if isinstance(text, bytes) else f'out = "z"\n{text}'.encode())
    with cpu_below(5), pytest.raises(BadRecipe, match=message):
        read_jobs(file)


@pytest.mark.parametrize("name", ["jobs.toml", "jobs.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_not_a_file_is_not_opened(make: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with no_hang(), pytest.raises(BadRecipe, match="not a plain file"):
        read_jobs(tmp_path / name)


def test_a_file_of_jobs_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text('{"adapter": "a", "out": "z"}')
    (tmp_path / "jobs.jsonl").symlink_to("jobs")
    assert len(read_jobs(tmp_path / "jobs.jsonl")) == 1


def test_a_file_of_jobs_without_end_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "jobs.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadRecipe, match="more than 10,000,000 bytes"):
        read_jobs(tmp_path / "jobs.jsonl")


def test_a_line_separator_in_a_name_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"adapter": "a", "out": "z\u2028y"}')
    assert read_jobs(tmp_path / "jobs.jsonl")[0].out == tmp_path / "z\u2028y"


def test_a_name_too_long_for_a_folder_is_an_id_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"adapter": "a" * 300, "base": "b" * 300, "out": "z"}))
    jobs, refused = read_jobs(tmp_path / "jobs.jsonl"), {}
    grouped([replace(jobs[0], base=None)], refused.__setitem__, offline=True)
    assert "no such folder" in str(refused[0])


def test_strings_and_comments_of_a_toml_file_may_have_dots(tmp_path: Path) -> None:
    keep = [f"model.layers.{number}.self_attn.q_proj" for number in range(100)]
    line = f"keep = {json.dumps(keep)} # {'.' * 200}\n"
    (tmp_path / "jobs.toml").write_text(f'out = "z"\n{line}[[jobs]]\nadapter = "a"\nbase = \'{"." * 200}\'\n')
    assert read_jobs(tmp_path / "jobs.toml")[0].recipe.keep == tuple(keep)


def test_a_home_folder_is_meant_wherever_the_file_of_jobs_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "jobs.toml").write_text('out = "~/z"\n[[jobs]]\nadapter = "a"\n[[jobs]]\nadapter = "b"\nout = "~/y"\n')
    assert [job.out for job in read_jobs(tmp_path / "jobs.toml")] == [tmp_path / "home" / name for name in ("z/a", "y")]


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


@given(st.lists(st.lists(st.sampled_from("xyz"), min_size=1, max_size=4), max_size=12))
def test_of_outs_that_clash_the_first_is_made(outs: list[list[str]]) -> None:
    jobs = [Job(Path("/nowhere", *parts), "a") for parts in outs]

    clashes = refuse_clashes(jobs)

    made: list[Path] = []
    for index, job in enumerate(jobs):
        clash = any(job.out == out or job.out in out.parents or out in job.out.parents for out in made)
        assert (index in clashes) == clash
        if not clash:
            made.append(job.out)


def test_twenty_thousand_outs_are_compared_in_seconds() -> None:
    jobs = [Job(Path(f"/nowhere/{number % 100}/{number}"), "a") for number in range(20_000)]
    with cpu_below(20):
        assert refuse_clashes(jobs) == {}


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


def test_what_follows_an_equals_sign_may_be_longer_than_a_name() -> None:
    assert named_jobs(["a=" + "x" * 300], Path("z"), "x", Recipe())[0].adapter == "x" * 300


def test_a_path_with_an_equals_sign_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r=8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [(job.out, job.adapter) for job in named_jobs(["r=8"], Path("z"), "x", Recipe())] == [(Path("z/r=8"), "r=8")]

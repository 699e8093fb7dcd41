"""Several adapters, and files of jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run, is_one_line
from tests.folders import copy
from tests.models import save_adapter
from tests.reference import differences


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "other", base, "llama", target_modules=["q_proj"])


def test_several_adapters_make_an_output_each_and_a_table(
    run: Run, base: Path, adapter: Path, other: Path, out: Path
) -> None:
    ran = run("--base", base, "--adapter", adapter, "--adapter", f"second={other}", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    rows = [line.split() for line in ran.out.splitlines()]
    assert [row[:2] for row in rows[1:3]] == [[f"{out}/adapter", "made"], [f"{out}/second", "made"]]
    assert rows[-1][:2] == ["2", "made"]
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "second"]


def test_one_bad_adapter_of_several_ends_with_1_and_says_which(
    run: Run, base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "empty").mkdir()

    ran = run("--base", base, "--adapter", adapter, "--adapter", tmp_path / "empty", "--out", out, "--json")

    assert ran.code == 1
    assert is_one_line(ran.err)
    assert ran.err.startswith(f"error: {out}/empty: ")
    told = json.loads(ran.out)
    assert told["counts"] == {"made": 1, "refused": 1}
    assert [row["status"] for row in told["outputs"]] == ["made", "refused"]
    assert told["outputs"][0]["shared_bytes"] > 0


def test_a_strict_batch_with_one_bad_adapter_starts_nothing_and_ends_with_2(
    run: Run, base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "empty").mkdir()

    ran = run("--base", base, "--adapter", adapter, "--adapter", tmp_path / "empty", "--out", out, "--strict")

    assert ran.code == 2
    assert not out.exists()


@pytest.mark.parametrize("odd", ["\x1b]0;owned\x07", "a\nb", "\udcff", "\u202e"])
def test_no_name_reaches_the_terminal_as_it_is(odd: str, run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    out, there = tmp_path / f"out{odd}", copy(adapter, tmp_path / f"adapter{odd}")
    (tmp_path / f"empty{odd}").mkdir()
    several = ["--adapter", there, "--adapter", tmp_path / f"empty{odd}"]
    ran = [
        run("--base", base, "--adapter", there, "--out", out),
        run("--base", base, "--adapter", there, "--out", out),
        run("--base", base, *several, "--out", tmp_path / "several", "--dry-run", "-v"),
        run("--base", base, *several, "--out", tmp_path / "several"),
        run("verify", out),
        run("verify", tmp_path / "several" / there.name, "--json"),
    ]
    shard = next(out.glob("*.safetensors"))
    shard.rename(shard.with_name(f"more{odd}.safetensors"))
    ran.append(run("verify", out))

    assert [one.code for one in ran] == [0, 0, 1, 1, 0, 0, 1]
    for one in ran:
        assert all(line.isprintable() for line in (one.out + one.err).split("\n"))
    assert all(ascii(odd)[1:-1] in one.out + one.err for one in ran[:-2])


def test_adapters_of_one_name_are_refused_with_a_hint(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--adapter", adapter, "--out", out)

    assert ran.code == 2
    assert is_one_line(ran.err)
    assert "give NAME=PATH" in ran.err


def test_a_file_of_jobs_is_done_in_slices(run: Run, base: Path, adapter: Path, other: Path, out: Path) -> None:
    jobs = out.parent / "jobs.jsonl"
    jobs.parent.mkdir()
    rows = [{"base": str(base), "adapter": str(a), "out": str(out / a.name)} for a in (adapter, other)]
    jobs.write_text("\n".join(map(json.dumps, rows)))

    assert run("batch", jobs, "--dry-run").code == 0
    assert not out.exists()
    assert run("batch", jobs, "--slice", "2/2").code == 0
    assert [path.name for path in out.iterdir()] == ["other"]
    ran = run("batch", jobs)
    assert ran.code == 0
    assert "1 made, 1 nothing to do" in ran.out.replace("1 nothing to do, 1 made", "1 made, 1 nothing to do")


@pytest.mark.parametrize("part", ["0/2", "3/2", "x", "1/0"])
def test_a_slice_that_is_none_is_refused(part: str, run: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"base": str(base), "out": "z"}))
    ran = run("batch", tmp_path / "jobs.jsonl", "--slice", part)
    assert ran.code == 2
    assert is_one_line(ran.err)


def test_against_links_to_an_earlier_output(
    run: Run, base: Path, adapter: Path, other: Path, out: Path, tmp_path: Path
) -> None:
    run("--base", base, "--adapter", adapter, "--adapter", other, "--out", out)

    ran = run("--base", base, "--adapter", other, "--out", tmp_path / "later", "--against", out / "other")

    assert (ran.code, ran.err) == (0, "")
    assert any(shard.stat().st_nlink > 2 for shard in (tmp_path / "later").glob("*.safetensors"))
    assert differences(tmp_path / "later", out / "other") == []


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_where_no_job_can_start_a_batch_ends_with_2(
    option: tuple[str, ...], run: Run, base: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "empty").mkdir()
    options = ("--base", base, "--adapter", f"x={tmp_path / 'empty'}", "--adapter", f"y={tmp_path / 'none'}")

    ran = run(*options, "--out", out, *option)

    assert ran.code == 2
    assert [line.split(": ")[1] for line in ran.err.splitlines()] == [f"{out}/x", f"{out}/y"]
    assert not out.exists()
    assert not option or json.loads(ran.out)["counts"] == {"refused": 2}


def test_an_adapter_that_fails_on_the_way_ends_a_batch_with_1(
    run: Run, base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    huge = copy(adapter, tmp_path / "huge")
    file = huge / "adapter_model.safetensors"
    save_file({name: tensor.fill_(3e38) for name, tensor in load_file(file).items()}, file)

    ran = run("--base", base, "--adapter", adapter, "--adapter", huge, "--out", out)

    assert ran.code == 1
    assert is_one_line(ran.err)
    assert "1 made, 1 failed" in ran.out
    assert [path.name for path in out.iterdir()] == ["adapter"]


def test_a_file_of_jobs_that_is_not_understood_ends_with_2_and_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text('[[jobs]]\nadapter = "a"\nout = "z"\nquant = 4\n')
    ran = run("batch", tmp_path / "jobs.toml")
    assert ran.code == 2
    assert is_one_line(ran.err)
    assert "job 1: 'quant' is not known" in ran.err


def test_a_dry_run_of_several_says_what_they_will_take_together(
    run: Run, base: Path, adapter: Path, other: Path, out: Path
) -> None:
    several = ("--base", base, "--adapter", adapter, "--adapter", other, "--out", out, "--dry-run")

    text, found = run(*several).out, json.loads(run(*several, "--json").out)

    assert f"2 of {base} in one pass over it: write at most" in text
    assert "memory: at most" in text
    assert "time: about" in text
    (forecast,) = found["forecasts"]
    assert (forecast["outputs"], forecast["passes"]) == (2, 1)
    assert forecast["memory"] > 0
    assert forecast["estimate"]["seconds"] > 0
    assert not out.exists()


def test_a_job_that_combines_adapters_gives_what_the_command_line_gives(
    run: Run, base: Path, adapter: Path, other: Path, out: Path, tmp_path: Path
) -> None:
    how = ("--combine", "cat", "--weight", "0.75", "--weight", "-0.25")
    assert run("--base", base, "--adapter", adapter, "--adapter", other, *how, "--out", tmp_path / "expected").code == 0
    jobs = [
        {"adapters": [str(adapter), str(other)], "combine": "cat", "weights": [0.75, -0.25], "name": "both"},
        {"adapter": str(other)},
    ]
    (tmp_path / "jobs.yaml").write_text(json.dumps({"base": str(base), "out": str(out), "jobs": jobs}))

    ran = run("batch", tmp_path / "jobs.yaml", "--json")

    assert (ran.code, ran.err) == (0, "")
    assert [row["adapter"] for row in json.loads(ran.out)["outputs"]] == [[str(adapter), str(other)], str(other)]
    assert differences(out / "both", tmp_path / "expected") == []
    assert differences(out / "both", out / "other") != []

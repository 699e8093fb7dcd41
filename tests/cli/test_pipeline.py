"""`convert pipeline`: its exit codes, what it prints, its events, and files of jobs that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converter.batch.job_file import read_file
from converter.delivery.state import STEPS
from converter.errors import BadRecipe
from tests.cli.conftest import Run, is_one_line
from tests.delivery.scenes import job_file


def test_a_run_prints_a_line_of_steps_and_the_next_one_that_there_is_nothing_to_do(run: Run, tmp_path: Path) -> None:
    file = job_file(tmp_path, "out", min_survival=0.9)

    ran = run("pipeline", file)

    assert ran.code == 0
    head, row, published, last = ran.out.splitlines()
    assert head.split() == ["output", *STEPS]
    assert row.split() == [str(tmp_path / "out"), *["done"] * len(STEPS)]
    assert published == f"published: {tmp_path / 'out'}"
    assert last.startswith(f"{file}.work/state.json has the figures of each step; ")
    assert (tmp_path / "out" / "config.json").exists()

    again = run("pipeline", file)
    assert (again.code, again.out, again.err) == (0, f"{tmp_path / 'out'}: published already; nothing to do\n", "")


def test_a_missed_gate_ends_with_4_and_one_line_that_says_which(run: Run, tmp_path: Path) -> None:
    ran = run("pipeline", job_file(tmp_path, "out", min_survival=0.9999), "--json")

    assert ran.code == 4
    assert is_one_line(ran.err)
    assert ran.err.startswith(f"error: {tmp_path / 'out'}: ")
    assert "has survival" in ran.err
    (output,) = json.loads(ran.out)["outputs"]
    assert (output["published"], output["nothing_to_do"]) == (False, False)
    assert output["did"] == {"fetch": "done", "convert": "done", "verify": "done", "gates": "failed"}
    assert output["steps"]["gates"]["exit_code"] == 4
    assert output["steps"]["gates"]["reason"] == output["error"]
    assert not (tmp_path / "out").exists()


def test_events_are_lines_of_json_on_stdout_or_in_a_file(run: Run, tmp_path: Path) -> None:
    file = job_file(tmp_path, "out")

    ran = run("pipeline", file, "--events", "-")

    told = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 0
    assert [(one["step"], one["state"]) for one in told] == [
        (step, state) for step in STEPS for state in ("began", "done")
    ]
    assert {one["out"] for one in told} == {str(tmp_path / "out")}
    assert told[-1]["result"]["steps"]["convert"]["fingerprint"] == told[-1]["result"]["fingerprint"]

    assert run("pipeline", file, "--events", tmp_path / "events.jsonl").code == 0
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert (json.loads(line)["step"], json.loads(line)["state"]) == ("announce", "skipped")


def test_events_on_stdout_and_json_are_refused_together(run: Run, tmp_path: Path) -> None:
    ran = run("pipeline", job_file(tmp_path, "out"), "--events", "-", "--json")

    assert ran.code == 2
    assert "--events - and --json both write to stdout: give a file to --events" in ran.err


def test_a_slice_is_a_part_of_the_jobs(run: Run, tmp_path: Path) -> None:
    file = job_file(tmp_path, "outs")
    rows = '[[jobs]]\nname = "one"\n[[jobs]]\nname = "two"\n'
    file.write_text(file.read_text() + rows)

    ran = run("pipeline", file, "--slice", "2/2", "--work", tmp_path / "work", "--quiet")

    assert (ran.code, ran.out) == (0, "")
    assert [path.name for path in (tmp_path / "outs").iterdir()] == ["two"]


def test_a_batch_takes_the_same_file_and_says_what_it_leaves_out(run: Run, tmp_path: Path) -> None:
    file = job_file(tmp_path, "out", verify={"compare": True}, announce={"command": ["touch", "heard"]})

    ran = run("batch", file)

    assert ran.code == 0
    said = "announce, verify: not done by `convert batch`; `convert pipeline"
    assert ran.err == f"note: {file}: {said} {file}` does it\n"
    assert not (tmp_path / "heard").exists()
    assert (tmp_path / "out" / "config.json").exists()
    assert run("batch", file, "--quiet").err == ""


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a key": ({"min_survial": 0.9}, "'min_survial' is not known; did you mean 'min_survival'?"),
    "a table": ({"evaluation": {"text": "t"}}, "'evaluation' is not known; did you mean 'evaluate'?"),
    "a key of a table": ({"evaluate": {"txt": "t"}}, "evaluate: 'txt' is not known; did you mean 'text'?"),
    "a key like no other": ({"verify": {"zzz": 1}}, "verify: 'zzz' is not known; known: compare, sample"),
    "text of the Hub": (
        {"evaluate": {"text": "hf://datasets/org/name/a.jsonl"}},
        "hf://datasets/org/name/a.jsonl is on the Hub: download it, and give the file's path",
    ),
    "no text": ({"evaluate": {"max_kl": 1.0}}, "evaluate: has no text: give a file of text, or of JSON lines"),
    "a gate": (
        {"evaluate": {"text": "t", "min_top1": 2}},
        "evaluate: min_top1 2: expected a number above 0, at most",
    ),
    "a window": ({"evaluate": {"text": "t", "window": "8"}}, "evaluate: window is not a number above 0"),
    "a dtype": ({"evaluate": {"text": "t", "dtype": "int4"}}, "evaluate: dtype int4: expected one of float32"),
    "no truth": ({"verify": {"compare": "yes"}}, "verify: compare is neither true nor false"),
    "no share": ({"verify": {"sample": 2}}, "verify: sample is not a number above 0, at most 1"),
    "a command line": ({"announce": {"command": "notify team"}}, "announce: command is not a list of texts"),
    "no command": ({"announce": {}}, 'announce: has no command; give a list of texts, such as ["notify", "team"]'),
    "no table": ({"verify": True}, "bool: expected a table of names and values"),
    "an address": ({"out": "ftp://host/x"}, "not a store that is known"),
    "a key in an address": ({"out": "s3://key:secret@bucket/x"}, "an address holds no key and no settings"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_can_not_be_meant_is_refused_by_name(case: str, run: Run, tmp_path: Path) -> None:
    values, said = WRONG[case]

    ran = run("pipeline", job_file(tmp_path, **{"out": "out"} | values))

    assert ran.code == 2
    assert said in ran.err
    assert "secret" not in ran.err
    assert not (tmp_path / "out").exists()


def test_a_job_may_have_tables_of_its_own_beside_those_of_all_jobs(tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(
        "base: ./base\nout: outs\nevaluate: {text: all.txt, max_kl: 0.1}\n"
        "jobs:\n  - {adapter: ./one}\n  - {adapter: ./two, evaluate: {text: own.txt}}\n"
    )

    one, two = (asked.afterwards.measuring for asked in read_file(file, stores=True))

    assert one is not None
    assert two is not None
    assert (one.text.path, two.text.path) == (tmp_path / "all.txt", tmp_path / "own.txt")
    assert (one.gates.max_kl, two.gates.max_kl) == (0.1, 0.1)


def test_an_address_above_the_jobs_has_a_place_for_each(tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text('out = "hf://org"\n[[jobs]]\nadapter = "a/one"\n[[jobs]]\nadapter = "a/two"\nout = "s3://b/x"\n')

    assert [asked.job.store for asked in read_file(file, stores=True)] == ["hf://org/one", "s3://b/x"]
    with pytest.raises(BadRecipe, match="several outputs of one pass go to folders"):
        read_file(file, stores=False)

"""`convert doctor`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_what_is_in_order_ends_with_0_and_is_listed(run: Run, tmp_path: Path) -> None:
    ran = run("doctor", tmp_path, "--offline")

    assert (ran.code, ran.err) == (0, "")
    *findings, verdict = ran.out.splitlines()
    assert verdict == "nothing is wrong"
    assert all(line.startswith(("good  ", "note  ", "      to do: ")) for line in findings)
    assert f"disk: {tmp_path}: writes" in ran.out


def test_what_is_wrong_ends_with_1_and_says_what_to_do(run: Run, tmp_path: Path) -> None:
    ran = run("doctor", tmp_path / "gone", "--offline")

    assert (ran.code, ran.err) == (1, "")
    assert f"wrong disk: {tmp_path}/gone: No such file or directory\n      to do: give a folder in which" in ran.out
    assert ran.out.endswith("1 thing is wrong\n")


def test_json_is_one_object(run: Run, tmp_path: Path) -> None:
    told = json.loads(run("doctor", tmp_path, "--offline", "--json").out)

    assert told["good"] is True
    assert {"what", "state", "found", "step"} == set(told["findings"][0])

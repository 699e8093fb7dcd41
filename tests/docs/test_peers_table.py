"""The tables of docs/performance.md about other tools are what `make peers` recorded."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from tests.conftest import REPOSITORY
from tests.docs.tables import with_tables

PAGE = REPOSITORY / "docs" / "performance.md"
RECORD: dict[str, Any] = json.loads((REPOSITORY / "benchmarks" / "peers" / "peers.json").read_text())
OURS = "convert"
NOTHING_HALF = ("nothing", "all of it")


def figure(row: dict[str, Any], name: str) -> float:
    """The median of some runs."""
    return median(run[name] for run in row["runs"])


def by_time() -> str:
    heads = ["output", "tool", "time", "processor", "memory", "written", "error"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    before = None
    for row in RECORD["rows"].values():
        named = [row["job"] if row["job"] != before else "", "this tool" if row["tool"] == OURS else row["tool"]]
        before = row["job"]
        if "failed" in row:
            lines.append(f"| {' | '.join(named)} | failed | | | | |")
            continue
        times = [f"{figure(row, name):.1f} s" for name in ("seconds", "cpu_seconds")]
        sizes = [f"{figure(row, 'peak') / 1e6:,.0f} MB", f"{figure(row, 'written') / 1e9:.2f} GB"]
        lines.append(f"| {' | '.join([*named, *times, *sizes])} | {row['error']['relative']:.4f} |")
    return "\n".join(lines)


def by_kill() -> str:
    moments = ["half of the bytes", "nearly all bytes"]
    lines = ["| output | tool | killed at half of its bytes | at nearly all | the same command again |"]
    lines.append("| --- |" + " --- |" * 4)
    for name, found in RECORD["killed"].items():
        tool, job = name.split(": ")
        states = [found[moment]["state"] for moment in moments]
        lines.append(f"| {job} | {'this tool' if tool == OURS else tool} | {' | '.join(states)} | {found['again']} |")
    return "\n".join(lines)


TABLES = {"peers": by_time(), "killed": by_kill()}


def test_the_page_has_the_tables_of_what_was_recorded() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text(), TABLES), "run `make pages`, and read the diff"


def test_no_tool_is_ahead_in_time_memory_or_bytes_for_the_same_output() -> None:
    rows = [row for row in RECORD["rows"].values() if "failed" not in row]
    ours = {row["job"]: row for row in rows if row["tool"] == OURS}

    assert len(ours) >= 2
    for name in ("seconds", "cpu_seconds", "peak"):
        assert [row for row in rows if figure(row, name) < figure(ours[row["job"]], name)] == []
    for row in rows:
        assert figure(ours[row["job"]], "written") <= 1.01 * figure(row, "written")


def test_of_this_tool_nothing_or_all_lies_there_after_a_kill_and_the_next_run_is_right() -> None:
    found = [of for name, of in RECORD["killed"].items() if name.startswith(f"{OURS}: ")]

    assert len(found) >= 2
    for of in found:
        assert of["again"] == "right"
        assert all(at["state"] in NOTHING_HALF for name, at in of.items() if name != "again")


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), TABLES))

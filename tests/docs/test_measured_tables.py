"""The table of servers in docs/formats.md is what `make serve-check` recorded."""

from __future__ import annotations

import json
import re
from typing import Any

from converter.recipe import format_meant
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "formats.md"
SERVED = REPOSITORY / "fixtures" / "real" / "served.json"
Record = dict[str, Any]


def recorded() -> Record:
    found: Record = json.loads(SERVED.read_text())
    return found


def by_servers(record: Record) -> str:
    lines = ["| format | vLLM's log-probabilities | `transformers serve` | the adapter |", "| --- | --- | --- | --- |"]
    answers = {True: "the same answer", False: "another answer"}
    for row in record["rows"]:
        vllm = "no kernel on a CPU" if row["vllm"] is None else f"± {row['vllm']:.3f}"
        lines.append(
            f"| {shown(row['name'])} | {vllm} | {answers[row['transformers_serve']]} | ± {row['from_base']:.3f} |"
        )
    return "\n".join(lines)


def shown(name: str) -> str:
    name, _, rest = name.partition(", ")
    return f"`{name}`" + (f", {rest}" if rest else "")


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    rows = by_servers(recorded())
    page, count = re.subn(r"(<!-- served -->\n\n)(?:\|.*\n)*", lambda found: f"{found[1]}{rows}\n", page)
    assert count == 1, f"{PAGE}: no <!-- served -->"
    return page


def test_the_page_has_the_table_of_what_was_recorded() -> None:
    assert PAGE.read_text() == with_table(PAGE.read_text()), "run `make pages`, and read the diff"


def test_what_was_served_had_no_problem_and_differs_by_less_than_half_of_what_the_adapter_changes() -> None:
    rows = recorded()["rows"]

    assert all(format_meant(row["name"].partition(",")[0]) for row in rows)
    assert [row["problem"] for row in rows] == [None] * len(rows)
    assert all(row["vllm"] < row["from_base"] / 2 for row in rows if row["vllm"] is not None)
    assert any(row["vllm"] is not None for row in rows)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))

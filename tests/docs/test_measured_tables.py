"""The tables of docs/formats.md are what `make serve-check` and `make real` recorded."""

from __future__ import annotations

import json
from typing import Any

from converter.recipe import format_meant
from tests.conftest import REPOSITORY
from tests.docs.tables import value_in, with_tables

PAGE = REPOSITORY / "docs" / "formats.md"
REAL = REPOSITORY / "fixtures" / "real"
Record = dict[str, Any]


def recorded(name: str) -> Record:
    found: Record = json.loads((REAL / name).read_text())
    return found


def by_servers(record: Record) -> str:
    lines = ["| format | vLLM's log-probabilities | `transformers serve` | the adapter |", "| --- | --- | --- | --- |"]
    answers = {True: "the same answer", False: "another answer"}
    for row in record["rows"]:
        vllm = "no kernel on a CPU" if row["vllm"] is None else f"± {row['vllm']:.3f}"
        if row["vllm"] is not None and row["tokens"] != record["tokens"]:
            vllm += f", of {row['tokens']} tokens"
        lines.append(
            f"| {shown(row['name'])} | {vllm} | {answers[row['transformers_serve']]} | ± {row['from_base']:.3f} |"
        )
    return "\n".join(lines)


def by_formats(record: Record) -> str:
    heads = ["format", "made by", "size", "perplexity", "error", "survival", "processor", "memory", "loaded by"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    served = {row["name"] for row in recorded("served.json")["rows"] if row["vllm"] is not None}
    for row in record["rows"]:
        ours, usual, name = row["ours"], row["usual"], row["name"]
        loaders = "transformers, vLLM" if name in served else "transformers"
        quality = [f"{ours[part]:.4f}" if ours[part] else "-" for part in ("relative_error", "survival")]
        lines.append(f"| {shown(name)} | this tool | {cells(ours, *quality)} | {loaders} |")
        lines.append(f"| | {USUAL[usual['by']]} | {cells(usual, '', '')} | |")
    return "\n".join(lines)


USUAL = {"peft": "PEFT", "transformers": "PEFT, transformers", "llm-compressor": "PEFT, llm-compressor"}


def cells(found: Record, error: str, survival: str) -> str:
    quality = f"{found['perplexity']:.2f} | {error} | {survival}"
    return f"{found['mb']:.0f} MB | {quality} | {found['seconds']:.0f} s | {found['peak_mb']:,.0f} MB"


def shown(name: str) -> str:
    name, _, rest = name.partition(", ")
    return f"`{name}`" + (f", {rest}" if rest else "")


TABLES = {"served": by_servers(recorded("served.json")), "measured": by_formats(recorded("formats.json"))}


def test_the_page_has_the_tables_of_what_was_recorded() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text(), TABLES), "run `make pages`, and read the diff"


def test_what_was_served_had_no_problem_and_differs_by_less_than_half_of_what_the_adapter_changes() -> None:
    rows = recorded("served.json")["rows"]

    assert all(format_meant(row["name"].partition(",")[0]) for row in rows)
    assert [row["problem"] for row in rows] == [None] * len(rows)
    assert all(row["vllm"] < row["from_base"] / 2 for row in rows if row["vllm"] is not None)
    assert any(row["vllm"] is not None for row in rows)


def test_all_formats_of_the_script_were_measured_and_lose_less_than_a_hundredth_to_the_usual_flow() -> None:
    rows = recorded("formats.json")["rows"]

    assert {row["name"] for row in rows} == value_in(REAL / "formats.py", "FORMATS").keys()
    assert all(format_meant(row["name"].partition(",")[0]) for row in rows)
    assert all(row["usual"]["by"] in USUAL for row in rows)
    for figure, most in {"perplexity": 1.01, "mb": 1.01, "seconds": 1.0, "peak_mb": 1.0}.items():
        assert [row["name"] for row in rows if row["ours"][figure] > most * row["usual"][figure]] == []


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), TABLES))

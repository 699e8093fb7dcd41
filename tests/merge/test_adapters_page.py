"""The tables of docs/adapters.md are what the tests convert, and nothing else."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from tests.conftest import REPOSITORY
from tests.merge.test_bridge import CASES, SETTINGS
from tests.merge.test_kinds import KINDS

PAGE = REPOSITORY / "docs" / "adapters.md"


def by_formulas() -> str:
    rows = [f"| {kind} | {name} | {', '.join(targets(kind))} |" for kind, (name, _) in sorted(KINDS.items())]
    return "\n".join(["| kind | tried on | modules |", "| --- | --- | --- |", *rows])


def targets(kind: str) -> list[str]:
    config = KINDS[kind][1]
    named = config.target_modules or []
    parameters = getattr(config, "target_parameters", None) or []
    return sorted(named if not isinstance(named, str) else [named]) + sorted(parameters)


def by_peft() -> str:
    layers = defaultdict(list)
    for layer, _, _, tuner in CASES:
        layers[tuner].append(layer)
    rows = [
        f"| {tuner} | `{SETTINGS[tuner].get('peft_type', tuner)}` | {', '.join(layers[tuner])} |" for tuner in layers
    ]
    return "\n".join(["| tuner | `peft_type` | layers |", "| --- | --- | --- |", *sorted(rows)])


TABLES = {"formulas": by_formulas(), "peft": by_peft()}


def with_tables(page: str) -> str:
    """The page with the tables as they should be."""
    for mark, table in TABLES.items():
        page, count = re.subn(rf"(<!-- {mark} -->\n\n)(?:\|.*\n)*", lambda found, t=table: f"{found[1]}{t}\n", page)
        assert count == 1, f"{PAGE}: no <!-- {mark} -->"
    return page


def test_the_page_has_the_tables_of_what_is_tried() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text()), "run `make pages`, and read the diff"


def test_another_table_is_written_anew_and_nothing_else() -> None:
    page = PAGE.read_text()

    assert with_tables(page.replace("| LoRA | llama |", "| LoRA | opt |")) == page
    with pytest.raises(AssertionError, match="no <!-- peft -->"):
        with_tables(page.replace("<!-- peft -->", ""))


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))

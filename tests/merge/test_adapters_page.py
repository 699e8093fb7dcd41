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
    return sorted(named if not isinstance(named, str) else [named]) + sorted(config.target_parameters or [])


def by_peft() -> str:
    layers = defaultdict(list)
    for layer, _, _, tuner in CASES:
        layers[tuner].append(layer)
    rows = [
        f"| {tuner} | `{SETTINGS[tuner].get('peft_type', tuner)}` | {', '.join(layers[tuner])} |" for tuner in layers
    ]
    return "\n".join(["| tuner | `peft_type` | layers |", "| --- | --- | --- |", *sorted(rows)])


@pytest.mark.parametrize(
    ("mark", "table"), [("formulas", by_formulas()), ("peft", by_peft())], ids=["formulas", "peft"]
)
def test_the_page_has_the_table_of_what_is_tried(mark: str, table: str) -> None:
    found = re.search(rf"<!-- {mark} -->\n\n((?:\|.*\n)+)", PAGE.read_text())

    assert found is not None, f"expected:\n{table}"
    assert found[1].strip() == table

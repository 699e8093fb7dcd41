"""The tables of docs/adapters.md are what the tests convert, and nothing else."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests.conftest import REPOSITORY
from tests.docs.tables import value_in, with_tables
from tests.merge.test_bridge import CASES, SETTINGS
from tests.merge.test_kinds import KINDS

PAGE = REPOSITORY / "docs" / "adapters.md"
REAL = REPOSITORY / "fixtures" / "real"
NOT_IN_SMOLLM2 = {
    "BEFT", "DoRA on Conv1D", "DoRA on a convolution", "LN tuning with a bias", "convolution", "experts in part",
    "experts one by one", "fused experts", "fused experts of Llama 4", "lora_bias", "router",
}  # fmt: skip
"""Kinds for which the real model has no modules: convolutions, experts, biases."""


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


def on_the_real_model() -> str:
    rows = ["| kind | unmerged | merged | moved, a token | adapter's KL | merge's KL |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    measured = json.loads((REAL / "kinds.json").read_text())
    for kind in value_in(REAL / "kinds.py", "KINDS"):
        if one := measured.get(kind):
            moved = f"{one['moved']:+.4f} ± {one['moved_error']:.4f}"
            rows.append(
                f"| {kind} | {one['unmerged']:.2f} | {one['merged']:.2f} | {moved} | {one['of_adapter']:.3f} | "
                f"{one['of_merge']:.4f} |"
            )
    return "\n".join(rows)


TABLES = {"formulas": by_formulas(), "peft": by_peft(), "real": on_the_real_model()}


def test_the_page_has_the_tables_of_what_is_tried() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text(), TABLES), "run `make pages`, and read the diff"


def test_what_is_shown_of_the_real_model_is_what_its_script_measures() -> None:
    measured = json.loads((REAL / "kinds.json").read_text())

    assert measured.keys() == value_in(REAL / "kinds.py", "KINDS").keys()
    assert [kind for kind, one in measured.items() if one["of_merge"] > 0.1 * one["of_adapter"]] == []
    assert {one["tokens"] for one in measured.values()} == {1020}
    bases = [one["base"] for one in measured.values()]
    assert max(bases) - min(bases) < 0.05


def test_adapters_make_the_text_likelier_merged_and_unmerged_but_for_those_that_the_page_names() -> None:
    measured = json.loads((REAL / "kinds.json").read_text())
    worse = {kind for kind, one in measured.items() if max(one["unmerged"], one["merged"]) >= one["base"]}

    assert worse == {"embedding", "trained tokens", "trained tokens alone"}


def test_every_kind_for_which_the_real_model_has_modules_is_among_them() -> None:
    claimed = {*KINDS, *SETTINGS}

    assert claimed - NOT_IN_SMOLLM2 <= value_in(REAL / "kinds.py", "KINDS").keys()
    assert claimed >= NOT_IN_SMOLLM2


def test_another_table_is_written_anew_and_nothing_else() -> None:
    page = PAGE.read_text()

    assert with_tables(page.replace("| LoRA | llama |", "| LoRA | opt |"), TABLES) == page
    with pytest.raises(AssertionError, match="no <!-- peft -->"):
        with_tables(page.replace("<!-- peft -->", ""), TABLES)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), TABLES))

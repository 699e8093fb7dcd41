"""Tiny models of many architectures: the usual flow's bytes, and a model that loads and says the same.

docs/architectures.md has the table of them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from converter import Recipe, convert
from tests.architectures import KINDS, TINY, WITHOUT_ADAPTER, said, save_tiny, save_tiny_adapter
from tests.conftest import REPOSITORY
from tests.reference import differences, nf4, reference_flow

# Of experts that are one tensor, which "all-linear" doesn't reach.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:target_parameters=:RuntimeWarning"),
]

PAGE = REPOSITORY / "docs" / "architectures.md"
READ_DIRECTLY = {"mamba": ["dt_proj", "lm_head"]}
"""Modules to leave in 16 bits in the usual flow, whose model fails otherwise: see docs/architectures.md."""
ALWAYS = ("deepseek_v3", "mamba2", "t5", "wav2vec2")
"""Those that are tried on each commit; `make slow` tries all."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in TINY]
)
def test_the_output_is_the_usual_flows_and_the_model_says_the_same(name: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", name)
    adapter = save_tiny_adapter(tmp_path / "adapter", base, name) if name not in WITHOUT_ADAPTER else None
    usual = nf4(llm_int8_skip_modules=READ_DIRECTLY[name]) if name in READ_DIRECTLY else nf4()
    reference = reference_flow(base, adapter, tmp_path, usual, torch.bfloat16)

    out = convert(base, adapter, tmp_path / "out", Recipe(merge_precision="reference")).out

    assert differences(out, reference) == []
    expected = said(reference)
    assert expected.isfinite().all()
    assert torch.equal(said(out), expected)


def table() -> str:
    rows = [
        f"| {kind} | `{name}` | {class_name} | {'all linear layers' if name not in WITHOUT_ADAPTER else 'none'} |"
        for kind, models in KINDS.items()
        for name, (class_name, _) in sorted(models.items())
    ]
    return "\n".join(["| kind | `model_type` | class | adapter |", "| --- | --- | --- | --- |", *rows])


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    page, count = re.subn(r"(<!-- tried -->\n\n)(?:\|.*\n)*", lambda found: f"{found[1]}{table()}\n", page)
    assert count == 1, f"{PAGE}: no <!-- tried -->"
    return page


def test_the_page_has_the_table_of_what_is_tried() -> None:
    assert PAGE.read_text() == with_table(PAGE.read_text()), "run `make pages`, and read the diff"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))

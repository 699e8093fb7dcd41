"""docs/formats.md lists every output format, with the bits that a weight takes."""

from __future__ import annotations

import re

import pytest

from converter import Recipe
from converter.quantize.formats import FORMATS, format_of
from tests.conftest import REPOSITORY

SIDE = 4096
ROWS = re.findall(
    r"^\| (`.+`) \| (\S+) \| ([\d.]+) \|$", (REPOSITORY / "docs" / "formats.md").read_text(), re.MULTILINE
)
LISTED = {name: (library, bits) for names, library, bits in ROWS for name in re.findall(r"`([^`]+)`", names)}


def quant_type(name: str) -> str:
    return "none" if name in ("bf16", "fp16") else name


def test_every_format_is_listed() -> None:
    assert {quant_type(name) for name in LISTED} == set(FORMATS)


@pytest.mark.parametrize("name", LISTED)
def test_a_weight_takes_the_bits_that_the_page_says(name: str) -> None:
    chosen = format_of(Recipe(quant_type=quant_type(name), dtype="bfloat16"))  # type: ignore[arg-type]
    outputs = chosen.outputs("layer.weight", (SIDE, SIDE))

    assert LISTED[name] == (
        "none" if quant_type(name) == "none" else chosen.library,
        f"{8 * sum(output.nbytes for output in outputs) / SIDE**2:.3f}",
    )

"""What the README says is true; that its commands and examples work, tests/docs shows."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from PIL import Image

import converter
from converter import ConverterError, convert
from converter.cli.commands import cli
from converter.quantize.formats import FORMATS
from tests.conftest import REPOSITORY
from tests.docs.blocks import PAGES, blocks, check_shape
from tests.docs.test_options_page import PAGE as OPTIONS
from tests.docs.test_options_page import text as options_as_they_are
from tests.folders import change_json, copy

README = (REPOSITORY / "README.md").read_text()
MOST_WORDS = 900


def rows(first: str) -> list[list[str]]:
    """The rows of the table whose first column has this head."""
    table = README[README.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.split(" | ")] for row in (line.strip("| ") for line in table[2:])]


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_each_block_of_the_pages_says_what_it_is() -> None:
    """So that tests/docs can run it, which takes longer."""
    for page in PAGES:
        for block in blocks(page):
            check_shape(block)


def test_the_page_of_options_says_what_the_help_says() -> None:
    assert OPTIONS.read_text() == options_as_they_are(), "run `make pages`, and read the diff"


def test_its_links_and_pictures_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)

    assert links
    for link in links:
        path, _, heading = link.partition("#")
        assert (REPOSITORY / path).is_file(), link
        assert not heading or f"# {heading}" in (REPOSITORY / path).read_text().lower().replace(" ", "-"), link


def test_the_picture_is_small_and_of_one_page() -> None:
    picture = REPOSITORY / "docs" / "report.png"

    assert picture.stat().st_size < 150_000
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width <= 1200


def test_the_formats_that_it_lists_are_those_that_there_are() -> None:
    listed = {name for first, _ in rows("`--format`") for name in re.findall(r"`([\w-]+)`", first)}

    assert {"none" if name in ("bf16", "fp16") else name for name in listed} == {*FORMATS}


def no_base(base: Path, adapter: Path, here: Path) -> None:
    changed = copy(adapter, here / "changed")
    change_json(changed / "adapter_config.json", base_model_name_or_path=None)
    convert(None, changed, here / "out")


def another_module(base: Path, adapter: Path, here: Path) -> None:
    changed = copy(adapter, here / "changed")
    change_json(changed / "adapter_config.json", target_modules=["q_proj"])
    convert(base, changed, here / "out")


def another_conversion(base: Path, adapter: Path, here: Path) -> None:
    convert(base, None, here / "out")
    convert(base, adapter, here / "out")


PROVOKED: dict[str, Callable[[Path, Path, Path], None]] = {
    "does not name its base": no_base,
    "its target_modules don't name it": another_module,
    "holds another conversion": another_conversion,
}
FROM_OUTSIDE = ("the repository is gated", "bytes are needed, the disk has")
"""Messages of the Hub and of a disk: tests/read/test_hub.py and tests/cli/test_convert.py provoke them."""


def test_the_five_messages_that_it_explains_are_messages() -> None:
    assert {first for first, _ in rows("message")} == {*PROVOKED, *FROM_OUTSIDE}


@pytest.mark.parametrize("message", PROVOKED)
def test_a_message_that_it_explains_comes_where_it_should(
    message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConverterError, match=re.escape(message)):
        PROVOKED[message](base, adapter, tmp_path)


def test_the_messages_from_outside_are_written_so() -> None:
    trees = [ast.parse(path.read_text()) for path in (REPOSITORY / "converter").rglob("*.py")]
    texts = [n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is str]

    for message in FROM_OUTSIDE:
        assert any(message in text for text in texts), message


def test_every_option_says_what_it_does() -> None:
    for command in (cli, *cli.commands.values()):
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


def test_every_public_name_is_documented() -> None:
    for name in converter.__all__:
        assert getattr(converter, name).__doc__, name

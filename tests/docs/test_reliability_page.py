"""docs/reliability.md names the test of every fault."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "reliability.md"


def test_every_test_that_the_page_names_is_there() -> None:
    file, named = "", 0
    for path, test in re.findall(r"`(?:pytest )?(tests/[\w/.]+)?(?:::(test_\w+))?`", PAGE.read_text()):
        file = path or file
        if path:
            assert (REPOSITORY / path).exists(), path
        if test:
            named += 1
            assert f"def {test}(" in (REPOSITORY / file).read_text(), f"{file}: no {test}"
    assert named > 10

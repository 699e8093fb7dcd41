"""Tables of the docs that come from records: where they stand in a page, and what a script says it measures."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table after its mark, an HTML comment with the table's name."""
    for mark, rows in tables.items():
        page, count = re.subn(rf"(<!-- {mark} -->\n\n)(?:\|.*\n)*", lambda found, t=rows: f"{found[1]}{t}\n", page)
        assert count == 1, f"no <!-- {mark} -->"
    return page


def value_in(script: Path, name: str) -> Any:
    """The value that a script gives to an annotated name, read without running it."""
    for statement in ast.parse(script.read_text()).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == name:
            assert statement.value is not None
            return ast.literal_eval(statement.value)
    raise AssertionError(f"{script} has no {name}")

"""What people see, as golden files: in terminals of 80 and 40 columns, and without a terminal.

After an intended change: `make golden`, and read the diff.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cli.terminal import run_here, shown
from tests.models import save_adapter, save_base

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (80, 40, None)
"""Columns; None: no terminal."""
COMMANDS: dict[str, list[str]] = {
    "alone": [],
    "help": ["--help"],
    "help-batch": ["batch", "--help"],
    "help-verify": ["verify", "--help"],
    "help-evaluate": ["evaluate", "--help"],
    "help-benchmark": ["benchmark", "--help"],
    "help-pipeline": ["pipeline", "--help"],
    "help-export": ["export", "--help"],
    "conversion": ["--base", "base", "--adapter", "adapter", "--out", "out"],
    "refusal": ["--base", "adapter", "--adapter", "base", "--out", "out"],
    "gate": ["--base", "base", "--adapter", "adapter", "--out", "gated", "--max-error", "0.05"],
    "batch": ["--base", "base", "--adapter", "adapter", "--adapter", "empty", "--out", "outs"],
    "verify": ["verify", "made"],
}
VARIES = (
    (re.compile(r"\b\d+\.\d s\b"), "#.# s"),
    (re.compile(r"memory \d+\.\d [kMG]B"), "memory # MB"),
    (re.compile(r"\b0\.\d{4}\b|\b0\.0\d{3,}\b"), "0.####"),
    (re.compile(r"\((model\.layers\S+)\)|tensor \S+|(?<=: )model\.layers\.\d+\.\S+(?= has)"), "(a tensor)"),
    (re.compile(r"the worst of \d+"), "the worst of #"),
    (re.compile(r" {2,}(?=\S)"), "  "),
)
"""What another machine would print otherwise; and columns of a table, which these make wider."""


def prepared(folder: Path) -> Path:
    """A folder with what the commands name."""
    base = save_base(folder / "base", "llama")
    save_adapter(folder / "adapter", base, "llama")
    (folder / "empty").mkdir()
    return folder


def screen(name: str, columns: int | None, folder: Path, environment: Mapping[str, str]) -> str:
    """What one command shows, run in this folder."""
    arguments = COMMANDS[name]
    if columns is None:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = run_here(arguments, folder, environment, (out.fileno(), err.fileno()))
            for file in (out, err):
                file.seek(0)
            text = f"exit code {code}\n--- stdout\n{out.read()}--- stderr\n{err.read()}"
    else:
        text = shown(arguments, columns, folder, environment)
    text = text.replace(str(folder), "HERE")
    if not name.startswith("help") and name != "alone":
        for pattern, instead in VARIES:
            text = pattern.sub(instead, text)
    return text


def golden(name: str, columns: int | None) -> Path:
    return GOLDEN / f"{name}-{columns or 'no-terminal'}.txt"


def main(names: Sequence[str]) -> None:
    """Write the files of some commands, of all by default."""
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for columns in WIDTHS:
            with tempfile.TemporaryDirectory() as place:
                folder = prepared(Path(place).resolve())
                made_before(folder, {"XDG_CACHE_HOME": cache})
                for name in names or COMMANDS:
                    golden(name, columns).write_text(screen(name, columns, folder, {"XDG_CACHE_HOME": cache}))


def made_before(folder: Path, environment: Mapping[str, str]) -> None:
    """The output that is verified."""
    words = ["--base", "base", "--adapter", "adapter", "--out", "made", "--quiet"]
    assert run_here(words, folder, environment, (1, 2)) == 0


if __name__ == "__main__":
    main(sys.argv[1:])

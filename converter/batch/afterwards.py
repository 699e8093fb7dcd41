"""What a file of jobs asks for after the conversion: its tables verify, evaluate and announce."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from converter.errors import BadRecipe
from converter.evaluation import Measuring
from converter.gates import QualityGates
from converter.layers.texts import Text
from converter.read.hub.datasets import is_dataset_file

VERIFY, EVALUATE, ANNOUNCE = TABLES = ("verify", "evaluate", "announce")
_GATES = [field.name for field in fields(QualityGates)]
_NUMBERS, _TEXTS = ("window", "max_tokens", "memory"), ("text", "field", "dtype", "scratch")
_KNOWN = {
    VERIFY: ["compare", "sample"],
    EVALUATE: [*_TEXTS, *_NUMBERS, *_GATES],
    ANNOUNCE: ["command"],
}


@dataclass(frozen=True)
class Afterwards:
    """What becomes of an output before it is published, and who hears of it then."""

    compare: bool = False
    """Make the output again from base and adapter, and compare."""
    sample: float = 1.0
    """Share of the tensors that are made again."""
    measuring: Measuring | None = None
    """On which text it is measured, against the 16-bit model. None: on none."""
    command: tuple[str, ...] = ()
    """A program and its arguments, which gets the result on its standard input."""
    folder: Path = Path()
    """In which the command runs: that of the file."""

    @classmethod
    def of(cls, tables: Mapping[str, Mapping[str, Any]], folder: Path) -> Afterwards:
        """From the tables of a file in `folder`. `BadRecipe` names what can't be meant."""
        for name, table in tables.items():
            refuse_unknown(table, _KNOWN[name], f"{name}: ")
        verify, announce = tables.get(VERIFY, {}), tables.get(ANNOUNCE, {})
        compare, sample = verify.get("compare", False), verify.get("sample", 1.0)
        if not isinstance(compare, bool):
            raise BadRecipe(f"{VERIFY}: compare is neither true nor false")
        if isinstance(sample, bool) or not isinstance(sample, int | float) or not 0 < sample <= 1:
            raise BadRecipe(f"{VERIFY}: sample is not a number above 0, at most 1")
        command = announce.get("command", [])
        if not isinstance(command, list) or not all(isinstance(word, str) and "\0" not in word for word in command):
            raise BadRecipe(f'{ANNOUNCE}: command is not a list of texts, such as ["notify", "team"]')
        if ANNOUNCE in tables and not command:
            raise BadRecipe(f'{ANNOUNCE}: has no command; give a list of texts, such as ["notify", "team"]')
        measuring = _measuring(tables[EVALUATE], folder) if EVALUATE in tables else None
        return cls(compare, float(sample), measuring, tuple(command), folder)


def refuse_unknown(keys: Iterable[str], known: Sequence[str], where: str = "") -> None:
    """`BadRecipe` for a key that is not known, with the one that was perhaps meant."""
    if unknown := sorted(set(keys) - set(known)):
        alike = get_close_matches(unknown[0], known, n=1)
        meant = f"did you mean {alike[0]!r}?" if alike else f"known: {', '.join(known)}"
        raise BadRecipe(f"{where}{unknown[0]!r} is not known; {meant}")


def _measuring(table: Mapping[str, Any], folder: Path) -> Measuring:
    for key in _TEXTS:
        if key in table and (not isinstance(table[key], str) or not table[key] or "\0" in table[key]):
            raise BadRecipe(f"{EVALUATE}: {key} is not a text")
    for key in _NUMBERS:
        if key in table and (not isinstance(table[key], int) or isinstance(table[key], bool) or table[key] < 1):
            raise BadRecipe(f"{EVALUATE}: {key} is not a number above 0")
    if "text" not in table:
        raise BadRecipe(f"{EVALUATE}: has no text: give a file of text, or of JSON lines")
    if is_dataset_file(table["text"]):
        raise BadRecipe(f"{EVALUATE}: text: {table['text'][:200]} is on the Hub: download it, and give the file's path")
    scratch = table.get("scratch")
    try:
        return Measuring(
            Text(folder / Path(table["text"]).expanduser(), table.get("field")),
            **{key: table[key] for key in (*_NUMBERS, "dtype") if key in table},
            scratch=None if scratch is None else folder / Path(scratch).expanduser(),
            gates=QualityGates(**{key: table[key] for key in _GATES if key in table}),
        )
    except (BadRecipe, RuntimeError) as exc:  # RuntimeError: a home folder of nobody
        raise BadRecipe(f"{EVALUATE}: {exc}") from exc

"""How an output is calibrated: which text says what a weight's inputs are like, and what is made of that."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from converter.errors import BadRecipe

DEFAULT_TOKENS, DEFAULT_WINDOW = 32_768, 2048
SELF = "self"
"""In the place of a text: text that the merged model itself writes."""
SELF_WINDOW = 64
"""Tokens in a window of such a text. Each token takes one pass over the base, for all windows together."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Calibration:
    """The choices that shape a calibrated output's bytes. `BadRecipe` for a value out of range."""

    text: str
    """sha256 of the text's file, or `SELF`."""
    field: str | None = None
    """The name of a document in a JSON line; None: `text` in files named .jsonl and .ndjson."""
    tokens: int = DEFAULT_TOKENS
    """No window begins once there are so many tokens."""
    window: int | None = None
    """Tokens that the model sees at a time. None: 2048, or as many as the model takes; of `SELF`, 64."""
    damping: float = 0.01
    """What is added to the diagonal of the inputs' second moments, in means of it."""
    scales: Literal["inputs", "format"] = "inputs"
    """inputs: each block gets the scale that changes the weight's outputs least. format: each block gets the scale of
    the format's library."""
    sweeps: int = 2
    """How many times all codes are chosen again, one by one, while the others stay."""
    seed: int | None = None
    """The seed by which the tokens of `SELF` are drawn. None: 0."""

    def __post_init__(self) -> None:
        if self.text != SELF and not _SHA256.fullmatch(str(self.text)):
            raise BadRecipe(f"`calibrate`: expected the sha256 of a text, or {SELF}")
        if self.is_self and self.field is not None:
            raise BadRecipe(f"`calibrate_field` has no meaning with `calibrate` {SELF}: there is no file")
        if not self.is_self and self.seed is not None:
            raise BadRecipe(f"`calibrate_seed` has no meaning with a text: only `calibrate` {SELF} draws by chance")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise BadRecipe(f"`calibrate_seed` {self.seed!s:.40}: expected a whole number from 0 on")
        if self.field is not None and not isinstance(self.field, str):
            raise BadRecipe("`calibrate_field`: expected a name")
        if type(self.tokens) is not int or not 128 <= self.tokens < 2**40:
            raise BadRecipe(f"`calibrate_tokens` {self.tokens!s:.40}: expected at least 128")
        if self.window is not None and (type(self.window) is not int or not 2 <= self.window < 2**30):
            raise BadRecipe(f"`calibrate_window` {self.window!s:.40}: expected at least 2 tokens")
        if type(self.damping) not in (int, float) or not (math.isfinite(self.damping) and 0 < self.damping <= 1):
            raise BadRecipe(f"`damping` {self.damping!s:.40}: expected a number above 0, at most 1")
        if self.scales not in ("inputs", "format"):
            raise BadRecipe(f"`scales` {self.scales!s:.40}: expected inputs or format")
        if type(self.sweeps) is not int or not 0 <= self.sweeps <= 100:
            raise BadRecipe(f"`sweeps` {self.sweeps!s:.40}: expected a whole number from 0 to 100")

    @classmethod
    def of(cls, text: Path | None, **choices: Any) -> Calibration:
        """The calibration by a text's file; None: by what the model writes. `BadRecipe` if it can't be read."""
        return cls(SELF if text is None else sha256_of_text(text), **choices)

    @property
    def is_self(self) -> bool:
        """Whether the merged model itself writes the text."""
        return self.text == SELF

    @property
    def sequences(self) -> tuple[int, int]:
        """Of `SELF`: how many windows are written, and of how many tokens."""
        size = self.window or SELF_WINDOW
        return -(-self.tokens // size), size

    @classmethod
    def from_json(cls, stated: object) -> Calibration:
        """A calibration from JSON values, such as `as_json` gives. `BadRecipe` for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(stated, dict) or not stated.keys() <= names or "text" not in stated:
            raise BadRecipe("calibration is not a table of its names and values")
        return cls(**stated)

    def as_json(self) -> dict[str, Any]:
        """JSON values, without a seed that isn't given."""
        return {name: value for name, value in asdict(self).items() if name != "seed" or value is not None}


def sha256_of_text(text: Path) -> str:
    """`BadRecipe` for a file that can't be read."""
    try:
        with text.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise BadRecipe(f"`calibrate` {text}: {exc.strerror}; give a file of text, or of JSON lines") from exc

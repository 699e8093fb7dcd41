"""JSON objects from files that nobody vouches for, parsed within limits."""

from __future__ import annotations

import json
from typing import Any

from converter.errors import BadCheckpoint
from converter.read.folder import Folder, read_bytes

MAX_JSON_BYTES = 50_000_000  # an index of all the tensors that are allowed
MAX_JSON_VALUES = 3_000_000  # in one file; what Python makes of a value takes up to 300 bytes
MAX_JSON_DEPTH = 64  # what copies or writes JSON again is recursive


def read_json(folder: Folder, name: str, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object; `BadCheckpoint` for anything else, duplicate keys, NaN and bottomless nesting included."""
    return parse_json_object(read_bytes(folder, name, limit=limit), f"{folder.label}: {name}")


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes; `where` begins the message of the `BadCheckpoint` raised for anything else."""
    # Counted before they are made; commas and brackets in strings count, too, for no real file comes near the limit.
    if sum(raw.count(mark) for mark in b",[{") > MAX_JSON_VALUES:
        raise BadCheckpoint(f"{where}: more than {MAX_JSON_VALUES:,} values")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"key {twice[:60]!r} occurs twice")
        return result

    def constant(text: str) -> float:
        # Infinity is found in real configs (Mamba's time_step_limit); no setting means NaN.
        if text == "NaN":
            raise ValueError("NaN is not a value")
        return float(text)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as exc:
        raise BadCheckpoint(f"{where}: nested too deeply") from exc
    except (ValueError, UnicodeDecodeError) as exc:
        raise BadCheckpoint(f"{where}: not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{where}: holds {type(value).__name__}, expected an object")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise BadCheckpoint(f"{where}: nested too deeply")
    return value


def _is_deeper(value: object, depth: int) -> bool:
    """Whether objects and arrays are nested more than `depth` deep."""
    level: list[Any] = [value]
    for _ in range(depth):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return False
    return True

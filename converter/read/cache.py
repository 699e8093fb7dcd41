"""What a run finds out that later runs of the same user need not find out again.

Only a convenience: where nothing can be read or written, it is found out again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder of this user: `$XDG_CACHE_HOME/nf4-converter`, or `~/.cache/nf4-converter`."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("nf4-converter", appauthor=False)
    except RuntimeError:  # a container's user who is in no list and has no home: nothing is kept
        return Path(os.devnull) / "nf4-converter"


def key_of(folder: Path) -> str:
    """The key for what is known about a folder: a hash of its place."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def load(kind: str, key: str) -> Any:
    """What an earlier run stored; None if there is nothing, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(_file(kind, key).read_text())
    return None


def store(kind: str, key: str, value: Any, *, most: int | None = None) -> None:
    """Write JSON values for later runs. `most`: how many of the kind are kept, the newest."""
    path = _file(kind, key)
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value))
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):  # a full disk has room for empty files, one a run
            temporary.unlink()
    if most is not None:
        with contextlib.suppress(OSError):
            by_age = sorted(path.parent.glob("*.json"), key=lambda old: old.stat().st_mtime)
            for old in by_age[:-most]:
                old.unlink()


def _file(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{key}.json"

"""Several adapters named by one word: a folder that holds them, or a glob such as `ads/*`."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from converter.errors import BadRecipe
from converter.merge.files import CONFIG
from converter.read.folder import is_folder

_WILDCARD = re.compile(r"[*?\[]")


def names_several(text: str, parent: Path = Path()) -> bool:
    """Whether `text` is a glob, or a folder that is no adapter itself but holds some; relative to `parent`."""
    there = parent / Path(text).expanduser()
    if not is_folder(there):
        return _WILDCARD.search(text) is not None
    return not _is_adapter(there) and any(_is_adapter(there / name) for name in _names_in(there))


def adapters_of(text: str, parent: Path = Path()) -> dict[str, Path]:
    """Name → folder of every adapter that `text` means, a glob or a folder of adapters, in the order of their paths.

    Folders without an adapter_config.json are passed over. An adapter is called as its path goes on after the part
    without wildcards: `runs/*/final` gives `first-final`, `second-final`. `BadRecipe` if there is none, or if two get
    the same name.
    """
    start = parent / Path(text).expanduser()
    if is_folder(start):
        found = _names_in(start)
    else:
        parts = Path(text).expanduser().parts
        fixed = next(number for number, part in enumerate(parts) if _WILDCARD.search(part))
        start = parent.joinpath(*parts[:fixed])
        found = glob.glob(os.path.join(*parts[fixed:]), root_dir=start, recursive=True)  # noqa: PTH118, PTH207
    adapters: dict[str, Path] = {}
    for below in sorted(map(os.path.normpath, found)):
        if not _is_adapter(start / below):
            continue
        name = below.replace("/", "-")
        if name in adapters:
            raise BadRecipe(f"{text}: both {adapters[name]} and {start / below} would be called {name}; name them")
        adapters[name] = start / below
    if not adapters:
        raise BadRecipe(f"{text}: no adapters there: no folder that it matches has an {CONFIG}")
    return adapters


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as exc:
        raise BadRecipe(f"{folder}: {exc.strerror}") from exc


def _is_adapter(folder: Path) -> bool:
    return os.path.isfile(folder / CONFIG)  # noqa: PTH113  (`Path.is_file` raises for a name that is too long)

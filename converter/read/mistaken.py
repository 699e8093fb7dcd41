"""Things that people give by mistake instead of a model's folder, and what to give instead."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

_FROM = "give the folder of the transformers checkpoint that it was made from"
_GGUF = f"for llama.cpp; {_FROM}"
_OF_A_FOLDER = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".md", ".txt", ".model", ".jinja")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z")
_ADAPTER = "adapter_config.json"
_MOST_ENTRIES = 10_000
"""Of a folder, that are looked through for models."""
_OTHERS = (
    ("model_index.json", "a pipeline of diffusers; give the folder of its language model, such as its text_encoder"),
    ("params.json", f"a model in its maker's own format; {_FROM}, or the one that was made from it"),
    ("*.npz", "weights of MLX; give the folder of the transformers checkpoint that they were made from"),
    ("*.onnx", f"a model for ONNX; {_FROM}"),
    ("*.nemo", f"a model for NeMo; {_FROM}"),
)


def instead_of_a_folder(path: Path) -> str:
    """What is wrong with a path that is no folder, and what to do."""
    if not os.path.isfile(path):  # noqa: PTH113  (`Path.is_file` raises for a name that is too long)
        return f"no such folder{similar_folders(path)}"
    match path.suffix.lower():
        case ".gguf":
            return f"a GGUF file, {_GGUF}"
        case suffix if suffix in _OF_A_FOLDER:
            return f"a file; give its folder, {path.parent}"
        case suffix if suffix in _ARCHIVES:
            return "an archive; unpack it, and give the folder"
    return "a file; give the folder of a model or an adapter"


def similar_folders(path: Path) -> str:
    """Folders beside a missing one whose names are alike, as a question; empty if there are none."""
    try:
        with os.scandir(path.parent) as entries:
            there = [entry.name for entry in itertools.islice(entries, _MOST_ENTRIES) if entry.is_dir()]
    except OSError:
        return ""
    alike = [str(path.with_name(name)) for name in get_close_matches(path.name, there, n=3, cutoff=0.75)]
    return f"; did you mean {' or '.join(alike)}?" if alike else ""


def instead_of_a_checkpoint(names: Iterable[str], path: Path | None) -> str | None:
    """What a folder without a config.json is, and what to do. None where nothing is known of it."""
    files = sorted(names)
    if _ADAPTER in files:
        return "a PEFT adapter, not a model; give it as `adapter`"
    if gguf := next((name for name in files if name.endswith(".gguf")), None):
        return f"has a model in GGUF ({gguf}), {_GGUF}"
    if models := _models_in(path):
        listed = ", ".join(models[:8])
        return f"no model itself, but its folders are: {listed}; give one of them, as {path}/{models[0]}"
    return next((what for pattern, what in _OTHERS if any(fnmatchcase(name, pattern) for name in files)), None)


def _models_in(path: Path | None) -> list[str]:
    if path is None:
        return []
    with os.scandir(path) as entries:
        some = [entry.name for entry in itertools.islice(entries, _MOST_ENTRIES)]
    return sorted(name for name in some if os.path.isfile(path / name / "config.json"))  # noqa: PTH113

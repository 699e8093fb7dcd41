"""Folders that tests compare, change and watch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by name; of folders in it, only the names."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.iterdir())}


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(file: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change one tensor of a shard, in place: the file keeps its size, its time and its inode."""
    before = file.stat()
    tensors = load_file(file)
    change(tensors[name])
    changed = file.with_name("changed")
    save_file(tensors, changed, metadata={"format": "pt"})
    assert changed.stat().st_size == before.st_size
    with file.open("r+b") as shard:
        shard.write(changed.read_bytes())
    changed.unlink()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_bit(file: Path, at: int = -1) -> None:
    """Make one bit of a byte another; the last byte is a weight's."""
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def write_sums(folder: Path, *more: str) -> None:
    """SHA256SUMS of a folder's weights, as `sha256sum *.safetensors` prints it, and more lines."""
    files = sorted(folder.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in [*lines, *more]))


def copy(folder: Path, target: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(folder, target)
    return target

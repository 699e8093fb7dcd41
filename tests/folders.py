"""Folders that tests compare, change and watch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from converter.errors import BadCheckpoint, InputChanged
from converter.read.folder import LocalFolder, Progress


class MemoryFolder:
    """Files that are nowhere but in memory: a `Folder` for tests of what reads one."""

    path = None
    repo_id = None
    commit = None

    def __init__(self, files: Mapping[str, bytes], label: str = "memory") -> None:
        self.files = dict(files)
        self.label = label
        self.read: list[tuple[str, int, int]] = []
        """What was read: file, offset, bytes."""

    def names(self) -> frozenset[str]:
        return frozenset(name for name in self.files if "/" not in name)

    def inner_names(self) -> frozenset[str]:
        return frozenset(name for name in self.files if "/" in name)

    def size(self, name: str) -> int:
        if name not in self.files:
            raise BadCheckpoint(f"{self.label}: no {name}")
        return len(self.files[name])

    def digest(self, name: str) -> str | None:
        return f"sha256:{hashlib.sha256(self.files[name]).hexdigest()}"

    def identity(self, name: str) -> list[int]:
        return []

    def state(self, name: str) -> list[int]:
        return []

    def fetch(self, names: Iterable[str], progress: Progress | None = None) -> LocalFolder:
        raise AssertionError("files in memory have no folder")

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        part = self.files[name][offset : offset + len(buffer)]
        self.read.append((name, offset, len(buffer)))
        if len(part) < len(buffer):
            raise InputChanged(f"{self.label}: {name}: ends at byte {offset + len(part)}")
        buffer[:] = part

    def expect(self, name: str, offset: int) -> None:
        pass

    def close(self) -> None:
        pass


def shard_bytes(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file, right or wrong: `header` as JSON, or as it is where it is bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


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

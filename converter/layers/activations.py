"""What passes from layer to layer: in memory, and beyond a budget in a file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from converter.errors import ReadFailed
from converter.write.durable import writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class _Slot:
    """Where one tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Activations:
    """Tensors by number. Each keeps its shape; those that `budget`, in bytes, has no room for are in a file of the
    folder, which has no name and is gone when this is closed. None: the system's folder for such files."""

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self._left = budget
        self._folder = Path(folder or tempfile.gettempdir())
        self._kept: dict[int, Tensor] = {}
        self._slots: dict[int, _Slot] = {}
        self._file: int | None = None
        self.file_bytes = 0
        """Bytes of the file; 0: all tensors are in memory."""

    def put(self, number: int, value: Tensor) -> None:
        """Keep a tensor in the place of the one that had its number. `WriteFailed` if the disk is full."""
        value = value.detach().cpu().contiguous()
        if number not in self._slots and (number in self._kept or value.nbytes <= self._left):
            self._left -= value.nbytes if number not in self._kept else 0
            self._kept[number] = value
            return
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = _Slot(self.file_bytes, tuple(value.shape), value.dtype)
            self.file_bytes += value.nbytes
        self._write(slot, value)

    def get(self, number: int) -> Tensor:
        """The tensor of this number. `KeyError` if there is none, `ReadFailed` if the disk fails."""
        import torch

        if number in self._kept:
            return self._kept[number]
        slot = self._slots[number]
        value = torch.empty(slot.shape, dtype=slot.dtype)
        raw, done = memoryview(value.view(torch.uint8).numpy()).cast("B"), 0
        assert self._file is not None  # noqa: S101  (a slot has a file)
        while done < len(raw):
            try:
                count = os.preadv(self._file, [raw[done:]], slot.offset + done)
            except OSError as exc:
                raise ReadFailed(f"{self._folder}: reading activations: {exc.strerror}") from exc
            if not count:
                raise ReadFailed(f"{self._folder}: the file of activations ends at byte {slot.offset + done}")
            done += count
        return value

    def close(self) -> None:
        """Forget all."""
        self._kept.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, slot: _Slot, value: Tensor) -> None:
        import torch

        with writing(self._folder / "activations", self.file_bytes):
            if self._file is None:
                self._file, path = tempfile.mkstemp(prefix="activations-", dir=self._folder)
                Path(path).unlink()
            raw, done = memoryview(value.view(torch.uint8).numpy()).cast("B"), 0
            while done < len(raw):
                done += os.pwrite(self._file, raw[done:], slot.offset + done)

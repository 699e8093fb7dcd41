"""What an interrupted run over layers leaves for the next one: of each batch, how many layers it has gone through, and
what came out of the last of them.

A file is a line of JSON and the bytes of the tensor. A file that is damaged is ignored: the batch is run again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from converter.tensors import as_bytes
from converter.write.durable import writing

if TYPE_CHECKING:
    from torch import Tensor


class Kept:
    """One file a batch in `folder`, whose names begin with evaluation- and `key`, which says what the run is about."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def save(self, batch: int, layers: int, hidden: Tensor) -> None:
        """Keep what a batch is after so many layers, in the place of what it was before. `WriteFailed`."""
        raw = as_bytes(hidden.detach().cpu().contiguous())
        stated = {"layers": layers, "dtype": str(hidden.dtype).removeprefix("torch."), "shape": list(hidden.shape)}
        stated["digest"] = self._digest(stated, raw)
        path = self._path(batch)
        unfinished = path.with_suffix(".unfinished")
        with writing(path, len(raw)):
            with unfinished.open("wb") as file:
                file.write(json.dumps(stated).encode() + b"\n")
                file.write(raw)
            unfinished.rename(path)

    def load(self, batch: int) -> tuple[int, Tensor] | None:
        """How many layers a batch has gone through, and what it is then; None: nothing is known of it."""
        import torch

        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            head, _, raw = self._path(batch).read_bytes().partition(b"\n")
            stated = json.loads(head)
            if stated.pop("digest") == self._digest(stated, raw):
                values = torch.frombuffer(bytearray(raw), dtype=getattr(torch, stated["dtype"]))
                return int(stated["layers"]), values.view(stated["shape"])
        return None

    def remove(self) -> None:
        """Remove the files."""
        for path in self._folder.glob(f"evaluation-{self._key}-*"):
            with suppress(OSError):
                path.unlink()

    def _path(self, batch: int) -> Path:
        return self._folder / f"evaluation-{self._key}-{batch}.layers"

    @staticmethod
    def _digest(stated: dict[str, object], raw: bytes | memoryview) -> str:
        found = xxhash.xxh3_128(json.dumps(stated, sort_keys=True).encode())
        found.update(raw)
        return found.hexdigest()

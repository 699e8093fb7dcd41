"""What tests of batches have in common: jobs, what happens while they run, and what is counted."""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from converter import BatchOptions, Job, Outcome, Recipe, Resources, convert_batch
from converter.batch.run import Access
from converter.errors import Interrupted
from converter.observer import Progress
from converter.plan.inputs import Base
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from tests.folders import change_tensor, copy
from tests.models import save_adapter

ATTENTION = ["q_proj", "v_proj"]
SMALL_SHARDS = Recipe(max_shard_size=1_000_000)
EVERY_TENSOR_IS_NOTED = BatchOptions(Resources(journal_seconds=0.0))


def adapters(folder: Path, base: Path, name: str = "llama") -> list[Path]:
    """Three different adapters, two of attention and one of all layers."""
    targets: list[dict[str, Any]] = [{"target_modules": ATTENTION}, {"target_modules": ATTENTION}, {}]
    return [
        save_adapter(folder / f"a{number}", base, name, scale=0.03 * (number + 1), **some)
        for number, some in enumerate(targets)
    ]


def jobs_for(some: Sequence[Path], base: Path, out: Path, recipe: Recipe = Recipe()) -> list[Job]:
    return [Job(out / adapter.name, adapter, base, recipe) for adapter in some]


def interrupt(jobs: list[Job], tiles: int) -> None:
    """Begin a batch, and have a signal end it after so many tiles."""
    count = itertools.count()
    with pytest.raises(Interrupted, match="what is done is kept"):
        convert_batch(jobs, EVERY_TENSOR_IS_NOTED, stop=lambda: signal.SIGTERM if next(count) == tiles else None)


def once(act: Callable[[], object], *, at: int = 1) -> Callable[[Progress], None]:
    """Something that another program does when `at` tensors are converted."""
    count = itertools.count(1)
    return lambda progress: act() if progress.stage == "converting" and next(count) == at else None


def overflowing(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter whose sum with the base is no float."""
    huge = copy(adapter, folder)
    for half in ("lora_A", "lora_B"):
        change_tensor(huge / "adapter_model.safetensors", a_factor(huge, half), lambda value: value.fill_(3e38))
    return huge


def a_factor(adapter: Path, half: str = "lora_B") -> str:
    names = load_file(adapter / "adapter_model.safetensors")
    return next(name for name in names if half in name and "q_proj" in name)


def statuses(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def linked(folder: Path) -> list[Path]:
    return [shard for shard in shards(folder) if shard.stat().st_nlink > 1]


def inodes(folder: Path) -> set[int]:
    """Of the shards that other outputs have, too."""
    return {shard.stat().st_ino for shard in linked(folder)}


def names_in(folder: Path) -> list[str]:
    """Its files and folders; of a folder of shared shards, not which."""
    return sorted(".shared" if path.name.startswith(".shared-") else path.name for path in folder.iterdir())


@dataclass
class Reads:
    """Counts the tiles of bases that are read."""

    tiles: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By tensor and the first byte of the tile."""
    rows: Counter[str] = field(default_factory=Counter)
    """By tensor."""

    @property
    def access(self) -> Access:
        """How a batch gets at bases that are counted."""
        return Access(base=self._base)

    def _base(self, reference: Path, revision: str | None = None, **how: Any) -> Base:
        opened = Base(reference, revision, **how)
        opened.checkpoint.close()
        folder = _CountingFolder(Path(reference), self)
        opened.checkpoint = folder.checkpoint = Checkpoint(folder)
        return opened


class _CountingFolder(LocalFolder):
    """Tiles are what is announced by `expect` before it is read."""

    checkpoint: Checkpoint

    def __init__(self, path: Path, reads: Reads) -> None:
        super().__init__(path)
        self._reads = reads
        self._expected = ("", -1)

    def expect(self, name: str, offset: int) -> None:
        self._expected = (name, offset)
        super().expect(name, offset)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if self._expected == (name, offset):
            self._expected = ("", -1)
            tensor = next(t for t in self.checkpoint if t.file == name and t.offset <= offset < t.offset + t.nbytes)
            self._reads.tiles[tensor.name, offset] += 1
            self._reads.rows[tensor.name] += len(buffer) * tensor.shape[0] // tensor.nbytes
        super().read_into(name, offset, buffer)

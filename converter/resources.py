"""What a conversion may use."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec

DEFAULT_MEMORY = 512_000_000
"""Bytes, if nothing else is asked for."""


@dataclass(frozen=True)
class Resources:
    """What a conversion may use. None of it changes a byte of the output."""

    memory: int | None = None
    """Bytes above the imports. None: `DEFAULT_MEMORY`, or more where a tensor that can't be cut, or very many tensors,
    need more."""
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Threads that convert tiles; 1: no other thread computes."""
    kernels: bool = field(default_factory=lambda: find_spec("numba") is not None)
    """Whether the CPU kernels quantize; not so on an accelerator, or without numba."""

    tile_weights: tuple[int, int] = (1 << 16, 2 << 20)
    """Weights of a tile, at least and at most: larger tiles were no faster."""
    journal_seconds: float = 3.0
    """How often what is done is made durable and noted, so that an interrupted run can be resumed."""

    @property
    def slots(self) -> int:
        """Tiles in memory at a time: one a thread, and one that is being read."""
        return 1 if self.threads == 1 else self.threads + 1

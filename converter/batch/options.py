"""How a batch is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converter.job import RunOptions
from converter.seal.link import How


@dataclass(frozen=True)
class BatchOptions(RunOptions):
    """How a batch is run. Nothing here but `device` and `link` changes a byte of an output."""

    strict: bool = False
    """Convert nothing if any job is refused."""
    link: How = "auto"
    """How outputs get the shards that they share."""
    against: Path | None = None
    """A finished output whose shards may be linked to."""
    outputs_per_pass: int = 200
    """At most so many outputs are made together: each has a lock, a journal and a shard open."""
    plans_kept: int = 64
    """Plans of a group that are kept in memory until its outputs are made; the others are made again."""

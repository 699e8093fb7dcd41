"""What is asked for, and how it is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.device import OpenDevice, open_device
from converter.errors import BadRecipe
from converter.gates import Gates
from converter.recipe import Recipe
from converter.resources import Resources

Reference = str | os.PathLike[str]
"""A folder, an id on the Hub, or the address of a bucket."""
Adapters = Reference | Sequence[Reference]
"""One adapter, or several, which the recipe's `combine` makes into one."""


@dataclass(frozen=True)
class Job:
    """One checkpoint to be made."""

    out: Path
    adapter: Adapters | None
    base: Reference | None = None
    """None: the one that the adapter names."""
    recipe: Recipe = Recipe()
    base_revision: str | None = None
    adapter_revision: str | None = None
    card: str = ""
    """Text for the model card."""
    gates: Gates = Gates()
    store: str | None = None
    """The address of a store, hf://ORG/NAME or s3://BUCKET/PREFIX, in the place of `out`."""
    text: Path | None = None
    """The file by which the recipe calibrates. None: none, or the model writes a text itself."""

    def __post_init__(self) -> None:
        calibration = self.recipe.calibration
        if calibration is not None and calibration.is_self != (self.text is None):
            raise BadRecipe(
                "the recipe calibrates by a text that the model writes: give `calibrate` self"
                if calibration.is_self
                else "the recipe calibrates by a text: give its file as `calibrate`"
            )
        if calibration is not None and self.store is not None:
            raise BadRecipe(
                "`calibrate` reads what it has written, and a store's shards are gone from this disk: convert to a "
                "folder, and upload that"
            )

    @property
    def label(self) -> str:
        return str(self.out) if self.store is None else self.store


@dataclass(frozen=True)
class RunOptions:
    """How a conversion is run. Nothing here but `device` changes a byte of the output."""

    resources: Resources = Resources()
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, …"""
    overwrite: bool = False
    """Replace an earlier conversion at `out`."""
    offline: bool = False
    """Take Hub ids from the local cache only."""
    trust_remote_code: bool = False
    """Copy the Python files that the base names; they are never run."""
    resume: bool = True
    """Resume an interrupted run of the same job."""
    allow_pickle: bool = False
    """Read pickled weights of a base or an adapter, as weights only: no code that they name is run."""
    check_tiles: int = 50
    """Of the tiles that an accelerator makes, one in so many is made again on the CPU and compared; 0: none."""
    open_device: OpenDevice = open_device
    """Gives the device of a name; for devices of your own."""
    work: Path | None = None
    """Where the files of an OUT in a store gather; None: in the user's cache."""
    disk: int | None = None
    """Bytes of this machine's disk that OUT and a base on the Hub may take. None: an OUT in a store takes those
    of two shards, and the base comes into the Hub's cache, which keeps it."""
    create_pr: bool = False
    """Open a pull request on the Hub instead of committing."""

    def of_inputs(self) -> dict[str, Any]:
        """Those that opening base and adapter depends on."""
        return {"offline": self.offline, "allow_pickle": self.allow_pickle}

    def of_plan(self) -> dict[str, Any]:
        """Those that a plan depends on."""
        return {
            "resources": self.resources,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
        }

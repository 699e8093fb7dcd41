"""The disks that outputs of a batch come to lie on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converter.seal.destination import first_that_exists, room


class Disks:
    """The disks of this machine."""

    def number_of(self, path: Path) -> int:
        """Which disk a path is on, or will be."""
        return first_that_exists(path).stat().st_dev

    def room(self, folders: Sequence[Path]) -> int:
        """Bytes that some staging folders of one disk may come to: what is free, and what they hold already."""
        return room(folders)

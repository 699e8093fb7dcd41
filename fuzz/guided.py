"""One target under atheris: python -m fuzz.guided TARGET [libFuzzer's options]"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["converter", "json"]):
    from fuzz.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    # In memory where there is such a place: each run writes its file.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        atheris.Setup(sys.argv, lambda raw: target.parse(raw, Path(scratch)) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

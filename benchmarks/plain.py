"""The plain work behind a conversion: reading the base's bytes, and writing as many as the output has.

    python benchmarks/plain.py read FOLDER
    python benchmarks/plain.py write FILE BYTES

Prints seconds and bytes as JSON. As a library: `evict`, which takes a folder out of the file cache.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

PIECE = 8_000_000


def evict(folder: Path) -> None:
    """Take a folder's files out of the file cache, for which nobody needs to be root."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> int:
    """Read a base's shards from start to end, in pieces; how many bytes those were."""
    buffer, total = bytearray(PIECE), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def write(path: Path, count: int) -> int:
    """Write a file in pieces, and wait until it is on the disk."""
    piece = memoryview(os.urandom(PIECE))
    with path.open("wb", buffering=0) as file:
        left = count
        while left:
            left -= file.write(piece[:left])
        os.fsync(file.fileno())
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("read")
    reading.add_argument("path", type=Path)
    writing = commands.add_parser("write")
    writing.add_argument("path", type=Path)
    writing.add_argument("count", type=int)
    args = parser.parse_args()
    started = time.perf_counter()
    count = read(args.path) if args.command == "read" else write(args.path, args.count)
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": count}))


if __name__ == "__main__":
    main()

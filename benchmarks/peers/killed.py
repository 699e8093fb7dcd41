"""What lies there after kill -9: nothing, a folder that says so, or one that looks complete and isn't."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_LOAD = "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"


def kill(command: Sequence[str], room: Path, environment: Mapping[str, str], when: int) -> bool:
    """Run a command and kill it with what it started, once that many bytes lie in `room`; whether it hadn't ended."""
    run = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    while run.poll() is None:
        if held(room) >= when:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return True
        time.sleep(0.005)
    return False


def held(room: Path) -> int:
    """Bytes in a folder's files of weights; files that come and go meanwhile may be missed."""
    total = 0
    for path in room.rglob("*.safetensors*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def looks_complete(out: Path) -> bool:
    """Whether a checkpoint's files are all there, each as long as its header says."""
    if not (out / "config.json").is_file():
        return False
    index = out / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file() and not (out / "model.safetensors").is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    return all((out / name).is_file() and _whole(out / name) for name in names)


def _whole(shard: Path) -> bool:
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error, MemoryError):
        return False
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return shard.stat().st_size == 8 + length + max(ends, default=0)


def loads(out: Path) -> bool:
    """Whether transformers loads the folder."""
    done = subprocess.run([sys.executable, "-c", _LOAD, str(out)], capture_output=True, check=False)
    return done.returncode == 0


def fresh(room: Path) -> Path:
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    return room

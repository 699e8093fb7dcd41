"""How far a checkpoint is from the merge in float32: a tensor of the base in memory at a time.

    python benchmarks/peers/error.py BASE ADAPTER CHECKPOINT

Prints, as JSON, `largest`: the largest |out - S|, and `relative`: ‖out - S‖ / ‖S‖ over the weights that the adapter
changes, where S = W + (alpha / r)·B·A in float32; and the `others` that aren't the base's own bytes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from converter.read.stored.rows import open_source
from converter.read.stored.schemes import sources_of
from converter.threads import Buffers


class Weights:
    """The weights of a checkpoint, as values."""

    def __init__(self, place: Path) -> None:
        self._folder = LocalFolder(place)
        self.by_name = sources_of(Checkpoint(self._folder)).by_name
        self._buffers = Buffers(pinned=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        source = self.by_name[name]
        opened = open_source(source, self._folder, rows := source.shape[0])
        values = opened.decode(0, rows, opened.read(0, rows, self._buffers), self._buffers)
        return values.reshape(source.shape).float()


def error(base: Path, adapter: Path, checkpoint: Path) -> dict[str, Any]:
    from safetensors import safe_open

    stated = json.loads((adapter / "adapter_config.json").read_text())
    scaling = stated["lora_alpha"] / stated["r"]
    before, after = Weights(base), Weights(checkpoint)
    largest, squares, whole, others = 0.0, 0.0, 0.0, 0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as factors:
        known = set(factors.keys())
        for name in before.by_name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" not in known:
                others += not torch.equal(before[name], after[name])
                continue
            a, b = (factors.get_tensor(f"{module}.lora_{which}.weight").float() for which in "AB")
            merged = before[name].add_(scaling * (b @ a))
            away = after[name].sub_(merged)
            largest = max(largest, float(away.abs().max()))
            squares += float(away.square_().sum(dtype=torch.float64))
            whole += float(merged.square_().sum(dtype=torch.float64))
    return {"largest": largest, "relative": math.sqrt(squares / whole), "others": others}


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads that wait for each other take long on a busy machine
    print(json.dumps(error(*map(Path, sys.argv[1:]))))

"""The same base in float16 and float32; and a GPT-2, whose linear layers are stored turned (Conv1D), with an adapter.

    python benchmarks/variants.py 0.3 build/bench/0.3

Beside the base that `models.py` made in the folder: `float16`, `float32`, and `conv1d` with `adapter-conv1d`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from models import MODELS, RANK, Shapes, adapter_config, pool, write

CONV1D = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
"""A layer of GPT-2: name → its inputs and outputs, in hidden sizes."""


def make_dtype(name: str, folder: Path, dtype: str) -> None:
    """The base of `MODELS` in another dtype, in one file."""
    model = MODELS[name]
    kind, width = {"float16": ("F16", 2), "float32": ("F32", 4)}[dtype]
    values = (pool().view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", model.tensors(), kind, width, values)
    (folder / "config.json").write_text(json.dumps(model.config() | {"torch_dtype": dtype}))


def make_conv1d(name: str, base: Path, adapter: Path) -> None:
    """A GPT-2 of about the size of one of `MODELS`, in bfloat16, and an adapter for all of its linear layers."""
    hidden, layers, vocabulary = MODELS[name].hidden, MODELS[name].layers, MODELS[name].vocabulary
    shapes: Shapes = {"transformer.wte.weight": (vocabulary, hidden), "transformer.wpe.weight": (1024, hidden)}
    factors: Shapes = {}
    for layer in range(layers):
        for part, (inputs, outputs) in CONV1D.items():
            module = f"transformer.h.{layer}.{part}"
            shapes |= {f"{module}.weight": (inputs * hidden, outputs * hidden), f"{module}.bias": (outputs * hidden,)}
            factors[f"base_model.model.{module}.lora_A.weight"] = (RANK, inputs * hidden)
            factors[f"base_model.model.{module}.lora_B.weight"] = (outputs * hidden, RANK)
        for norm in (f"transformer.h.{layer}.ln_1", f"transformer.h.{layer}.ln_2"):
            shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    shapes |= {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}
    for folder in (base, adapter):
        folder.mkdir(parents=True, exist_ok=True)
    write(base / "model.safetensors", shapes, "BF16", 2, (pool().view(np.uint32) >> 16).astype(np.uint16))
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "bfloat16"}
    config |= {"n_embd": hidden, "n_layer": layers, "n_head": MODELS[name].heads, "n_positions": 1024}
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    write(adapter / "adapter_model.safetensors", factors, "F32", 4, pool(1))
    stated = adapter_config([part.rpartition(".")[2] for part in CONV1D]) | {"fan_in_fan_out": True}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for dtype in ("float16", "float32"):
        make_dtype(args.model, args.folder / dtype, dtype)
    make_conv1d(args.model, args.folder / "conv1d", args.folder / "adapter-conv1d")


if __name__ == "__main__":
    main()

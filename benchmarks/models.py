"""Llamas of random weights in the shapes of real models, and LoRA adapters for them, for the benchmark.

Written by hand, a few MB at a time: making a model needs neither its memory nor torch. The same bytes come each time.

    python benchmarks/models.py 1.1 build/bench/1.1 [--adapters qv --count 10] [--rank 256]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {"qv": ("q_proj", "v_proj"), "all": TARGETS}
"""What the adapters of a batch change."""
_POOL = 1 << 24
"""Different random values; a model repeats them from changing places."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """The shape of a model, and how it is kept on disk."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int
    tied: bool = False
    shard: int = 500_000_000
    """Bytes in one file, at most, unless one tensor has more."""
    hollow: bool = False
    """Headers only: files of the right length that take no room."""

    def linears(self) -> Shapes:
        """Every linear layer that an adapter changes: name → (out_features, in_features)."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: Shapes = {}
        for layer in range(self.layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            shapes[f"{attention}.q_proj"] = (queries, self.hidden)
            shapes[f"{attention}.k_proj"] = shapes[f"{attention}.v_proj"] = (keys, self.hidden)
            shapes[f"{attention}.o_proj"] = (self.hidden, queries)
            shapes[f"{mlp}.gate_proj"] = shapes[f"{mlp}.up_proj"] = (self.intermediate, self.hidden)
            shapes[f"{mlp}.down_proj"] = (self.hidden, self.intermediate)
        return shapes

    def tensors(self) -> Shapes:
        """Every tensor of the base, in the order in which it is stored."""
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        shapes |= {f"{name}.weight": shape for name, shape in self.linears().items()}
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def config(self) -> dict[str, object]:
        """The base's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


MODELS = {
    "0.1": Llama(768, 2048, 12, 12, 4, 32_000, 64, shard=100_000_000),
    "0.3": Llama(1024, 4096, 16, 16, 4, 32_000, 64),
    "1.1": Llama(2048, 5632, 22, 32, 4, 32_000, 64),  # TinyLlama
    "3.2": Llama(3072, 8192, 28, 24, 8, 128_256, 128, tied=True),  # Llama 3.2 3B
    "8": Llama(4096, 14_336, 32, 32, 8, 128_256, 128, shard=5_000_000_000),  # Llama 3 8B
    "many": Llama(64, 128, 11_112, 1, 1, 1_000, 64),  # 100,011 tensors
    # Two weights of 128,256 × 8,192 that transformers quantizes, 2.1 GB each; an output head it would leave alone.
    "wide": Llama(8192, 1024, 1, 128, 1, 4_096, 1002),
    "7": Llama(4096, 11_008, 32, 32, 32, 32_000, 128, shard=5_000_000_000, hollow=True),  # Llama 2 7B
    "70": Llama(8192, 28_672, 80, 64, 8, 128_256, 128, shard=5_000_000_000, hollow=True),  # Llama 3 70B
}


def make(name: str, folder: Path) -> None:
    """Make base and adapter of one of `MODELS` in `folder`, unless they are there in this shape."""
    model = MODELS[name]
    config = folder / "base" / "config.json"
    if config.is_file() and config.read_text() == json.dumps(model.config()):
        return
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        _make_base(model, partial / "base")
        _make_adapter(model, partial / "adapter")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def add_adapters(name: str, folder: Path, kind: str, count: int) -> None:
    """Make adapters that differ in their values beside the base that `make` made there, unless they are there."""
    for number in range(count):
        _make_adapter(MODELS[name], folder / "adapters" / f"{kind}-{number}", KINDS[kind], number + 1)


def add_rank(name: str, folder: Path, rank: int) -> None:
    """Make an adapter of another rank, for all linear layers, as `adapter-RANK` beside the base."""
    _make_adapter(MODELS[name], folder / f"adapter-{rank}", rank=rank)


def _make_base(model: Llama, folder: Path) -> None:
    folder.mkdir(parents=True)
    values = None if model.hollow else (pool().view(np.uint32) >> 16).astype(np.uint16)  # cut to bfloat16
    groups: list[Shapes] = [{}]
    held = 0
    for name, shape in model.tensors().items():
        size = 2 * math.prod(shape)
        if groups[-1] and held + size > model.shard:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += size
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write(folder / file, group, "BF16", 2, values)
        weight_map |= dict.fromkeys(group, file)
    total = 2 * sum(math.prod(shape) for shape in model.tensors().values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(model.config()))


def _make_adapter(
    model: Llama, folder: Path, targets: Sequence[str] = TARGETS, seed: int = 0, rank: int = RANK
) -> None:
    config = adapter_config(targets, rank)
    stated = folder / "adapter_config.json"  # written last
    if stated.is_file() and stated.read_text() == json.dumps(config):
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes: Shapes = {}
    for name, (rows, columns) in model.linears().items():
        if name.rpartition(".")[2] in targets:
            shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, columns)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (rows, rank)
    write(folder / "adapter_model.safetensors", shapes, "F32", 4, None if model.hollow else pool(seed))
    stated.write_text(json.dumps(config))


def adapter_config(targets: Sequence[str], rank: int = RANK) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
        "bias": "none",
    }


def pool(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(_POOL, np.float32) * np.float32(0.02)


def write(path: Path, shapes: Shapes, dtype: str, width: int, values: NDArray[np.generic] | None) -> None:
    """A safetensors file, durable; without `values` its header alone is written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw = raw.ljust(-(len(raw) // -8) * 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if values is not None:
            for number, shape in enumerate(shapes.values()):
                for piece in _pieces(values, math.prod(shape), start=7919 * number):
                    file.write(piece.data)
        file.flush()
        os.truncate(file.fileno(), 8 + len(raw) + end)
        os.fsync(file.fileno())


def _pieces(values: NDArray[np.generic], count: int, *, start: int) -> Iterator[NDArray[np.generic]]:
    """`count` values, beginning somewhere in the pool, which is gone through in circles."""
    start %= values.size
    while count:
        piece = values[start : start + count]
        yield piece
        count, start = count - piece.size, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="gets a base and an adapter")
    parser.add_argument("--adapters", choices=KINDS, help="adapters for a batch, too, in the folder's adapters/")
    parser.add_argument("--count", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--rank", type=int, help="an adapter of this rank, too, as adapter-RANK in the folder")
    args = parser.parse_args()
    make(args.model, args.folder)
    if args.rank:
        add_rank(args.model, args.folder, args.rank)
    if args.adapters:
        add_adapters(args.model, args.folder, args.adapters, args.count)


if __name__ == "__main__":
    main()

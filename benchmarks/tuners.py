"""Adapters of other kinds than LoRA for a base of `models.py`: DoRA, and tuners that PEFT's own classes merge.

    python benchmarks/tuners.py 0.3 build/bench/0.3

makes them in the folder's tuners/, each for all linear layers, of random values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import MODELS, RANK, TARGETS, Shapes, pool, write

PREFIX = "base_model.model."
BLOCK = 32
"""Of OFT: the side of a rotation's blocks."""
VERA_RANK = 256
"""VeRA's default: what is trained is tiny, so its rank is large."""


def lora(linears: Shapes) -> Shapes:
    """LoRA's two factors, as `models.py` has them."""
    return {
        f"{PREFIX}{name}.{part}.weight": shape
        for name, (rows, columns) in linears.items()
        for part, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK)))
    }


def dora(linears: Shapes) -> Shapes:
    """The same, and the length of each row."""
    return lora(linears) | {f"{PREFIX}{name}.lora_magnitude_vector": shape[:1] for name, shape in linears.items()}


def loha(linears: Shapes) -> Shapes:
    """Two pairs of factors, whose products are multiplied."""
    return {
        f"{PREFIX}{name}.hada_w{pair}_{half}": (rows, RANK) if half == "a" else (RANK, columns)
        for name, (rows, columns) in linears.items()
        for pair in (1, 2)
        for half in "ab"
    }


def oft(linears: Shapes) -> Shapes:
    """What is above the diagonal of each block of a rotation of the input."""
    above = BLOCK * (BLOCK - 1) // 2
    return {f"{PREFIX}{name}.oft_R.weight": (columns // BLOCK, above) for name, (_, columns) in linears.items()}


def vera(linears: Shapes) -> Shapes:
    """Two vectors a module, and two matrices that all share."""
    rows, columns = (max(shape[axis] for shape in linears.values()) for axis in (0, 1))
    shapes: Shapes = {"base_model.vera_A": (VERA_RANK, columns), "base_model.vera_B": (rows, VERA_RANK)}
    for name, (outputs, _) in linears.items():
        shapes[f"{PREFIX}{name}.vera_lambda_b"] = (outputs,)
        shapes[f"{PREFIX}{name}.vera_lambda_d"] = (VERA_RANK,)
    return shapes


TUNERS: dict[str, tuple[dict[str, Any], Callable[[Shapes], Shapes]]] = {
    "LoRA": ({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}, lora),
    "DoRA": ({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": True}, dora),
    "LoHa": ({"peft_type": "LOHA", "r": RANK, "alpha": RANK}, loha),
    "OFT": ({"peft_type": "OFT", "r": 0, "oft_block_size": BLOCK}, oft),
    "VeRA": ({"peft_type": "VERA", "r": VERA_RANK, "projection_prng_key": 0, "save_projection": True}, vera),
}
"""By name: PEFT's config, and the tensors for linear layers of these shapes."""


def make(model: str, folder: Path) -> None:
    """Make an adapter of each kind beside the base that `models.make` made there."""
    linears = MODELS[model].linears()
    for name, (config, tensors) in TUNERS.items():
        place = folder / "tuners" / name
        place.mkdir(parents=True, exist_ok=True)
        stated = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "target_modules": list(TARGETS)}
        write(place / "adapter_model.safetensors", tensors(linears), "F32", 4, pool())
        (place / "adapter_config.json").write_text(json.dumps(config | stated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="has the base")
    args = parser.parse_args()
    make(args.model, args.folder)


if __name__ == "__main__":
    main()

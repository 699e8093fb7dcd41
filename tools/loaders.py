"""`make loaders`: what two versions of transformers make of outputs, against what our rules promise.

`make`: write the outputs. `compare`: hold what was said of them against the rules, and print a table.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

from converter import Recipe, convert, verify
from tests.architectures import save_tiny

MODELS = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi3", "opt", "mixtral", "qwen2_moe", "olmoe", "t5")
RECIPES = {
    "nf4": Recipe("nf4"),
    "int8": Recipe("int8"),
    "bf16": Recipe("none"),
    "nf4-vllm": Recipe("nf4", target="vllm"),
}
WITH_EXPERTS = ("mixtral", "qwen2_moe", "olmoe")
FAR = {"nf4": 0.35, "int8": 0.1, "bf16": 1e-6, "nf4-vllm": 0.5}
"""How far logits may be from the merged model's, as a share of them. Tiny random models lose much."""


def make(root: Path) -> None:
    for name in MODELS:
        shutil.rmtree(root / name, ignore_errors=True)
        base = save_tiny(root / name / "base", name)
        for kind, recipe in RECIPES.items():
            if kind != "nf4-vllm" or name in WITH_EXPERTS:
                convert(base, None, root / name / kind, recipe)


def distance(found: list[float], expected: list[float]) -> float:
    squares = sum((a - b) ** 2 for a, b in zip(found, expected, strict=True))
    return math.sqrt(squares / sum(value**2 for value in expected))


def compare(root: Path) -> int:
    """Print a row for each output; how many of them a version doesn't load, or loads wrongly, against the rules."""
    said = {file.stem.removeprefix("said-"): json.loads(file.read_text()) for file in sorted(root.glob("said-*.json"))}
    wrong = 0
    print(f"| model | output | {' | '.join(said)} |\n| --- | --- |{' --- |' * len(said)}")
    for output in sorted(next(iter(said.values()))):
        name, kind = output.split("/")
        if kind == "base":
            continue
        promised = {loader.rpartition(" ")[2]: not why for loader, why in verify(root / output).loaders.items()}
        cells = []
        for version, of in said.items():
            rule = promised["4.57" if version.startswith("4.57") else "5"]
            found = of[output]
            loads = not isinstance(found, str) and distance(found, of[f"{name}/base"]) <= FAR[kind]
            text = found if isinstance(found, str) else f"{distance(found, of[f'{name}/base']):.3f}"
            cells.append(
                text + ("" if loads == rule else f" **the rules say {'it loads' if rule else 'it does not'}**")
            )
            wrong += loads != rule
        print(f"| {name} | {kind} | {' | '.join(cells)} |")
    return wrong


if __name__ == "__main__":
    what, root = sys.argv[1], Path(sys.argv[2])
    if what == "make":
        make(root)
    else:
        sys.exit(min(compare(root), 1))

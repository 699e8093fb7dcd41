"""Models run a layer at a time, and as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from converter import Inputs, Recipe, make_plan
from converter.layers.activations import Activations
from converter.layers.layered import LayeredModel
from converter.layers.weights import Weights

SIXTEEN_BIT = Recipe(quant_type="none")
FIRST, REST = 100, 156
"""Two tiles of a vocabulary of 256."""


def token_windows() -> list[Tensor]:
    """Three batches of windows, of two lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, shape, generator=generator) for shape in ((2, 40), (2, 40), (1, 33))]


def layered_logits(
    base: Path,
    adapter: Path | None = None,
    *,
    dtype: str = "float32",
    recipe: Recipe = SIXTEEN_BIT,
    budget: int = 22_000,
    tiles: Sequence[int] | None = None,
) -> list[Tensor]:
    """Logits of `token_windows`, of a model that is in memory a layer at a time; the head in tiles of these sizes."""
    batches = token_windows()
    with Inputs(base, adapter) as inputs, Activations(budget) as activations:
        plan = make_plan(inputs.base, inputs.adapter, recipe)
        weights = Weights(plan, inputs.base.folder, inputs.adapter.folder if inputs.adapter else None)
        model = LayeredModel.of(weights, batches, activations, dtype=dtype)
        model.run()
        assert activations.file_bytes > 0, "the budget is for some of the activations only"
        parts: list[list[Tensor]] = [[] for _ in batches]
        start = 0
        for size in tiles or [model.vocabulary]:
            with model.head(start, start + size):
                for number, part in enumerate(parts):
                    part.append(model.logits(number))
            start += size
        assert start == model.vocabulary
    return [torch.cat(part, -1) for part in parts]


def whole_model(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """As transformers loads it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model: transformers.PreTrainedModel = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=dtype
    )
    return model.eval()


def whole_logits(model: transformers.PreTrainedModel) -> list[Tensor]:
    """Logits of `token_windows`. Without a cache, which rounds keys for the models that have them in float32."""
    with torch.no_grad():
        return [model(input_ids=batch, use_cache=False).logits for batch in token_windows()]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert all(one.isfinite().all() and one.std() > 0 for one in expected)
    return len(found) == len(expected) and all(map(torch.equal, found, expected))

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from converter import Inputs, Recipe, Resources, convert, make_plan
from converter.layers.weights import Weights
from tests.architectures import save_tiny, save_tiny_adapter

RECIPE = Recipe(quant_type="none")
SMALL = Resources(tile_weights=(1 << 10, 1 << 12))
"""Tiles of 64 rows."""


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an adapter, and what a conversion to 16 bits makes of them."""
    folder = tmp_path_factory.mktemp("made")
    base = save_tiny(folder / "base", request.param)
    adapter = save_tiny_adapter(folder / "adapter", base, request.param)
    return base, adapter, convert(base, adapter, folder / "out", RECIPE).out


def test_each_tensor_is_the_one_that_a_conversion_writes(made: tuple[Path, Path, Path]) -> None:
    base, adapter, out = made
    written = load_file(out / "model.safetensors")
    with Inputs(base, adapter) as inputs:
        assert inputs.adapter is not None
        plan = make_plan(inputs.base, inputs.adapter, RECIPE, SMALL)
        weights = Weights(plan, inputs.base.folder, inputs.adapter.folder)
        found = {name: weights.whole(name) for name in weights.by_name}

    assert found.keys() == written.keys()
    assert [name for name, value in found.items() if not torch.equal(value, written[name])] == []


@settings(max_examples=30)
@given(cuts=st.sets(st.integers(0, 256), min_size=2, max_size=9))
def test_rows_are_those_of_the_whole(made: tuple[Path, Path, Path], cuts: set[int]) -> None:
    base, adapter, _ = made
    ends = sorted(cuts)
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    with Inputs(base, adapter) as inputs:
        assert inputs.adapter is not None
        plan = make_plan(inputs.base, inputs.adapter, RECIPE, SMALL)
        weights: Any = Weights(plan, inputs.base.folder, inputs.adapter.folder)
        for name in (name for name, one in weights.by_name.items() if one.shape == (256, 64)):
            assert torch.equal(weights.rows(name, spans), torch.cat([weights.whole(name)[a:b] for a, b in spans]))

"""Whatever an adapter does to a weight, kernels make of it what torch makes, in every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converter.errors import NotFinite
from converter.merge.blocks import BlockMerge
from converter.merge.change import Merge, Rounding
from converter.merge.dora import DoraMerge
from converter.merge.embedding import EmbeddingDoraMerge
from converter.merge.lora import LoraMerge
from converter.merge.tokens import TokenMerge
from converter.quantize.format import Encoded, Rows
from converter.quantize.formats import FORMATS, format_of
from converter.quantize.strips import kernels_take
from converter.recipe import Recipe
from converter.tensors import as_bytes, torch_dtype
from converter.threads import Buffers

CPU = torch.device("cpu")
SHAPES = [(300, 1152), (64, 128), (70, 128), (1, 128), (130, 2176)]
"""Of one strip, of several, of short ones."""
START = 5
"""The tile's first row."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def lora(weight: Tensor, how: Rounding) -> Merge:
    return LoraMerge(random(4, weight.shape[1]), random(START + len(weight), 4, seed=1), 0.7, how)


def blocks(weight: Tensor, how: Rounding) -> Merge:
    """Which adds a product, too, but rounds it before."""
    return BlockMerge(random(4, weight.shape[1]), random(START + len(weight), 4, seed=1), 0.7, how)


def dora(weight: Tensor, how: Rounding) -> Merge:
    a, b = random(4, weight.shape[1]), random(START + len(weight), 4, seed=1)
    return DoraMerge(a, b, random(len(b), seed=2).abs() * 30, 0.7, how)


def tokens(weight: Tensor, how: Rounding) -> Merge:
    return TokenMerge(random(2, weight.shape[1]), torch.tensor([0, START + len(weight) // 2]), how)


def embedding_dora(weight: Tensor, how: Rounding) -> Merge:
    a, b = random(4, START + len(weight)), random(weight.shape[1], 4, seed=1)
    squares = random(weight.shape[1], seed=2).double().square() + 1
    return EmbeddingDoraMerge(a, b, random(weight.shape[1], seed=3), 0.7, how, squares)


MERGES: dict[str, Callable[[Tensor, Rounding], Merge] | None] = {
    "nothing": None,
    "lora": lora,
    "dora": dora,
    "blocks": blocks,
    "tokens": tokens,
    "embedding_dora": embedding_dora,
}

cases = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "stored": st.sampled_from(["BF16", "F16", "F32"]),
        "dtype": st.sampled_from(["bfloat16", "float16"]),
        "precision": st.sampled_from(["float32", "reference"]),
        "merge": st.sampled_from(list(MERGES)),
        "turned": st.booleans(),
        "seed": st.integers(0, 1000),
        "bad": st.sampled_from([None, None, None, float("nan"), float("inf")]),
    }
)


def rows_of(case: dict[str, Any]) -> Rows:
    weight = random(*case["shape"], seed=case["seed"]).to(torch_dtype(case["stored"]))
    if case["bad"] is not None and len(weight) > 1:  # in a row that no token replaces
        weight[-1, 3] = case["bad"]
    if case["turned"]:  # as a Conv1D comes
        weight = weight.T.contiguous().T
    how, merge = Rounding(case["precision"], case["dtype"]), MERGES[case["merge"]]
    kept = {"bfloat16": "BF16", "float16": "F16"}[case["dtype"]]
    merged = None if merge is None else merge(weight, how)
    return Rows("w.weight", START, weight, merged, how, kept, largest=1.0)


def encoded(quant_type: str, dtype: str, rows: Rows, *, kernels: bool) -> Encoded | str:
    recipe = Recipe(quant_type=quant_type, dtype=dtype, group_size=32 if quant_type == "w4a16" else None)  # type: ignore[arg-type]
    try:
        return format_of(recipe).encoder(CPU, kernels=kernels).encode(rows, Buffers(pinned=False))
    except NotFinite as exc:
        return str(exc)


@pytest.mark.parametrize("quant_type", FORMATS)
@settings(max_examples=25, deadline=None)
@given(cases)
def test_kernels_and_torch_agree_on_every_kind_of_merge(quant_type: str, case: dict[str, Any]) -> None:
    rows = rows_of(case)

    by_kernels, by_torch = (encoded(quant_type, case["dtype"], rows, kernels=kernels) for kernels in (True, False))

    if isinstance(by_torch, str) or isinstance(by_kernels, str):
        assert by_kernels == by_torch
        return
    assert [(name, first, as_bytes(values)) for name, first, values in by_kernels.pieces] == [
        (name, first, as_bytes(values)) for name, first, values in by_torch.pieces
    ]
    assert (by_kernels.scales is None) == (by_torch.scales is None)
    if by_kernels.scales is not None and by_torch.scales is not None:
        assert torch.equal(by_kernels.scales, by_torch.scales)
    assert by_kernels.sums is not None
    assert by_torch.sums is not None
    assert by_kernels.sums.shape == by_torch.sums.shape
    size = np.abs(by_torch.sums).max(axis=1, keepdims=True)  # terms of ⟨Q(S) − W, Δ⟩ have either sign
    assert (np.abs(by_kernels.sums - by_torch.sums) <= 1e-6 * size).all()


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("turned", [False, True])
def test_kernels_take_what_is_rounded_once_at_the_end(stored: str, dtype: str, turned: bool) -> None:
    case = {"shape": (64, 128), "stored": stored, "dtype": dtype, "turned": turned, "seed": 0, "bad": None}
    taken = {
        (name, precision): kernels_take(rows_of(case | {"merge": name, "precision": precision}))
        for name in MERGES
        for precision in ("float32", "reference")
    }

    assert all(takes for (_, precision), takes in taken.items() if precision == "float32")
    as_loaded = stored == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert taken["dora", "reference"] == (as_loaded and not turned)
    assert taken["lora", "reference"]
    assert not any(taken[name, "reference"] for name in ("blocks", "tokens", "embedding_dora"))

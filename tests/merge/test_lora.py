"""The merge formula and the figures about it, against their plain forms in float64 and against PEFT's own layers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from converter.merge.change import MergedTile, Rounding, add
from converter.merge.lora import delta_rows
from converter.quantize.cut import MIN_MERGE_ROWS, tile_bounds
from converter.quantize.measure import DIGITS, Fidelity, Tally, row_sums
from converter.recipe import MergePrecision

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
seeds = st.integers(0, 2**31 - 1)


def rounded_by(precision: MergePrecision, dtype: torch.dtype) -> Rounding:
    return Rounding(precision, str(dtype).removeprefix("torch."))


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def peft_layer(layer: nn.Module, a: Tensor, b: Tensor, alpha: float, **options: Any) -> Any:
    """PEFT's LoRA layer around a linear layer, with factors A and B."""
    config = LoraConfig(r=a.shape[0], lora_alpha=alpha, target_modules=["0"], **options)  # type: ignore[arg-type]
    wrapped: Any = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    with torch.no_grad():
        wrapped.lora_A["default"].weight.copy_(a)
        wrapped.lora_B["default"].weight.copy_(b)
    return wrapped


# The delta


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(MIN_MERGE_ROWS, 700),
    columns=st.integers(1, 400),
    rank=st.sampled_from([1, 2, 3, 8, 16, 33, 64, 256]),
    most=st.integers(1, 50_000),
    block=st.sampled_from([32, 64, 4096]),
)
def test_a_tile_of_the_delta_has_the_bits_of_the_whole_product(
    seed: int, rows: int, columns: int, rank: int, most: int, block: int
) -> None:
    a, b = random(seed, rank, columns), random(seed + 1, rows, rank)
    bounds = tile_bounds(rows, columns, block=block, most=most)

    tiles = [delta_rows(a, b[start:end], 1.7) for start, end in itertools.pairwise(bounds)]

    assert torch.equal(torch.cat(tiles), delta_rows(a, b, 1.7))


@pytest.mark.parametrize("scaling", [2.0, 16 / 3, 16 / math.sqrt(3), 1e-3])
def test_the_delta_is_pefts_bit_for_bit(scaling: float) -> None:
    a, b = random(1, 3, 40), random(2, 70, 3)
    layer = peft_layer(nn.Linear(40, 70), a, b, alpha=scaling * 3)

    delta = delta_rows(a, b, layer.scaling["default"])

    assert torch.equal(delta, layer.get_delta_weight("default"))


# The sum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_the_reference_precision_gives_the_bits_of_pefts_merge(
    use_rslora: bool, scale: float, dtype: torch.dtype
) -> None:
    a, b, weight = random(1, 8, 96), random(2, 130, 8, scale=scale), random(3, 130, 96, scale=0.05).to(dtype)
    linear = nn.Linear(96, 130, bias=False, dtype=dtype)
    linear.weight.data = weight.clone()
    layer = peft_layer(linear, a, b, alpha=12, use_rslora=use_rslora)

    tile = add(weight, delta_rows(a, b, layer.scaling["default"]), rounded_by("reference", dtype))

    layer.merge()
    assert tile.values.dtype == dtype
    assert torch.equal(tile.values, layer.get_base_layer().weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_precision_gives_the_bits_of_pefts_merge_for_a_conv1d(dtype: torch.dtype) -> None:
    a, b, weight = random(1, 4, 96), random(2, 130, 4), random(3, 96, 130).to(dtype)
    conv = Conv1D(130, 96).to(dtype)
    conv.weight.data = weight.clone()
    layer = peft_layer(conv, a, b, alpha=12, fan_in_fan_out=True)

    tile = add(weight.T, delta_rows(a, b, 3.0), rounded_by("reference", dtype))

    layer.merge()
    assert torch.equal(tile.values, layer.get_base_layer().weight.T)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_precision_rounds_the_base_before_and_the_sum_after(
    stored: torch.dtype, rounded: torch.dtype
) -> None:
    weight, delta = random(3, 64, 64).to(stored), random(4, 64, 64, scale=0.01)

    tile = add(weight, delta, rounded_by("reference", rounded))

    loaded = weight.to(rounded)
    loaded += delta
    assert torch.equal(tile.values, loaded)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, rank=st.integers(1, 64), scale=st.sampled_from([1e-4, 1.0, 100.0]), dtype=st.sampled_from(DTYPES))
def test_the_default_precision_is_the_plain_formula_to_float32s_last_digits(
    seed: int, rank: int, scale: float, dtype: torch.dtype
) -> None:
    a, b, weight = random(seed, rank, 48), random(seed + 1, 80, rank, scale=scale), random(seed + 2, 80, 48).to(dtype)

    tile = add(weight, delta_rows(a, b, 1.5), rounded_by("float32", torch.bfloat16))

    exact = weight.double() + 1.5 * (b.double() @ a.double())
    epsilon = torch.finfo(torch.float32).eps
    rounding = epsilon * ((rank + 2) * 1.5 * (b.abs().double() @ a.abs().double()) + exact.abs())
    assert tile.values.dtype == torch.float32
    assert bool(((tile.values.double() - exact).abs() <= rounding).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_precision_rounds_the_sum_only_once(dtype: torch.dtype) -> None:
    weight, delta = random(3, 64, 64).to(dtype), random(4, 64, 64, scale=1e-3)

    tile = add(weight, delta, rounded_by("float32", torch.bfloat16))

    assert torch.equal(tile.values, (weight.double() + delta.double()).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["float32", "reference"])
def test_a_delta_of_zeros_changes_nothing(precision: MergePrecision, dtype: torch.dtype) -> None:
    weight = random(3, 64, 64).to(dtype)

    tile = add(weight, torch.zeros(64, 64), rounded_by(precision, dtype))

    assert torch.equal(tile.values.to(dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_delta_the_default_precision_passes_the_bases_bits_on(dtype: torch.dtype) -> None:
    weight = random(3, 64, 64).to(dtype)
    weight[0, 0] = -0.0

    tile = add(weight, None, rounded_by("float32", torch.bfloat16))

    assert tile.values is weight
    assert tile.delta is None


@pytest.mark.parametrize("precision", ["float32", "reference"])
def test_a_merge_leaves_its_inputs_alone(precision: MergePrecision) -> None:
    weight, delta = random(3, 64, 64), random(4, 64, 64)
    before = weight.clone(), delta.clone()

    add(weight, delta, rounded_by(precision, torch.float32))

    assert torch.equal(weight, before[0])
    assert torch.equal(delta, before[1])


@pytest.mark.parametrize("precision", ["float32", "reference"])
def test_a_tile_tells_base_delta_and_their_exact_sum_whatever_is_rounded(precision: MergePrecision) -> None:
    weight, delta = random(3, 64, 64).bfloat16(), random(4, 64, 64, scale=0.01)

    tile = add(weight, delta, rounded_by(precision, torch.bfloat16))

    assert torch.equal(tile.base, weight.float())
    assert torch.equal(tile.exact, weight.float() + delta)
    assert tile.delta is not None
    assert torch.equal(tile.delta, delta)


# The figures


def tile_of(weight: Tensor, delta: Tensor | None) -> MergedTile:
    return add(weight, delta, rounded_by("float32", torch.bfloat16))


def measured(tile: MergedTile, restored: Tensor) -> Fidelity:
    tally = Tally()
    tally.add(tile, restored)
    return tally.fidelity()


def plain(weight: Tensor, delta: Tensor | None, restored: Tensor) -> tuple[float, float | None]:
    """The figures as the definition has them, in float64."""
    total = (weight if delta is None else weight + delta).double()
    error = float(torch.linalg.norm(restored.double() - total) / torch.linalg.norm(total))
    if delta is None:
        return error, None
    moved, direction = restored.double() - weight.double(), delta.double()
    return error, float((moved * direction).sum() / (direction * direction).sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    noise=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]),
    size=st.sampled_from([None, 1e-6, 1e-3, 1.0]),
)
def test_error_and_survival_are_the_plain_formulas_in_float64(
    seed: int, shape: tuple[int, int], noise: float, size: float | None
) -> None:
    weight = random(seed, *shape)
    delta = None if size is None else random(seed + 1, *shape, scale=size)
    tile = tile_of(weight, delta)
    restored = tile.exact + random(seed + 2, *shape, scale=noise)

    found = measured(tile, restored)

    error, survival = plain(weight, delta, restored)
    assert found.error == pytest.approx(error, rel=10 ** (1 - DIGITS), abs=1e-12)
    assert found.survival == (None if survival is None else pytest.approx(survival, rel=10 ** (1 - DIGITS), abs=1e-9))


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(2, 60),
    columns=st.integers(1, 60),
    cuts=st.sets(st.integers(1, 59), max_size=6),
    with_delta=st.booleans(),
)
def test_the_figures_do_not_depend_on_how_rows_are_cut(
    seed: int, rows: int, columns: int, cuts: set[int], with_delta: bool
) -> None:
    assume(all(cut < rows for cut in cuts))
    weight, restored = random(seed, rows, columns), random(seed + 2, rows, columns)
    delta = random(seed + 1, rows, columns, scale=0.01) if with_delta else None
    bounds = [0, *sorted(cuts), rows]
    tally = Tally()

    for start, end in itertools.pairwise(bounds):
        part = None if delta is None else delta[start:end]
        tally.add(tile_of(weight[start:end], part), restored[start:end])

    assert tally.fidelity() == measured(tile_of(weight, delta), restored)


def test_the_figures_of_a_tensor_larger_than_what_is_summed_at_a_time_are_the_same() -> None:
    weight, restored, delta = (random(seed, 3000, 200, scale=0.1) for seed in (1, 2, 3))

    whole = row_sums(tile_of(weight, delta), restored)

    rows = [row_sums(tile_of(weight[i : i + 1], delta[i : i + 1]), restored[i : i + 1]) for i in range(0, 3000, 500)]
    assert whole.shape == (3000, 4)
    assert np.array_equal(whole[::500], np.concatenate(rows))


def test_a_sum_that_was_quantized_without_loss_has_no_error_and_survives_whole() -> None:
    weight, delta = torch.ones(4, 4), torch.full((4, 4), 0.5)

    assert measured(tile_of(weight, delta), torch.full((4, 4), 1.5)) == Fidelity(0.0, 1.0)


def test_a_delta_that_rounding_took_back_has_not_survived() -> None:
    weight, delta = torch.ones(4, 4), torch.full((4, 4), 0.5)

    assert measured(tile_of(weight, delta), torch.ones(4, 4)).survival == 0.0


def test_a_delta_of_zeros_has_no_survival() -> None:
    assert measured(tile_of(torch.ones(4, 4), torch.zeros(4, 4)), torch.ones(4, 4)) == Fidelity(0.0, None)


def test_a_base_without_a_delta_has_no_survival() -> None:
    assert measured(tile_of(torch.ones(4, 4), None), torch.full((4, 4), 1.5)) == Fidelity(0.5, None)


@pytest.mark.parametrize(("restored", "error"), [(0.0, 0.0), (1.0, math.inf)])
def test_a_tensor_of_zeros_has_no_error_if_it_stayed_one(restored: float, error: float) -> None:
    assert measured(tile_of(torch.zeros(4, 4), None), torch.full((4, 4), restored)) == Fidelity(error, None)


def test_what_was_never_counted_has_no_error() -> None:
    assert Tally().fidelity() == Fidelity(0.0, None)

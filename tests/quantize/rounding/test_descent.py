"""Sweeps after GPTQ: each code is the best one while all others stay, so the outputs only get closer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from converter.quantize.rounding.codings import coding_of
from converter.quantize.rounding.descent import swept
from converter.quantize.rounding.feedback import Grid
from converter.quantize.rounding.gptq import factors_of, rounded
from tests.quantize.rounding.weights import FORMATS, inputs, moments, recipe_of, spread, weight

DAMPING = 0.01


def start(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """A weight, its steps, the grid of the format, and the second moments."""
    coding, target = coding_of(recipe_of(name)), weight(rows, columns).float()
    steps = spread(coding, coding.scales("q.weight", target), target.shape)
    return target, steps, coding.grid, moments(inputs(columns)).second


def missed(codes: Tensor, target: Tensor, steps: Tensor, grid: Grid, second: Tensor) -> float:
    """tr(D H Dᵀ) in float64, with the damping."""
    d = target.double() - grid.of(codes).double() * steps.double()
    return float(((d @ second.double()) * d).sum() + DAMPING * (d * d).sum())


@pytest.mark.parametrize("name", FORMATS)
def test_each_sweep_brings_the_outputs_closer(name: str) -> None:
    target, steps, grid, second = start(name, 48, 192)
    codes = rounded(target, steps, grid, factors_of(moments(inputs()), 0.01))
    found = [missed(codes, target, steps, grid, second)]

    for _ in range(3):
        codes = swept(codes, target, steps, grid, second, DAMPING)
        found.append(missed(codes, target, steps, grid, second))

    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.99 * found[0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_sweep_chooses_codes_one_after_the_other_each_by_all_others(name: str) -> None:
    target, steps, grid, second = start(name, 8, 160)
    codes = grid.nearest(target / steps).to(torch.int8)

    found = swept(codes, target, steps, grid, second, DAMPING)

    damped, expected = second.double() + DAMPING * torch.eye(160, dtype=torch.float64), codes.clone()
    for column in range(160):
        d = target.double() - grid.of(expected).double() * steps.double()
        best = grid.of(expected[:, column]).double() * steps[:, column] + d @ damped[:, column] / damped[column, column]
        expected[:, column] = grid.nearest((best / steps[:, column]).float())
    # float32 and float64 may differ at a bound between two codes, and later columns of that row with it.
    assert (found == expected).float().mean() > 0.97
    assert not torch.equal(found, codes)


def test_when_nothing_changes_any_more_no_other_code_is_better_anywhere() -> None:
    target, steps, grid, second = start("nf4", 4, 64)
    codes = grid.nearest(target / steps).to(torch.int8)
    while not torch.equal(after := swept(codes, target, steps, grid, second, DAMPING), codes):
        codes = after

    least = missed(codes, target, steps, grid, second)
    for row in range(4):
        for column in range(0, 64, 7):
            for code in range(16):
                other = codes.clone()
                other[row, column] = code
                assert missed(other, target, steps, grid, second) >= least * (1 - 1e-6)


def test_rows_dont_depend_on_each_other() -> None:
    target, steps, grid, second = start("nf4", 128, 192)
    codes = grid.nearest(target / steps).to(torch.int8)

    whole = swept(codes, target, steps, grid, second, DAMPING)
    upper = swept(codes[:64], target[:64], steps[:64], grid, second, DAMPING)

    assert (whole[:64] == upper).float().mean() > 0.999

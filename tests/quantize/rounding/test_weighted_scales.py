"""Scales that are chosen by what inputs are like: of each block the best of the candidates, as the format stores it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from converter.merge.change import Rounding
from converter.quantize.format import Rows
from converter.quantize.formats import format_of
from converter.quantize.rounding.codings import Coding, coding_of
from converter.quantize.rounding.descent import swept
from converter.quantize.rounding.encoders import with_rounding
from converter.quantize.rounding.gptq import factors_of, rounded
from converter.quantize.rounding.weighted_scales import FACTORS, weighted_scales
from converter.threads import Buffers
from tests.quantize.rounding.weights import CPU, FORMATS, inputs, moments, recipe_of, spread, weight


def errors(coding: Coding, target: Tensor, scales: Tensor, squares: Tensor) -> Tensor:
    """Of each whole block, in float64."""
    steps = spread(coding, scales, target.shape).double()
    codes = coding.grid.nearest((target.double() / steps).float())
    d = (target.double() - coding.grid.of(codes).double() * steps) ** 2 * squares.double()
    block = coding.block(target.shape[1])
    return d.flatten()[: d.numel() // block * block].view(-1, block).sum(1)


@pytest.mark.parametrize("name", FORMATS)
def test_no_candidate_is_better_than_the_one_that_is_taken(name: str) -> None:
    coding, target = coding_of(recipe_of(name)), weight().float()
    squares = moments(inputs()).second.diagonal()
    own = coding.scales("q.weight", target)

    found = weighted_scales(coding, target, own, squares)

    of_candidates = torch.stack(
        [errors(coding, target, coding.stored(own * factor), squares) for factor in (1.0, *FACTORS)]
    )
    assert torch.all(errors(coding, target, found, squares) <= of_candidates.min(0).values * 1.0001)
    assert float(errors(coding, target, found, squares).sum()) < 0.95 * float(of_candidates[0].sum())


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_is_one_that_the_format_can_store(name: str) -> None:
    coding, target = coding_of(recipe_of(name)), weight().float()

    found = weighted_scales(coding, target, coding.scales("q.weight", target), torch.ones(192))

    assert torch.equal(coding.stored(found), found)


def test_what_the_largest_value_of_a_block_gets_decides_whether_it_is_clipped() -> None:
    coding, target = coding_of(recipe_of("nf4")), weight(1, 64).float()
    largest = target[0].abs().argmax()
    target[0, largest] *= 1.5
    own = coding.scales("q.weight", target)
    heard, unheard = torch.full((64,), 1e-6), torch.ones(64)
    heard[largest], unheard[largest] = 1.0, 1e-6

    assert torch.equal(weighted_scales(coding, target, own, heard), own), "it alone counts, and is on the grid"
    assert float(weighted_scales(coding, target, own, unheard)) < 0.9 * float(own)


def test_a_last_block_that_isnt_whole_keeps_its_scale() -> None:
    coding, target = coding_of(recipe_of("nf4")), weight(3, 40).float()
    own = coding.scales("q.weight", target)

    found = weighted_scales(coding, target, own, torch.linspace(0, 1, 40))

    assert len(own) == 2
    assert found[1] == own[1]


def test_blocks_of_nothing_but_zeros_stay_zeros() -> None:
    coding, target = coding_of(recipe_of("nf4")), weight(2, 64).float()
    target[1] = 0
    own = coding.scales("q.weight", target)

    assert weighted_scales(coding, target, own, torch.ones(64))[1] == 0


@pytest.mark.parametrize("name", FORMATS)
def test_the_encoder_takes_these_scales_and_sweeps_as_often_as_the_recipe_says(name: str) -> None:
    recipe, values, seen = recipe_of(name), weight(), moments(inputs())
    rows = Rows("q.weight", 0, values, None, Rounding.of(recipe), "BF16", moments=seen)
    nearest, coding, target = format_of(recipe).encoder(CPU), coding_of(recipe), values.float()

    made = with_rounding(nearest, recipe, CPU, kernels=False).encode(rows, Buffers(pinned=False))

    scales = weighted_scales(coding, target, coding.scales("q.weight", target), seen.second.diagonal())
    steps = spread(coding, coding.seen("q.weight", tuple(values.shape), scales, nearest), target.shape)
    factors = factors_of(seen, 0.01)
    codes = rounded(target, steps, coding.grid, factors)
    found = [float(((coding.grid.of(codes) * steps - target) @ inputs().T).norm())]
    for _ in range(2):
        codes = swept(codes, target, steps, coding.grid, seen.second, factors.damping)
        found.append(float(((coding.grid.of(codes) * steps - target) @ inputs().T).norm()))
    assert made.scales is not None
    assert torch.equal(made.scales, scales)
    for (_, _, piece), (_, _, expected) in zip(made.pieces, coding.pieces(rows, codes, scales), strict=True):
        assert torch.equal(piece, expected)
    assert found == sorted(found, reverse=True)

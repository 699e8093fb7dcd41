"""Error feedback gives the codes of GPTQ, and keeps what the adapter does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from converter.quantize.kernels import code_of
from converter.quantize.rounding.feedback import Directions, Grid, directions_of, round_by_torch, whole_numbers
from converter.quantize.rounding.feedback_kernels import round_rows

BLOCK = 64


def grid(quant_type: str = "nf4") -> Grid:
    code = code_of(quant_type)
    return Grid(code.values, code.bounds)


def problem(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """What is rounded, its scales, and the adapter's A."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, columns, generator=generator)
    blocks = torch.nn.functional.pad(target.flatten(), (0, -target.numel() % BLOCK)).view(-1, BLOCK)
    return target.numpy(), blocks.abs().amax(1).numpy(), torch.randn(rank, columns, generator=generator)


def spread(scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The scale of each weight."""
    return np.repeat(scales, BLOCK)[: shape[0] * shape[1]].reshape(shape)


def restored(codes: np.ndarray, scales: np.ndarray, quant_type: str = "nf4") -> np.ndarray:
    result: np.ndarray = grid(quant_type).values[codes] * spread(scales, codes.shape)
    return result


def nearest(target: np.ndarray, scales: np.ndarray, quant_type: str = "nf4") -> np.ndarray:
    return np.searchsorted(grid(quant_type).bounds, target / spread(scales, target.shape)).astype(np.int8)


def full_gptq(target: np.ndarray, scales: np.ndarray, a: torch.Tensor, damping: float) -> np.ndarray:
    """GPTQ as it is written down, with H = AᵀA + λI in full, in float64: what a column misses is made up for by all
    columns after it, so that the product with H's directions changes least."""
    values, bounds = grid().values.astype(np.float64), grid().bounds.astype(np.float64)
    factor = a.double().numpy()
    columns = target.shape[1]
    order = np.argsort((factor * factor).sum(axis=0), kind="stable")
    hessian = factor.T @ factor
    hessian += damping * np.trace(hessian) / columns * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    left = target.astype(np.float64)[:, order]
    sizes = spread(scales, target.shape).astype(np.float64)[:, order]
    codes = np.empty(target.shape, np.int8)
    for column in range(columns):
        codes[:, column] = np.searchsorted(bounds, left[:, column] / sizes[:, column])
        missed = (left[:, column] - values[codes[:, column]] * sizes[:, column]) / upper[column, column]
        left[:, column:] -= np.outer(missed, upper[column, column:])
    return codes[:, np.argsort(order)]


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_codes_are_those_of_full_gptq(rank: int, damping: float) -> None:
    target, scales, a = problem(96, 256, rank)

    codes = round_rows(target, scales, BLOCK, grid(), directions_of(a, damping))

    assert np.array_equal(codes, full_gptq(target, scales, a, damping))
    assert (codes != nearest(target, scales)).mean() > 0.005


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (63, 100), (64, 64), (65, 130), (200, 192)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_kernel_has_the_bits_of_torch(rows: int, columns: int, quant_type: str) -> None:
    target, scales, a = problem(rows, columns, 5)
    directions = directions_of(a)

    by_kernel = round_rows(target, scales, BLOCK, grid(quant_type), directions)

    sizes = torch.from_numpy(spread(scales, target.shape))
    by_torch = round_by_torch(torch.from_numpy(target), sizes, grid(quant_type), directions)
    assert np.array_equal(by_kernel, by_torch.numpy())


@pytest.mark.parametrize(("most", "least"), [(127, -127), (127, -128), (7, -8)], ids=["int8", "w8a16", "w4a16"])
def test_so_it_has_for_whole_numbers_and_uses_each_of_them(most: int, least: int) -> None:
    target, scales, a = problem(65, 192, 5)
    steps, whole = 2 * scales / (most - least), whole_numbers(most, least)

    by_kernel = round_rows(target, steps, BLOCK, whole, directions_of(a))

    sizes = torch.from_numpy(spread(steps, target.shape))
    by_torch = round_by_torch(torch.from_numpy(target), sizes, whole, directions_of(a))
    assert np.array_equal(by_kernel, by_torch.numpy())
    assert (by_kernel.min(), by_kernel.max()) == (least, most)


def test_rows_are_independent_of_each_other() -> None:
    target, scales, a = problem(200, 192, 8)
    directions = directions_of(a)

    whole = round_rows(target, scales, BLOCK, grid(), directions)

    for start, end in ((0, 64), (64, 71), (71, 200)):
        part = scales[start * 192 // BLOCK : end * 192 // BLOCK]
        assert np.array_equal(round_rows(target[start:end], part, BLOCK, grid(), directions), whole[start:end])


@pytest.mark.parametrize("size", [0.03, 0.1])
def test_the_error_in_the_adapters_directions_is_several_times_smaller_than_that_of_rounding(size: float) -> None:
    target, scales, a = problem(128, 512, 16)
    base = restored(nearest(target, scales), scales)  # on code points, as a quantized base is
    b = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    delta = (b @ a).numpy()
    delta *= size * np.linalg.norm(base) / np.linalg.norm(delta)

    codes = round_rows(base + delta, scales, BLOCK, grid(), directions_of(a))

    def missed(found: np.ndarray) -> float:
        return float(np.linalg.norm((restored(found, scales) - base - delta) @ a.numpy().T))

    assert missed(codes) < missed(nearest(base + delta, scales)) / 4


def test_a_weight_on_code_points_that_nothing_is_added_to_stays_as_it_is() -> None:
    target, scales, a = problem(128, 256, 16)
    base = nearest(target, scales)

    codes = round_rows(restored(base, scales), scales, BLOCK, grid(), directions_of(a))

    assert np.array_equal(codes, base)


def test_an_adapter_of_zeros_rounds_to_the_nearest() -> None:
    target, scales, _ = problem(64, 128, 4)

    codes = round_rows(target, scales, BLOCK, grid(), directions_of(torch.zeros(4, 128)))

    assert np.array_equal(codes, nearest(target, scales))


def test_blocks_of_zeros_have_the_code_of_zero() -> None:
    target, scales, a = problem(64, 128, 4)
    target[:, 64:] = 0
    scales.reshape(64, 2)[:, 1] = 0

    codes = round_rows(target, scales, BLOCK, grid(), directions_of(a))

    assert (codes[:, 64:] == 7).all()


def test_the_scale_of_the_adapter_does_not_matter() -> None:
    target, scales, a = problem(64, 128, 4)

    one, other = (round_rows(target, scales, BLOCK, grid(), directions_of(a * size)) for size in (1.0, 1024.0))

    assert np.array_equal(one, other)


def test_directions_are_exact_for_a_single_column() -> None:
    found = directions_of(torch.tensor([[3.0], [4.0]]), damping=1.0)

    assert isinstance(found, Directions)
    assert np.allclose(found.inputs, [[0.6, 0.8]])
    assert np.allclose(found.gains, [[0.3, 0.4]])

"""The CPU kernels of compressed-tensors' schemes are held to the formulas bit for bit."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.merge.change import MergedTile
from converter.quantize import formulas, jit, scheme_kernels
from converter.quantize.measure import row_sums
from converter.quantize.schemes import SCHEMES, Scheme
from tests.quantize.test_kernels import source_of
from tests.quantize.test_schemes import every_scheme, named, weight_of

KERNEL_DTYPES = {torch.bfloat16: jit.BFLOAT16, torch.float16: jit.FLOAT16}
SCALING = 0.37


class Made:
    """What the kernels make of some rows."""

    def __init__(
        self,
        weight: torch.Tensor,
        product: torch.Tensor | None,
        scheme: Scheme,
        *,
        exact: bool,
        global_scale: torch.Tensor | None = None,
    ) -> None:
        rows, columns = weight.shape
        dtype = KERNEL_DTYPES[weight.dtype]
        stored = weight.view(torch.uint16) if weight.dtype is torch.bfloat16 else weight.float()
        scales = np.empty(scheme.scales_shape((rows, columns)), np.float32)
        self.packed = np.empty(rows * columns * scheme.bits // 8, np.uint8)
        self.sums = np.empty((rows, jit.SUMS))
        self.largest = scheme_kernels.quantize_rows(
            source_of(stored, columns, jit.EXACT if exact else dtype, product, SCALING),
            scheme,
            dtype,
            1.0 if global_scale is None else float(global_scale),
            self.packed,
            scales.ravel(),
            self.sums,
        )
        self.scales = formulas.stored_scales(torch.from_numpy(scales), scheme, weight.dtype)


def merged(weight: torch.Tensor, product: torch.Tensor | None, *, exact: bool) -> torch.Tensor:
    if product is None:
        return weight.float() if exact else weight
    total = weight.float() + product * SCALING
    return total if exact else total.to(weight.dtype)


def octets(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.uint8).numpy().ravel()


cases = st.fixed_dictionaries(
    {
        "scheme": st.sampled_from(every_scheme()),
        "dtype": st.sampled_from(list(KERNEL_DTYPES)),
        "rows": st.integers(1, 150),
        "groups": st.integers(1, 20),
        "magnitude": st.integers(-8, 3),
        "seed": st.integers(0, 2**31),
        "merged": st.booleans(),
        "exact": st.booleans(),
    }
)


def product_of(case: dict[str, Any], weight: torch.Tensor) -> torch.Tensor | None:
    if not case["merged"]:
        return None
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 10.0 ** (case["magnitude"] - 1)


def global_scale_for(scheme: Scheme, values: torch.Tensor) -> torch.Tensor | None:
    return formulas.global_scale_of(float(values.abs().max()), values.dtype) if scheme.has_global_scale else None


@settings(max_examples=300, deadline=None)
@given(cases)
def test_codes_and_scales_equal_those_of_the_formulas_for_any_weight_and_delta(case: dict[str, Any]) -> None:
    scheme, weight = case["scheme"], weight_of(case)
    product = product_of(case, weight)
    values = merged(weight, product, exact=case["exact"])
    global_scale = global_scale_for(scheme, values)

    made = Made(weight, product, scheme, exact=case["exact"], global_scale=global_scale)

    expected = formulas.quantize(values, scheme, weight.dtype, global_scale)
    assert made.largest == float(values.abs().max())
    assert np.array_equal(octets(expected.packed), made.packed)
    assert np.array_equal(octets(expected.scales), octets(made.scales))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_the_sums_behind_the_figures_equal_those_that_torch_takes(case: dict[str, Any]) -> None:
    scheme, weight = case["scheme"], weight_of(case)
    product = product_of(case, weight)
    delta = None if product is None else product * SCALING
    exact = weight.float() if delta is None else weight.float() + delta
    values = merged(weight, product, exact=case["exact"])
    global_scale = global_scale_for(scheme, values)
    restored = formulas.quantize(values, scheme, weight.dtype, global_scale).restored
    expected = row_sums(MergedTile(values, exact, weight.float(), delta), restored)

    made = Made(weight, product, scheme, exact=case["exact"], global_scale=global_scale)

    count = expected.shape[1]
    size = np.sqrt((expected[:, 0] + expected[:, count - 1]) * expected[:, count - 1])
    for k in range(count):
        bound = size if k == 2 else expected[:, k]
        assert (np.abs(made.sums[:, k] - expected[:, k]) <= 2e-6 * bound + 1e-37).all()


@pytest.mark.parametrize("columns", [96, 200, 1000, 2500])
@pytest.mark.parametrize("name", ["fp8", "fp8-block"])
def test_eight_bits_take_rows_of_any_length(name: str, columns: int) -> None:
    weight = (torch.randn((300, columns), generator=torch.Generator().manual_seed(2)) * 0.1).bfloat16()

    made = Made(weight, None, SCHEMES[name], exact=False)

    expected = formulas.quantize(weight, SCHEMES[name], torch.bfloat16)
    assert np.array_equal(octets(expected.packed), made.packed)
    assert np.array_equal(octets(expected.scales), octets(made.scales))


@pytest.mark.parametrize("scheme", every_scheme(), ids=named)
def test_many_threads_make_the_same_bytes_as_one(scheme: Scheme) -> None:
    weight = torch.randn((512, 640), generator=torch.Generator().manual_seed(4)).bfloat16()
    product = torch.randn((512, 640), generator=torch.Generator().manual_seed(5))
    global_scale = global_scale_for(scheme, merged(weight, product, exact=True))
    whole = Made(weight, product, scheme, exact=True, global_scale=global_scale)
    parts: dict[int, Made] = {}

    def make(start: int) -> None:
        rows = slice(start, start + 128)
        parts[start] = Made(weight[rows], product[rows], scheme, exact=True, global_scale=global_scale)

    threads = [threading.Thread(target=make, args=(start,)) for start in range(0, 512, 128)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    in_order = [parts[start] for start in sorted(parts)]
    assert np.array_equal(whole.packed, np.concatenate([part.packed for part in in_order]))
    assert np.array_equal(octets(whole.scales), np.concatenate([octets(part.scales) for part in in_order]))
    assert np.array_equal(whole.sums, np.concatenate([part.sums for part in in_order]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", every_scheme(), ids=named)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(scheme: Scheme, bad: float) -> None:
    for row, column in ((0, 0), (0, 127), (129, 128), (149, 2559)):
        weight = torch.ones(150, 2560).bfloat16()
        weight[row, column] = bad

        assert Made(weight, None, scheme, exact=False).largest == float("inf")

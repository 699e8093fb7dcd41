"""The kernels of 16 bits and of LLM.int8 are held to torch and bitsandbytes bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import Resources, convert
from converter.errors import NotFinite
from converter.merge.change import MergedTile, Rounding, add
from converter.merge.lora import LoraMerge
from converter.quantize.eight_bit import EightBit
from converter.quantize.format import Encoded, Rows
from converter.quantize.measure import row_sums
from converter.quantize.sixteen_bit import kept_by
from converter.recipe import Recipe
from converter.tensors import as_bytes, torch_dtype
from converter.threads import Buffers
from tests.folders import contents
from tests.models import save_adapter, save_base

CPU = torch.device("cpu")
ENCODERS: dict[str, Callable[[bool], Any]] = {
    "16 bits": lambda kernels: kept_by(CPU, kernels=kernels),
    "int8": lambda kernels: EightBit(Recipe(quant_type="int8")).encoder(CPU, kernels=kernels),
}


def rows_of(case: dict[str, Any]) -> Rows:
    generator = torch.Generator().manual_seed(case["seed"])
    shape, magnitude = (case["rows"], case["columns"]), 10.0 ** case["magnitude"]
    weight = (torch.randn(shape, generator=generator) * magnitude).to(torch_dtype(case["stored"]))
    if case["zeros"]:
        weight[: case["rows"] // 2 + 1] = 0
    how = Rounding(case["precision"], case["rounded"])
    merge = None
    if case["merged"]:
        a, b = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0] + 7, 4, generator=generator)
        merge = LoraMerge(a * magnitude, b, 0.37, how)
    return Rows("w.weight", 7 if case["merged"] else 0, weight, merge, how, case["kept"])


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 70),
        "columns": st.one_of(st.integers(1, 200), st.sampled_from([64, 2048, 2049, 5000])),
        "stored": st.sampled_from(["BF16", "F16", "F32"]),
        "kept": st.sampled_from(["BF16", "F16", "F32"]),
        "precision": st.sampled_from(["float32", "reference"]),
        "rounded": st.sampled_from(["bfloat16", "float16"]),
        "merged": st.booleans(),
        "magnitude": st.integers(-30, 3),
        "zeros": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def encoded(kind: str, rows: Rows, *, kernels: bool) -> Encoded | str:
    try:
        return ENCODERS[kind](kernels).encode(rows, Buffers(pinned=False))
    except NotFinite as exc:
        return str(exc)


@pytest.mark.parametrize("kind", ENCODERS)
@settings(max_examples=200, deadline=None)
@given(cases)
def test_kernels_give_the_bytes_scales_and_sums_that_torch_gives(kind: str, case: dict[str, Any]) -> None:
    rows = rows_of(case)

    by_kernels, by_torch = (encoded(kind, rows, kernels=kernels) for kernels in (True, False))

    if isinstance(by_torch, str) or isinstance(by_kernels, str):
        assert by_kernels == by_torch
        return
    ((name, first, values),), ((expected_name, expected_first, expected),) = by_kernels.pieces, by_torch.pieces
    assert (name, first, values.dtype, values.shape) == (expected_name, expected_first, expected.dtype, expected.shape)
    assert as_bytes(values) == as_bytes(expected)
    if by_torch.scales is not None:
        assert by_kernels.scales is not None
        assert torch.equal(by_kernels.scales, by_torch.scales)
    assert by_kernels.sums is not None
    assert by_torch.sums is not None
    assert by_kernels.sums.shape == by_torch.sums.shape
    size = np.abs(by_torch.sums).max(axis=1, keepdims=True)  # terms of ⟨Q(S) − W, Δ⟩ have either sign
    assert (np.abs(by_kernels.sums - by_torch.sums) <= 1e-12 * size).all()


def test_int8_is_what_bitsandbytes_makes_of_the_merged_weight_in_float16() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(130, 777, generator=generator).bfloat16()
    weight[5] = 0
    a, b = torch.randn(8, 777, generator=generator), torch.randn(130, 8, generator=generator)
    how = Rounding("float32", "bfloat16")

    made = encoded("int8", Rows("w", 0, weight, LoraMerge(a, b, 0.5, how), how, "BF16"), kernels=True)

    assert isinstance(made, Encoded)
    codes, absmax, _ = int8_vectorwise_quant((weight.float() + (b @ a) * 0.5).half())
    ((_, _, found),) = made.pieces
    assert torch.equal(found, codes)
    assert made.scales is not None
    assert torch.equal(made.scales, absmax)


def test_16_bits_are_the_float32_sum_rounded_once() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(70, 333, generator=generator).bfloat16()
    a, b = torch.randn(8, 333, generator=generator), torch.randn(70, 8, generator=generator)
    how = Rounding("float32", "bfloat16")

    made = encoded("16 bits", Rows("w", 0, weight, LoraMerge(a, b, 0.5, how), how, "BF16"), kernels=True)

    assert isinstance(made, Encoded)
    ((_, _, found),) = made.pieces
    assert torch.equal(found, (weight.float() + (b @ a) * 0.5).bfloat16())


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kept", ["BF16", "F16"])
@pytest.mark.parametrize("precision", ["float32", "reference"])
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(
    stored: str, kept: str, precision: Any, kind: str, bits: int
) -> None:
    bad = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    how = Rounding(precision, {"BF16": "bfloat16", "F16": "float16"}[kept])
    for place in (0, 63, 64, 129):
        weight = torch.ones(2, 65).to(torch_dtype(stored))
        weight.view(-1)[place] = bad[0].to(weight.dtype)

        assert "w: holds a NaN or an infinity" in str(
            encoded(kind, Rows("w", 0, weight, None, how, kept), kernels=True)
        )


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_float16_has_no_number_for_is_refused(kind: str) -> None:
    rows = Rows("w", 0, torch.full((2, 65), 65520.0), None, Rounding("float32", "float16"), "F16")

    for kernels in (True, False):
        assert "too large for" in str(encoded(kind, rows, kernels=kernels))


class Shifted:
    """A merge that is no sum for the kernels."""

    def __call__(self, weight: torch.Tensor, start: int, end: int) -> MergedTile:
        return add(weight, torch.full(weight.shape, 0.25), Rounding("float32", "bfloat16"))


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_merge_that_is_no_sum_is_computed_by_torch_and_encoded_the_same(kind: str) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = Rows("w", 0, weight, Shifted(), Rounding("float32", "bfloat16"), "BF16")
    plain = replace(rows, stored=weight.float() + 0.25, merge=None)

    made, expected = (encoded(kind, one, kernels=True) for one in (rows, plain))

    assert isinstance(made, Encoded)
    assert isinstance(expected, Encoded)
    assert as_bytes(made.pieces[0][2]) == as_bytes(expected.pieces[0][2])
    assert made.sums is not None
    assert made.sums.shape == (5, 4)


def test_few_rows_at_a_time_give_the_sums_of_all() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, delta = torch.randn(100, 3000, generator=generator), torch.randn(100, 3000, generator=generator)
    merged = add(weight, delta, Rounding("float32", "bfloat16"))

    sums = row_sums(merged, merged.exact.bfloat16().float())

    one_by_one = [row_sums(merged.rows(part), merged.exact[part].bfloat16().float()) for part in map(row, range(100))]
    assert np.array_equal(sums, np.concatenate(one_by_one))


def row(number: int) -> slice:
    return slice(number, number + 1)


@pytest.mark.parametrize("quant_type", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_conversions_with_kernels_and_without_give_the_same_files(
    quant_type: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llama", dtype=dtype)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    recipe = Recipe(quant_type=quant_type)

    convert(base, adapter, tmp_path / "with", recipe)
    convert(base, adapter, tmp_path / "without", recipe, resources=Resources(kernels=False))

    assert contents(tmp_path / "with") == contents(tmp_path / "without")

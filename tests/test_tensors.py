"""torch by name, and whether values are finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter.errors import ConversionRefused, NotFinite
from converter.tensors import all_finite, as_bytes, refuse_not_finite, torch_device, torch_dtype

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 262_143, 262_144, 599_999])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float, place: int) -> None:
    values = torch.full((600_000,), torch.finfo(dtype).max, dtype=dtype)
    refuse_not_finite("w", values)
    values[place] = bad

    with pytest.raises(NotFinite, match=r"^w: holds a NaN or an infinity"):
        refuse_not_finite("w", values.view(600, 1000))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@given(raw=st.binary(min_size=8, max_size=64))
def test_bytes_are_finite_where_torch_finds_their_values_finite(dtype: str, raw: bytes) -> None:
    raw = raw[: len(raw) // 8 * 8]
    values = torch.frombuffer(bytearray(raw), dtype=torch_dtype(dtype))

    assert all_finite(raw, dtype) == bool(values.isfinite().all())


def test_whole_numbers_and_nothing_are_always_finite() -> None:
    refuse_not_finite("w", torch.ones(3, dtype=torch.int64))
    refuse_not_finite("w", torch.ones(0))


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("float16", torch.float16), ("I8", torch.int8)])
def test_a_dtype_is_known_by_either_name(name: str, dtype: torch.dtype) -> None:
    assert torch_dtype(name) is dtype


def test_the_bytes_of_a_turned_tensor_are_in_the_order_of_its_rows() -> None:
    assert bytes(as_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)) == bytes([1, 3, 2, 4])


@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConversionRefused, match=name):
        torch_device(name)

"""Schemes and formulas are held to compressed-tensors, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.quantize import formulas
from converter.quantize.schemes import GROUP_SIZES, SCHEMES, VERSION, Scheme
from tests.compressed import compress, library_scheme

DTYPES = [torch.bfloat16, torch.float16]
SAFETENSORS = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def every_scheme() -> list[Scheme]:
    """The schemes in all their group sizes."""
    of_integers = [scheme for scheme in SCHEMES.values() if scheme.kind == "int"]
    others = [scheme for scheme in SCHEMES.values() if scheme.kind == "float"]
    return others + [replace(scheme, group=group) for scheme in of_integers for group in GROUP_SIZES]


def named(scheme: Scheme) -> str:
    return f"{scheme.preset}-{scheme.group}"


weights = st.fixed_dictionaries(
    {
        "scheme": st.sampled_from(every_scheme()),
        "dtype": st.sampled_from(DTYPES),
        "rows": st.integers(1, 150),
        "groups": st.integers(1, 4),
        "magnitude": st.integers(-8, 3),
        "seed": st.integers(0, 2**31),
    }
)


def weight_of(case: dict[str, Any]) -> torch.Tensor:
    """Rows of sizes far apart, zeros of either sign, a row of zeros, numbers on the bounds between codes."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["rows"], 128 * case["groups"])
    rows = torch.rand((shape[0], 1), generator=generator) ** 4
    weight = torch.randn(shape, generator=generator) * rows * 10.0 ** case["magnitude"]
    weight[:: case["rows"] // 5 + 1, ::3] = -0.0
    weight[case["rows"] // 2] = 0
    weight[:, :64] = (weight[:, :64] * 64 / 10.0 ** case["magnitude"]).round() / 64 * 10.0 ** case["magnitude"]
    return weight.clamp(-50_000, 50_000).to(case["dtype"])


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(weights)
def test_codes_and_scales_equal_those_of_compressed_tensors_for_any_weight(case: dict[str, Any]) -> None:
    scheme, weight = case["scheme"], weight_of(case)
    expected = compress(weight, library_scheme(scheme))

    global_scale = None
    if scheme.has_global_scale:
        global_scale = formulas.global_scale_of(float(weight.abs().max()), weight.dtype)
        assert same_bytes(expected["weight_global_scale"], global_scale)
    found = formulas.quantize(weight, scheme, weight.dtype, global_scale)

    assert same_bytes(expected.get("weight_packed", expected.get("weight")), found.packed)
    assert same_bytes(expected["weight_scale"], found.scales)


@pytest.mark.parametrize("scheme", every_scheme(), ids=named)
@pytest.mark.parametrize("shape", [(48, 128), (200, 384)])
def test_names_dtypes_and_shapes_of_tensors_are_those_of_compressed_tensors(
    scheme: Scheme, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    expected = {
        f"model.layer.{name}": (SAFETENSORS[tensor.dtype], tuple(tensor.shape))
        for name, tensor in compress(weight, library_scheme(scheme)).items()
    }

    assert expected == scheme.tensors("model.layer", shape, "BF16")


@pytest.mark.parametrize("scheme", every_scheme(), ids=named)
def test_the_config_is_what_compressed_tensors_writes(scheme: Scheme) -> None:
    theirs = library_scheme(scheme)
    theirs.format = infer_module_format(torch.nn.Linear, theirs)
    config = QuantizationConfig(
        config_groups={"group_0": theirs},
        format=theirs.format.value,
        quantization_status="compressed",
        ignore=["lm_head", "model.router"],
    )
    # As `ModelCompressor.update_config` puts it together.
    expected = {
        "version": version("compressed-tensors"),
        "quant_method": "compressed-tensors",
        "sparsity_config": {},
        "transform_config": {},
        **config.model_dump(mode="json"),
    }

    ours = scheme.config(["lm_head", "model.router"])

    assert json.dumps(expected, sort_keys=True) == json.dumps(ours, sort_keys=True)
    assert version("compressed-tensors") == VERSION


def codes_of(scheme: Scheme) -> torch.Tensor:
    """Every number that a code stands for."""
    if scheme.kind == "int":
        return torch.arange(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1)).float()
    if scheme.bits == 8:
        every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
        return every[every.isfinite()]
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return torch.cat([-sizes, sizes])


@pytest.mark.parametrize("scheme", every_scheme(), ids=named)
def test_values_in_float32_become_the_codes_that_are_nearest_to_them(scheme: Scheme) -> None:
    values = torch.randn((128, 128), generator=torch.Generator().manual_seed(5)) * 0.02
    global_scale = formulas.global_scale_of(float(values.abs().max()), torch.float32)

    found = formulas.quantize(values, scheme, torch.bfloat16, global_scale if scheme.has_global_scale else None)

    scales = found.scales.float()
    if scheme.has_global_scale:
        scales = scales / global_scale
    elif scheme.scale_dtype == "torch.uint8":
        scales = 2.0 ** (scales - 127)
    height, width = scheme.extent(128)
    spread = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
    nearest = torch.stack([(code * spread - values).abs() for code in codes_of(scheme)]).amin(0)
    torch.testing.assert_close((found.restored - values).abs(), nearest, rtol=1e-4, atol=1e-9)


def test_a_group_does_not_go_from_row_to_row() -> None:
    assert not SCHEMES["w4a16"].fits((64, 192))
    assert replace(SCHEMES["w4a16"], group=64).fits((64, 192))
    assert SCHEMES["fp8"].fits((64, 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_global_scale_is_too_large_for_its_dtype_it_is_one_as_in_compressed_tensors(dtype: torch.dtype) -> None:
    for largest in (0.0, 1e-30, 1e-3, 0.05):
        weight = torch.full((1, 16), largest).to(dtype)
        expected = compress(weight, library_scheme(SCHEMES["nvfp4a16"]))["weight_global_scale"]

        assert same_bytes(expected, formulas.global_scale_of(float(weight.max()), dtype))

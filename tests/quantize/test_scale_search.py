"""`--scale-search`: each group has the scale with the smallest squared error."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import Job, Recipe, Resources, convert, convert_batch, verify
from converter.errors import BadRecipe
from converter.quantize import formulas
from converter.quantize.schemes import GROUP_SIZES, SCHEMES, Scheme
from tests.folders import contents
from tests.models import load, save_adapter, save_base
from tests.quantize.test_scheme_kernels import Made, merged, octets
from tests.reference import differences, tensors_of
from tests.test_resume import DRIVER

INTEGERS = [replace(SCHEMES[name], group=group) for name in ("w4a16", "w8a16") for group in GROUP_SIZES]
SMALL_TILES = (1 << 14, 1 << 14)

cases = st.fixed_dictionaries(
    {
        "scheme": st.sampled_from(INTEGERS),
        "dtype": st.sampled_from([torch.bfloat16, torch.float16]),
        "exact": st.booleans(),
        "merged": st.booleans(),
        "rows": st.integers(1, 40),
        "groups": st.integers(1, 6),
        "magnitude": st.integers(-9, 3),
        "tails": st.sampled_from([0, 1, 3]),
        "seed": st.integers(0, 2**31),
    }
)


def weight_and_product(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values with tails of several lengths, groups of zeros, and groups that are on a grid already."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["rows"], 128 * case["groups"])
    weight = torch.randn(shape, generator=generator)
    weight *= torch.randn(shape, generator=generator).abs() ** case["tails"]
    weight[0, :32] = 0
    weight[-1, -32:] = weight[-1, -32:].round()
    weight = (weight * 10.0 ** case["magnitude"]).clamp(-30_000, 30_000).to(case["dtype"])
    product = torch.randn(shape, generator=generator) * 10.0 ** (case["magnitude"] - 1) if case["merged"] else None
    return weight, product


def errors_of(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> np.ndarray[Any, Any]:
    """The squared error of each group with given scales, in float64: codes as the library computes them."""
    assert scheme.group is not None
    grouped = values.unflatten(1, (-1, scheme.group))
    half = 2 ** (scheme.bits - 1)
    codes = (grouped / scales[:, :, None].to(values.dtype)).clamp(-half, half - 1).round()
    restored = codes.float() * scales[:, :, None].float()
    missed = restored.double() - grouped.double()
    found: np.ndarray[Any, Any] = (missed * missed).sum(2).numpy()
    return found


def plainly_searched(values: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The same search written plainly: 1.00, 0.99, …, 0.80 of the library's scale; another must be better by 1e-5."""
    library = formulas.quantize(values, replace(scheme, searches=False), dtype).scales
    found, least = library.clone(), errors_of(values, library, scheme)
    for hundredths in range(99, 79, -1):
        tried = (library.float() * np.float32(hundredths / 100)).to(dtype)
        error = errors_of(values, tried, scheme)
        better = torch.from_numpy(error < least * np.float32(0.99999))
        found, least = torch.where(better, tried, found), np.where(better, error, least)
    return found


@settings(max_examples=150, deadline=None)
@given(cases)
def test_the_scales_are_those_of_a_plain_search_and_codes_and_bytes_the_same_by_kernels_and_torch(
    case: dict[str, Any],
) -> None:
    scheme, (weight, product) = replace(case["scheme"], searches=True), weight_and_product(case)
    values = merged(weight, product, exact=case["exact"])

    made = Made(weight, product, scheme, exact=case["exact"])
    by_torch = formulas.quantize(values, scheme, weight.dtype)

    assert np.array_equal(octets(by_torch.packed), made.packed)
    assert torch.equal(by_torch.scales, made.scales)
    searched = plainly_searched(values, scheme, weight.dtype)
    errors, plain = (errors_of(values, scales, scheme) for scales in (made.scales, searched))
    # Errors that differ by less than float32 can say may be taken for a tie by one and not by the other.
    np.testing.assert_allclose(errors, plain, rtol=3e-5)
    differ = int((made.scales != searched).sum())
    assert differ <= max(1, made.scales.numel() // 100)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_no_group_has_a_larger_squared_error_than_with_the_librarys_scale(case: dict[str, Any]) -> None:
    scheme, (weight, product) = case["scheme"], weight_and_product(case)
    values = merged(weight, product, exact=case["exact"])

    found = Made(weight, product, replace(scheme, searches=True), exact=case["exact"])

    library = formulas.quantize(values, scheme, weight.dtype).scales
    assert (errors_of(values, found.scales, scheme) <= errors_of(values, library, scheme)).all()
    assert (found.scales <= library).all()


def test_of_normal_values_the_error_becomes_smaller_by_a_twentieth_at_least() -> None:
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    for group in GROUP_SIZES:
        scheme = replace(SCHEMES["w4a16"], group=group)
        searched, library = (Made(weight, None, replace(scheme, searches=on), exact=False) for on in (True, False))
        assert searched.sums[:, 0].sum() < 0.9 * library.sums[:, 0].sum()  # squares


def test_a_group_of_zeros_has_the_librarys_scale() -> None:
    weight = torch.zeros(2, 128).bfloat16()

    made = [Made(weight, None, replace(INTEGERS[0], searches=on), exact=False) for on in (True, False)]

    assert torch.equal(made[0].scales, made[1].scales)


# A whole conversion


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", sharded=True, hidden_size=256, intermediate_size=1024)
    return base, save_adapter(folder / "adapter", base, "llama", target_modules=["q_proj", "gate_proj", "down_proj"])


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_threads_tiles_and_kernels_change_no_byte_of_a_tensor(
    name: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = Recipe(quant_type=name, scale_search=True)  # type: ignore[arg-type]
    out = convert(*inputs, tmp_path / "out", recipe).out
    expected = contents(out)

    for threads in (1, 3):
        resources = Resources(threads=threads, tile_weights=SMALL_TILES)
        assert contents(convert(*inputs, tmp_path / str(threads), recipe, resources).out) == expected
    by_torch = convert(*inputs, tmp_path / "torch", recipe, Resources(kernels=False)).out
    assert differences(by_torch, out) == []
    library = convert(*inputs, tmp_path / "library", Recipe(quant_type=name)).out  # type: ignore[arg-type]
    assert differences(library, out) != []


def test_verify_makes_it_again_and_transformers_loads_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = convert(*inputs, tmp_path / "out", Recipe(quant_type="w4a16", scale_search=True)).out

    assert verify(out, *inputs).problems == []
    assert "| scales | those with the smallest squared error |" in (out / "README.md").read_text()
    assert load(out) is not None
    weight, tensors = "model.layers.0.self_attn.k_proj", tensors_of(out)
    packed, scales = tensors[f"{weight}.weight_packed"], tensors[f"{weight}.weight_scale"]
    codes = unpack_from_int32(packed, 4, torch.Size((packed.shape[0], packed.shape[1] * 8)))
    base = tensors_of(inputs[0])[f"{weight}.weight"]
    scheme = replace(SCHEMES["w4a16"], group=128)
    assert torch.equal(scales, plainly_searched(base, scheme, torch.bfloat16))
    expected = (base.unflatten(1, (-1, 128)) / scales[:, :, None]).clamp(-8, 7).round().flatten(1)
    assert torch.equal(codes.float(), expected.float())


@pytest.mark.parametrize("writes", [pytest.param(5, marks=pytest.mark.slow), 20])
def test_killed_in_the_middle_it_is_resumed_to_the_same_bytes(
    writes: int, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = Recipe(quant_type="w4a16", scale_search=True, max_shard_size=1_000_000)
    whole = convert(*inputs, tmp_path / "whole", recipe)
    base, adapter, out = *inputs, tmp_path / "out"
    options = ["--base", base, "--adapter", adapter, "--out", out, "--format", "w4a16", "--scale-search"]
    options += ["--max-shard-size", "1MB", "--journal-seconds", "0", "--threads", "1", "--quiet"]
    command = [sys.executable, "-c", DRIVER, "0.02", *map(os.fspath, options)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(writes):
            assert process.stdout.readline() == "write\n"
        process.kill()
    assert not out.exists()
    made: list[str] = []
    resumed = convert(*inputs, out, recipe, progress=lambda told: made.append(told.name))

    tensors = {tensor.name for tensor in whole.plan.tensors()}
    assert 0 < len(tensors & set(made)) < len(tensors)
    assert contents(resumed.out) == contents(whole.out)


def test_a_batch_makes_what_single_conversions_make(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe(quant_type="w4a16", scale_search=True)
    other = save_adapter(tmp_path / "other", inputs[0], "llama", scale=0.1, target_modules=["q_proj"])

    convert_batch([Job(tmp_path / f"b{n}", one, inputs[0], recipe) for n, one in enumerate([inputs[1], other])])

    assert differences(tmp_path / "b1", convert(inputs[0], other, tmp_path / "alone", recipe).out) == []


@pytest.mark.parametrize("quant_type", ["auto", "nf4", "int8", "fp8", "none"])
def test_formats_without_groups_of_integers_refuse_it(quant_type: str) -> None:
    with pytest.raises(BadRecipe, match=r"`scale_search` has no meaning with .*: only w4a16 and w8a16 have it"):
        Recipe(quant_type=quant_type, scale_search=True)  # type: ignore[arg-type]


def test_a_recipe_says_nothing_of_it_unless_it_is_asked_for() -> None:
    assert "scale_search" not in Recipe(quant_type="w4a16").as_json()
    stated = Recipe(quant_type="w4a16", scale_search=True).as_json()
    assert stated["scale_search"] is True
    assert Recipe.from_json(stated).scale_search
    with pytest.raises(BadRecipe, match="scale_search is neither true nor false"):
        Recipe.from_json(stated | {"scale_search": 1})

"""The CPU kernels are held to bitsandbytes bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import plan_conversion
from converter.merge.change import MergedTile, Rounding, add
from converter.quantize import jit, kernels
from converter.quantize.bnb import dynamic_map
from converter.quantize.four_bit import FourBitEncoder
from converter.quantize.measure import row_sums
from converter.read.stored.codes import four_bit_map
from converter.recipe import BLOCK_SIZES, Recipe
from tests.conftest import REPOSITORY
from tests.limits import HANG
from tests.models import save_adapter, save_base

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDINGS = {jit.EXACT: torch.float32, jit.BFLOAT16: torch.bfloat16, jit.FLOAT16: torch.float16}


def source_of(
    stored: torch.Tensor, columns: int, rounding: int, product: torch.Tensor | None, scaling: float
) -> jit.Source:
    source = jit.Source(stored.numpy().ravel(), columns, rounding)
    if product is None:
        return source
    return source._replace(change=product.numpy().ravel(), scaling=scaling, how=jit.ADDED)


def run(
    weight: torch.Tensor, product: torch.Tensor | None, scaling: float, quant_type: str, block: int, rounding: int
) -> tuple[bool, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rows, columns = weight.shape
    stored = weight.view(torch.uint16) if weight.dtype is torch.bfloat16 else weight
    packed = np.empty(-(weight.numel() // -2), np.uint8)
    absmax = np.empty(-(weight.numel() // -block), np.float32)
    sums = np.empty((rows, jit.SUMS))
    finite = kernels.quantize_rows(
        source_of(stored, columns, rounding, product, scaling),
        quant_type=quant_type,
        block=block,
        packed=packed,
        absmax=absmax,
        sums=sums,
    )
    return finite, packed, absmax, sums


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 70),
        "columns": st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 256])),
        "dtype": st.sampled_from(list(DTYPES)),
        "quant_type": st.sampled_from(["nf4", "fp4"]),
        "block": st.sampled_from(BLOCK_SIZES),
        "rounding": st.sampled_from(list(ROUNDINGS)),
        "merged": st.booleans(),
        "magnitude": st.integers(-30, 4),
        "zeros": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=300, deadline=None)
@given(cases)
def test_codes_and_absmax_equal_those_of_bitsandbytes_for_any_shape_dtype_and_block(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["rows"], case["columns"])
    weight = (torch.randn(shape, generator=generator) * 10.0 ** case["magnitude"]).to(DTYPES[case["dtype"]])
    if case["zeros"]:
        weight.view(-1)[: weight.numel() // 2] = 0
    product = torch.randn(shape, generator=generator) * 10.0 ** case["magnitude"] if case["merged"] else None
    rounded = ROUNDINGS[case["rounding"]]
    values = weight.to(rounded)
    if product is not None:
        values = (values.float() + product * 0.37).to(rounded)

    finite, packed, absmax, _ = run(weight, product, 0.37, case["quant_type"], case["block"], case["rounding"])

    expected, state = quantize_4bit(values, blocksize=case["block"], quant_type=case["quant_type"])
    assert finite == bool(values.isfinite().all())
    if finite:
        assert np.array_equal(expected.numpy().ravel(), packed)
        assert np.array_equal(state.absmax.numpy(), absmax)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_the_sums_behind_the_figures_equal_those_that_torch_takes(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["rows"], case["columns"])
    magnitude = 10.0 ** case["magnitude"]  # down to where squares are no float32 any more
    weight = (torch.randn(shape, generator=generator) * magnitude).to(DTYPES[case["dtype"]])
    product = torch.randn(shape, generator=generator) * magnitude if case["merged"] else None
    delta = None if product is None else product * 0.5
    recipe = Recipe(quant_type=case["quant_type"], block_size=case["block"], dtype="bfloat16")
    merged = add(weight, delta, Rounding("float32", "bfloat16"))
    packed, state = quantize_4bit(merged.values.float(), blocksize=case["block"], quant_type=case["quant_type"])
    restored = FourBitEncoder(recipe, torch.device("cpu")).restore(packed, state.absmax, shape)
    expected = row_sums(merged, restored)

    _, _, _, sums = run(weight, product, 0.5, case["quant_type"], case["block"], jit.EXACT)

    count = expected.shape[1]
    # The terms of ⟨Q(S) − W, Δ⟩ have either sign: what float32 loses of their sum goes by their size.
    size = np.sqrt((expected[:, 0] + expected[:, count - 1]) * expected[:, count - 1])
    for k in range(count):
        assert (np.abs(sums[:, k] - expected[:, k]) <= 1e-6 * (size if k == 2 else expected[:, k])).all()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("columns", [96, 1001])
def test_rows_give_the_same_bytes_alone_and_together(columns: int, merged: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, columns, generator=generator).bfloat16()
    product = torch.randn(256, columns, generator=generator) if merged else None

    _, whole, absmax, sums = run(weight, product, 1.0, "nf4", 64, jit.EXACT)
    parts = [
        run(weight[rows], None if product is None else product[rows], 1.0, "nf4", 64, jit.EXACT)
        for rows in (slice(start, start + 64) for start in range(0, 256, 64))
    ]

    assert np.array_equal(whole, np.concatenate([part[1] for part in parts]))
    assert np.array_equal(absmax, np.concatenate([part[2] for part in parts]))
    assert np.array_equal(sums, np.concatenate([part[3] for part in parts]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(bad: float, dtype: str) -> None:
    for place in (0, 63, 64, 129):
        weight = torch.ones(2, 65).to(DTYPES[dtype])
        weight.view(-1)[place] = bad

        finite, *_ = run(weight, None, 1.0, "nf4", 64, jit.EXACT)

        assert not finite


@pytest.mark.parametrize("rounding", [jit.BFLOAT16, jit.FLOAT16])
def test_every_float32_exponent_is_rounded_to_sixteen_bits_as_torch_rounds_it(rounding: int) -> None:
    generator = np.random.default_rng(3)
    exponents = np.repeat(np.arange(255, dtype=np.uint32) << 23, 256)
    fractions = generator.integers(0, 1 << 23, exponents.size, dtype=np.uint32)
    fractions[::4] &= 0xFFFF0000  # halves, for ties
    fractions[1::4] &= 0xFFFFE000
    bits = exponents | fractions | (generator.integers(0, 2, exponents.size, dtype=np.uint32) << 31)
    values = torch.from_numpy(bits.view(np.float32).copy())
    expected = values.to(ROUNDINGS[rounding]).float()

    rounded = np.array([jit.round_float(value, rounding) for value in values.numpy()], np.float32)

    assert torch.equal(expected.view(torch.int32), torch.from_numpy(rounded.view(np.int32)))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_code_tables_are_those_of_bitsandbytes(quant_type: str) -> None:
    expected = get_4bit_type(quant_type, device="cpu")

    assert torch.equal(expected.view(torch.int32), four_bit_map(quant_type).view(torch.int32))
    assert torch.equal(create_dynamic_map().view(torch.int32), dynamic_map().view(torch.int32))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("merged", [False, True])
def test_squares_beyond_the_range_of_float32_are_counted(magnitude: float, merged: bool) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    product = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)) if merged else None
    _, _, _, expected = run(weight, product, 1.0, "nf4", 64, jit.EXACT)

    _, _, _, sums = run(weight * magnitude, None if product is None else product * magnitude, 1.0, "nf4", 64, jit.EXACT)

    np.testing.assert_allclose(sums, expected * float(magnitude) ** 2, rtol=1e-5)


def test_a_base_and_a_delta_that_are_large_and_cancel_overflow_no_figure() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)) * 1e25
    product = -weight * (1 + torch.randn(4, 128, generator=torch.Generator().manual_seed(2)) * 1e-3)
    merged = add(weight, product, Rounding("float32", "bfloat16"))

    _, _, _, sums = run(weight, product, 1.0, "nf4", 64, jit.EXACT)

    assert np.isfinite(sums).all()
    np.testing.assert_allclose(sums[:, 3], (product.double() ** 2).sum(dim=1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(sums[:, 1], (merged.exact.double() ** 2).sum(dim=1).numpy(), rtol=1e-6)


CONVERSIONS = """
import sys
from converter import convert
from converter.quantize import kernels

for base, adapter, out in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    before, seen = kernels.compiled()[0], set()
    convert(base, adapter, out, progress=lambda _: seen.add(kernels.compiled()[0] - before))
    print(*seen, kernels.compiled()[0] - before)
"""


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float16), pytest.param((torch.float32,), marks=pytest.mark.slow)], ids=str
)
def test_threads_find_the_code_that_they_need_compiled(dtypes: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    words: list[str | Path] = []
    for dtype in dtypes:
        base = save_base(tmp_path / f"{dtype}" / "base", "llama", dtype=dtype)
        adapter = save_adapter(tmp_path / f"{dtype}" / "adapter", base, "llama")
        plan_conversion(base, adapter)  # the program then has no need to ask transformers
        words += [base, adapter, tmp_path / f"{dtype}" / "out"]

    ran = subprocess.run(
        [sys.executable, "-c", CONVERSIONS, *words], capture_output=True, text=True, timeout=HANG, cwd=REPOSITORY
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["1 1"] * len(dtypes)


# Where compiled code is kept


PROGRAM = """
import numpy as np
from converter.quantize import jit
values = np.ones((2, 2), np.float32)
jit.row_sums(values, values, values, values, np.zeros((2, jit.SUMS)))
print(len(jit.row_sums.signatures), sum(jit.row_sums.stats.cache_hits.values()))
"""
"""One small kernel, which is kept as all are: to compile those that quantize takes ten times as long."""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package where this test may do with it as it likes, without compiled code."""
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(REPOSITORY / "converter", tmp_path / "site" / "converter", ignore=ignored)


def compute(installed: Path, **environment: str) -> str:
    """What a process says that has the code compiled, or finds it compiled."""
    command = [sys.executable, "-B", "-c", PROGRAM]
    ran = subprocess.run(
        command, cwd=installed.parent, env=os.environ | environment, capture_output=True, text=True, timeout=HANG
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_compiled_code_is_kept_for_the_next_process(installed: Path) -> None:
    assert compute(installed) == "1 0"
    assert compute(installed) == "1 1"


@pytest.mark.slow
def test_where_no_folder_can_be_written_to_it_is_compiled_every_time(installed: Path, tmp_path: Path) -> None:
    (installed / "quantize" / "__pycache__").write_text("no folder")
    (tmp_path / "file").write_text("no folder")
    nowhere = str(tmp_path / "file" / "home")

    for _ in range(2):
        assert compute(installed, HOME=nowhere, XDG_CACHE_HOME=nowhere) == "1 0"


@pytest.mark.slow
def test_compiled_code_of_which_only_the_names_reached_the_disk_is_compiled_anew(installed: Path) -> None:
    compute(installed)
    for path in (installed / "quantize" / "__pycache__").glob("jit.*.nb?"):
        path.write_bytes(b"")

    assert compute(installed) == "1 0"


@pytest.mark.slow
def test_a_full_disk_where_compiled_code_is_kept_fails_nothing(installed: Path) -> None:
    kept = installed / "quantize" / "__pycache__"
    kept.mkdir()
    if os.system(f"mount -t tmpfs -o size=4k tmpfs '{kept}' 2>/dev/null"):
        pytest.skip("mounting needs a privilege that this machine does not give")
    try:
        (kept / "filler").write_bytes(bytes(4096))
        assert compute(installed) == "1 0"
    finally:
        os.system(f"umount '{kept}'")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 1000), st.sampled_from([1e-20, 1.0, 1e15]))
def test_the_sums_of_merges_that_are_no_sums_are_those_that_torch_takes(
    rows: int, columns: int, seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact, restored, base, delta = (torch.randn(rows, columns, generator=generator) * size for _ in range(4))

    found = kernels.sums_of(exact.numpy(), restored.numpy(), base.numpy(), delta.numpy())

    expected = row_sums(MergedTile(exact, exact, base, delta), restored)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * columns * size**2)

"""GPTQ and AWQ weights are read as the libraries that know their formats restore them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

from converter.errors import BadCheckpoint, Unsupported
from tests.conftest import REPOSITORY
from tests.packed import awq, gptq, rounded
from tests.read.stored.test_scaled import opened, random, rows, save

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MADE = load_file(REPOSITORY / "fixtures" / "gptq.safetensors")
"""Weights that GPTQModel packed, and `weight`, what it restored: `fixtures/gptq.safetensors` says which version."""


@pytest.mark.parametrize("name", sorted({name.partition(".")[0] for name in MADE}))
def test_weights_of_gptqmodel_are_read_as_it_restores_them(name: str, tmp_path: Path) -> None:
    layout, bits, _ = name.split("-")
    parts = {part.partition(".")[2]: tensor for part, tensor in MADE.items() if part.startswith(f"{name}.")}
    expected = parts.pop("weight")

    save(tmp_path, parts, GPTQ | {"checkpoint_format": layout, "bits": int(bits)})

    assert opened(tmp_path).scheme == f"gptq {bits}-bit"
    assert torch.equal(rows(tmp_path), expected)
    assert torch.equal(rows(tmp_path, 1, 18), expected)


def test_what_the_tests_pack_for_gptq_is_what_it_stands_for(tmp_path: Path) -> None:
    made = rounded(random(96, 128), 32, ordered=False)
    save(tmp_path, gptq(made), GPTQ)

    assert torch.equal(rows(tmp_path, 40), made.weight)


def test_weights_of_autoawq_are_read_as_compressed_tensors_restores_them(tmp_path: Path) -> None:
    parts = awq(rounded(random(96, 128), 32))
    converted = AutoAWQConverter(group_size=32).process({f"w.{part}": tensor for part, tensor in parts.items()})
    settings = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)
    expected = compressor.decompress({name[2:]: tensor for name, tensor in converted.items()}, scheme)["weight"]

    save(tmp_path, parts, AWQ)

    assert opened(tmp_path).scheme == "awq 4-bit"
    assert torch.equal(rows(tmp_path), expected)
    assert torch.equal(rows(tmp_path, 3, 50, 61), expected)


def gptq_parts(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = gptq(rounded(random(32, 64), 32)) | changes
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def awq_parts(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = awq(rounded(random(32, 64), 32)) | changes
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


@pytest.mark.parametrize(
    ("parts", "config", "error", "message"),
    [
        (gptq_parts(g_idx=None), GPTQ, BadCheckpoint, r"w\.g_idx: missing, but other parts"),
        (gptq_parts(scales=None), GPTQ, BadCheckpoint, r"w\.scales: missing, but other parts"),
        (
            gptq_parts(qzeros=torch.zeros(2, 5, dtype=torch.int32)),
            GPTQ,
            BadCheckpoint,
            r"w\.qzeros: I32 \[2, 5\], expected I32 \[2, 4\]",
        ),
        (gptq_parts(scales=torch.ones(2)), GPTQ, BadCheckpoint, r"w\.scales F32 \[2\], expected I32 and a matrix"),
        (
            gptq_parts(qweight=torch.zeros(6, 32, dtype=torch.int32)),
            GPTQ | {"bits": 3},
            Unsupported,
            r"bits 3: GPTQ in other than 2, 4 and 8 bits is not read; dequantize the base with GPTQModel",
        ),
        (gptq_parts(), GPTQ | {"checkpoint_format": "marlin"}, Unsupported, "checkpoint_format marlin is not read"),
        (awq_parts(qzeros=None), AWQ, BadCheckpoint, r"w\.qzeros: missing, but other parts"),
        (awq_parts(scales=torch.ones(3, 32)), AWQ, BadCheckpoint, "expected eight codes a word and a scale"),
        (awq_parts(), AWQ | {"version": "gemv"}, Unsupported, "version gemv in 4 bits is not read; dequantize"),
        (awq_parts(), AWQ | {"bits": 8}, Unsupported, "version gemm in 8 bits is not read; dequantize"),
    ],
)
def test_what_is_not_read_is_refused_by_name_with_what_to_do(
    parts: dict[str, torch.Tensor], config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    save(tmp_path, parts, config)

    with pytest.raises(error, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": torch.full((2, 32), float("nan")).half()}, r"w\.scales: holds a NaN"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"w\.g_idx: names a group that has no scale; there are 2"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"w\.g_idx: names a group that has no scale"),
    ],
)
def test_values_that_can_not_be_meant_are_refused(
    changes: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save(tmp_path, gptq_parts(**changes), GPTQ)

    with pytest.raises(BadCheckpoint, match=message):
        rows(tmp_path)

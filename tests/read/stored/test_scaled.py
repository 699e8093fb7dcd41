"""FP8 and packed weights are read as the libraries that made them restore them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from converter.errors import BadCheckpoint, Unsupported
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from converter.read.stored.schemes import sources_of
from converter.read.stored.stored import Stored
from converter.threads import Buffers
from tests.compressed import scales_of

BF16 = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(0.05).to(dtype)


def save(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    """A base of one module, `w`."""
    save_file({f"w.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


def opened(folder: Path) -> Stored:
    """The weight of a base of one module."""
    [source] = sources_of(Checkpoint(LocalFolder(folder))).by_name.values()
    assert isinstance(source, Stored)
    assert source.name == "w.weight"
    return source


def rows(folder: Path, *bounds: int) -> torch.Tensor:
    """The weight, read tile by tile."""
    weight, buffers, tiles = opened(folder), Buffers(pinned=False), []
    rows_of = weight.open(LocalFolder(folder))
    for start, end in pairwise([0, *bounds, weight.shape[0]]):
        tiles.append(rows_of.decode(start, end, rows_of.read(start, end, buffers), buffers).clone())
    return torch.cat(tiles)


def scheme_of(*, with_inputs: bool = False, **weights: Any) -> QuantizationScheme:
    inputs = QuantizationArgs(num_bits=8, type="int", dynamic=True, strategy="token")
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs if with_inputs else None
    )


def save_compressed(folder: Path, weight: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    """A base as compressed-tensors saves it; what compressed-tensors restores."""
    layout = infer_module_format(torch.nn.Linear, scheme).value
    compressor = BaseCompressor.get_value_from_registry(layout)
    settings = scheme.weights
    if settings.num_bits == 4 and settings.type == "float":
        settings.scale_dtype = torch.float8_e4m3fn if settings.strategy == "tensor_group" else torch.uint8
    if settings.strategy == "tensor":
        scale, _ = calculate_qparams(weight.amin().view(1), weight.amax().view(1), settings)
        scales = {"weight_scale": scale.to(weight.dtype)}
    else:
        scales = scales_of(weight, scheme)
    if not settings.symmetric:
        groups = weight.unflatten(-1, (-1, settings.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
        scales = {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    compressed = compressor.compress({"weight": weight} | scales, scheme)
    group = {"targets": ["Linear"], "format": layout, "weights": json.loads(settings.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    save(folder, compressed, config)
    restored: torch.Tensor = compressor.decompress(compressed, scheme)["weight"]
    return restored


SCHEMES = {
    "w4a16": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "w4a16 a row": {"num_bits": 4, "type": "int", "strategy": "channel"},
    "w4a16 asymmetric": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    "w8a16": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64},
    "w8a16 asymmetric": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False},
    "int8 a row": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "fp8 a row": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8 a weight": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    "fp8 a block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
}


SAID = {
    "nvfp4": "compressed-tensors nvfp4",
    "mxfp4": "compressed-tensors mxfp4",
    "w8a16": "compressed-tensors 8-bit",
    "int8": "compressed-tensors int8",
    "fp8": "compressed-tensors fp8",
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_weights_of_compressed_tensors_are_read_as_it_restores_them(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    expected = save_compressed(
        tmp_path, random(192, 256, dtype=dtype), scheme_of(**SCHEMES[name], with_inputs=name == "int8 a row")
    )

    assert expected.dtype is (BF16 if "fp4" in name else dtype)  # the library restores FP4 in bfloat16
    assert opened(tmp_path).scheme == SAID.get(name.split()[0], "compressed-tensors 4-bit")
    assert torch.equal(rows(tmp_path), expected)
    assert torch.equal(rows(tmp_path, 1, 64, 70, 190), expected)


@pytest.mark.parametrize("shape", [(100, 200), (130, 300), (3, 5)])
def test_blocks_that_reach_over_the_edge_are_read(shape: tuple[int, int], tmp_path: Path) -> None:
    expected = save_compressed(tmp_path, random(*shape), scheme_of(**SCHEMES["fp8 a block"]))

    assert torch.equal(rows(tmp_path, 1), expected)


@pytest.mark.parametrize("columns", [8, 12, 31])
def test_rows_that_do_not_fill_their_last_word_are_read(columns: int, tmp_path: Path) -> None:
    expected = save_compressed(tmp_path, random(16, columns), scheme_of(**SCHEMES["w4a16 a row"]))

    assert torch.equal(rows(tmp_path, 5), expected)


def test_a_weight_larger_than_what_is_decoded_at_a_time_is_read(tmp_path: Path) -> None:
    expected = save_compressed(tmp_path, random(512, 512), scheme_of(**SCHEMES["fp8 a block"]))

    assert torch.equal(rows(tmp_path, 7), expected)


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Codes and scales as DeepSeek's models have them."""
    high, wide = (min(size, whole) for size, whole in zip(block, weight.shape, strict=True))
    blocks = weight.float().unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return {"weight": codes.flatten(2).flatten(0, 1), "weight_scale_inv": scale}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("block", [[128, 128], [64, 32], None], ids=str)
def test_fp8_of_transformers_and_deepseek_is_read_as_transformers_restores_it(
    block: list[int] | None, tmp_path: Path
) -> None:
    parts = fp8(random(256, 384), (block[0], block[1]) if block else (256, 384))
    save(tmp_path, {**parts, "input_scale": torch.ones(())}, FP8 | {"weight_block_size": block})
    restore = Fp8Dequantize(None)._dequantize_one  # the library has no public name for it

    expected = restore(parts["weight"], parts["weight_scale_inv"], torch.float32)

    assert torch.equal(rows(tmp_path, 100, 130), expected)
    assert {part.name for part in opened(tmp_path).parts} == {"w.weight", "w.weight_scale_inv", "w.input_scale"}


@pytest.mark.parametrize("spelled", [(), (1,), (1, 1)])
def test_one_scale_for_a_weight_may_have_any_shape_of_one_element(spelled: tuple[int, ...], tmp_path: Path) -> None:
    parts = fp8(random(256, 128), (256, 128))
    save(tmp_path, {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"].view(spelled)}, FP8)

    assert torch.equal(rows(tmp_path), parts["weight"].float() * parts["weight_scale_inv"])


# What is refused

PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def compressed_config(layout: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    group = {"weights": PACKED | changes}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def packed_parts(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = {
        "weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "weight_scale": torch.ones(8, 2, dtype=BF16),
        "weight_shape": torch.tensor([8, 64]),
    }
    return {name: tensor for name, tensor in (parts | changes).items() if tensor is not None}


NVFP4 = compressed_config("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)


def fp4_parts(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = {
        "weight_packed": torch.zeros(8, 32, dtype=torch.uint8),
        "weight_scale": torch.ones(8, 4).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    return {name: tensor for name, tensor in (parts | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("parts", "config", "error", "message"),
    [
        (packed_parts(weight_scale=None), compressed_config(), BadCheckpoint, r"w\.weight_scale: missing"),
        (packed_parts(weight_shape=None), compressed_config(), BadCheckpoint, r"w\.weight_shape: missing"),
        (
            packed_parts(weight_shape=torch.tensor([8, 2**40])),
            compressed_config(),
            BadCheckpoint,
            r"w\.weight_packed: \[8, 8\], expected 8 × 1099511627776 weights of 4 bits",
        ),
        (packed_parts(weight_shape=torch.tensor([-8, 64])), compressed_config(), BadCheckpoint, "expected -8 × 64"),
        (
            packed_parts(weight_scale=torch.ones(8, 3, dtype=BF16)),
            compressed_config(),
            BadCheckpoint,
            r"w\.weight_scale: BF16 \[8, 3\], expected one of F32, BF16, F16 for blocks of 1 × 32",
        ),
        (
            packed_parts(weight_g_idx=torch.zeros(64, dtype=torch.int32)),
            compressed_config(),
            Unsupported,
            r"w\.weight_g_idx: columns in another order than their groups are not read; decompress the base",
        ),
        (packed_parts(), compressed_config(symmetric=False), BadCheckpoint, r"w\.weight_zero_point: missing"),
        (
            packed_parts(weight_zero_point=torch.zeros(2, 2, dtype=torch.int32)),
            compressed_config(symmetric=False),
            BadCheckpoint,
            r"w\.weight_zero_point: I32 \[2, 2\], expected I32 \[1, 2\]",
        ),
        (packed_parts(), compressed_config(num_bits=3), Unsupported, "other than 4 and 8 bits"),
        (packed_parts(), compressed_config("mxfp8-quantized"), Unsupported, "mxfp8-quantized is not read; decompress"),
        (fp4_parts(weight_global_scale=None), NVFP4, BadCheckpoint, r"w\.weight_global_scale: missing"),
        (
            fp4_parts(weight_global_scale=torch.ones(2)),
            NVFP4,
            BadCheckpoint,
            r"w\.weight_global_scale: F32 \[2\], expected F32 \[1\]",
        ),
        (
            fp4_parts(weight_scale=torch.ones(8, 3).to(torch.float8_e4m3fn)),
            NVFP4,
            BadCheckpoint,
            r"w\.weight_scale \[8, 3\], expected a matrix of two codes a byte and a scale for 16 of them",
        ),
        (
            fp4_parts(weight_scale=torch.ones(8, 4)),
            NVFP4,
            Unsupported,
            r"scales of FP4 in F32 are not read; decompress",
        ),
        (fp4_parts(weight_zero_point=torch.ones(8, 4)), NVFP4, Unsupported, "zero points of floats are not read"),
        (packed_parts(), compressed_config("marlin-24"), Unsupported, "marlin-24 is not read; decompress the base"),
        (packed_parts(), compressed_config(strategy="tensor_group"), Unsupported, "scales by tensor_group"),
        (packed_parts(), compressed_config(group_size=0), Unsupported, "scales by group"),
        (packed_parts(), {"quant_method": "compressed-tensors"}, BadCheckpoint, "no config_groups"),
        (
            packed_parts(),
            compressed_config() | {"transform_config": {"config_groups": {"a": {}}}},
            Unsupported,
            "with a transform_config is not read",
        ),
        (
            packed_parts(),
            compressed_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            Unsupported,
            "with a sparsity_config is not read",
        ),
        (
            {"weight_scale_inv": torch.ones(1, 1)},
            FP8,
            BadCheckpoint,
            r"w\.weight: missing, expected a matrix of F8_E4M3",
        ),
        (
            fp8(random(256, 256), (128, 128)) | {"weight_scale_inv": torch.ones(2, 3)},
            FP8,
            BadCheckpoint,
            r"w\.weight_scale_inv: F32 \[2, 3\], expected .* for blocks of 256 × 256 or 128 × 128",
        ),
        (
            fp8(random(256, 256), (128, 128)) | {"weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)},
            FP8,
            Unsupported,
            r"scales in U8 \(MXFP8\) are not read; load the base with transformers",
        ),
        (fp8(random(256, 256), (128, 128)), FP8 | {"weight_block_size": [0, 128]}, BadCheckpoint, "expected two sizes"),
        (fp8(random(256, 256), (128, 128)), FP8 | {"weight_block_size": "128"}, BadCheckpoint, "expected two sizes"),
    ],
)
def test_what_is_not_read_is_refused_by_name_with_what_to_do(
    parts: dict[str, torch.Tensor], config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    save(tmp_path, parts, config)

    with pytest.raises(error, match=message):
        opened(tmp_path)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    parts = fp8(random(256, 256), (128, 128))
    parts["weight_scale_inv"][1, 1] = float("nan")
    save(tmp_path, parts, FP8)

    with pytest.raises(BadCheckpoint, match=r"w\.weight_scale_inv: holds a NaN or an infinity"):
        opened(tmp_path).open(LocalFolder(tmp_path))

"""Weights of bitsandbytes are read as bitsandbytes itself dequantizes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import bitsandbytes.functional as reference
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.errors import BadCheckpoint, Unsupported
from converter.read.folder import LocalFolder
from converter.read.header import read_header
from converter.read.stored.bnb_4bit import FourBitWeight, four_bit_weights
from converter.read.stored.bnb_8bit import EightBitWeight, eight_bit_weights
from converter.threads import Buffers

FILE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def save_four_bit(
    folder: Path,
    weight: torch.Tensor,
    *,
    block: int = 64,
    nested: bool = True,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """A file with one weight as bitsandbytes saves it; what bitsandbytes dequantizes."""
    packed, state = reference.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    parts = {f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"w.weight": packed, **parts}, folder / FILE)
    # As one row: where in_features isn't a multiple of the block size, the library's kernel for AVX512 begins a block
    # with each row, which its quantizing never did.
    state.shape = torch.Size((1, weight.numel()))
    dequantized: torch.Tensor = reference.dequantize_4bit(packed, state).view(weight.shape)
    return dequantized


def save_eight_bit(folder: Path, weight: torch.Tensor) -> torch.Tensor:
    codes, absmax, _ = reference.int8_vectorwise_quant(weight.to(torch.float16))
    parts = {"w.SCB": absmax, "w.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file({"w.weight": codes, **parts}, folder / FILE)
    dequantized: torch.Tensor = reference.int8_vectorwise_dequant(codes, absmax)
    return dequantized


def four_bit(folder: Path) -> FourBitWeight:
    opened = LocalFolder(folder)
    return four_bit_weights(read_header(opened, FILE), opened)["w.weight"]


def eight_bit(folder: Path) -> EightBitWeight:
    opened = LocalFolder(folder)
    return eight_bit_weights(read_header(opened, FILE), opened)["w.weight"]


def rows(folder: Path, weight: FourBitWeight | EightBitWeight, bounds: list[int]) -> torch.Tensor:
    """The weight, read tile by tile."""
    opened, buffers = weight.open(LocalFolder(folder)), Buffers(pinned=False)
    tiles = []
    for start, end in pairwise(bounds):
        raw = opened.read(start, end, buffers)
        tiles.append(opened.decode(start, end, raw, buffers).clone())
    return torch.cat(tiles)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, but for the sign of zero, on which the library's own kernels for FP4 disagree."""
    return one.dtype == other.dtype and torch.equal(one, other)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(0.05).to(dtype)


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    how(tensors)
    save_file(tensors, folder / FILE)


def change_state(folder: Path, **changes: object) -> None:
    def how(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "quant_state" in name)
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    change(folder, how)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(96, 128), (48, 100), (33, 77), (1, 3), (2, 5000)], ids=str)
def test_four_bits_are_read_as_bitsandbytes_dequantizes_them(
    quant_type: str, nested: bool, dtype: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    expected = save_four_bit(tmp_path, random(*shape, dtype=DTYPES[dtype]), nested=nested, quant_type=quant_type)

    weight = four_bit(tmp_path)

    assert (weight.scheme, weight.dtype, weight.shape) == (f"bitsandbytes {quant_type}", dtype, shape)
    assert same(rows(tmp_path, weight, [0, shape[0]]), expected)


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_is_read(block: int, tmp_path: Path) -> None:
    expected = save_four_bit(tmp_path, random(30, 300), block=block)

    weight = four_bit(tmp_path)

    assert weight.block == block
    assert same(rows(tmp_path, weight, [0, 30]), expected)


def test_any_tiles_of_whole_blocks_give_the_same_rows(tmp_path: Path) -> None:
    expected = save_four_bit(tmp_path, random(64, 48))

    for bounds in ([0, 64], [0, 4, 64], [0, 32, 60, 64], list(range(0, 65, 4))):
        assert same(rows(tmp_path, four_bit(tmp_path), bounds), expected)


def test_a_weight_larger_than_what_is_looked_up_at_a_time_is_read(tmp_path: Path) -> None:
    expected = save_four_bit(tmp_path, random(300, 1000))

    assert same(rows(tmp_path, four_bit(tmp_path), [0, 160, 300]), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_may_be_stored_as_floats(storage: torch.dtype, tmp_path: Path) -> None:
    expected = save_four_bit(tmp_path, random(64, 64), storage=storage)

    assert same(rows(tmp_path, four_bit(tmp_path), [0, 64]), expected)


def test_a_fused_tensor_of_three_dimensions_is_read_by_its_first(tmp_path: Path) -> None:
    expected = save_four_bit(tmp_path, random(4, 24, 32))

    weight = four_bit(tmp_path)

    assert weight.shape == (4, 24, 32)
    assert same(rows(tmp_path, weight, [0, 2, 4]).view(4, 24, 32), expected)


def test_eight_bits_are_read_as_bitsandbytes_dequantizes_them(tmp_path: Path) -> None:
    expected = save_eight_bit(tmp_path, random(96, 77))

    weight = eight_bit(tmp_path)

    assert (weight.scheme, weight.dtype, weight.shape) == ("bitsandbytes int8", "F32", (96, 77))
    assert same(rows(tmp_path, weight, [0, 96]), expected)
    assert same(rows(tmp_path, weight, [0, 5, 41, 96]), expected)


def test_a_weight_knows_its_parts_and_their_bytes(tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(96, 128))
    folder = LocalFolder(tmp_path)
    header = read_header(folder, FILE)

    weight = four_bit(tmp_path)

    assert {part.name for part in weight.parts} == header.keys()
    assert weight.nbytes == sum(part.nbytes for part in header.values())
    opened, buffers = weight.open(folder), Buffers(pinned=False)
    read = b"".join(bytes(raw) for raw in (*opened.raw, opened.read(0, 40, buffers)))
    assert read + bytes(opened.read(40, 96, buffers)) == b"".join(bytes(piece) for piece in weight.pieces(folder))


# What is refused


def test_a_weight_without_its_absmax_is_refused(tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(64, 64))
    change(tmp_path, lambda tensors: tensors.pop("w.weight.nested_absmax"))

    with pytest.raises(BadCheckpoint, match=r"w\.weight\.nested_absmax: missing"):
        four_bit(tmp_path)


def test_absmax_of_another_length_is_refused(tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(64, 64))
    change(tmp_path, lambda tensors: tensors.update({"w.weight.absmax": tensors["w.weight.absmax"][:-1].clone()}))

    with pytest.raises(BadCheckpoint, match=r"w\.weight\.absmax: U8 \[63\], expected U8 \[64\]"):
        four_bit(tmp_path)


def test_absmax_that_a_forward_pass_repacked_is_refused(tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(64, 64), nested=False)
    turn = lambda tensors: tensors["w.weight.absmax"].bfloat16().view(1, 64)  # noqa: E731
    change(tmp_path, lambda tensors: tensors.update({"w.weight.absmax": turn(tensors)}))

    with pytest.raises(BadCheckpoint, match=r"BF16 \[1, 64\], expected F32 \[64\]"):
        four_bit(tmp_path)


def test_double_quant_that_was_rounded_by_a_forward_pass_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(64, 64))
    change_state(tmp_path, nested_dtype="bfloat16")

    with pytest.raises(Unsupported, match=r"saved after it had run on a CPU.*give a base that was saved before"):
        four_bit(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, "says 'fp4', its name 'nf4'"),
        ({"blocksize": 48}, "blocks of 48 values"),
        ({"blocksize": "64"}, "blocks of '64' values"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"shape": [64, -64]}, "shape"),
        ({"shape": [64, 0]}, "shape"),
        ({"shape": []}, "shape"),
        ({"shape": [64, 10**30]}, "shape"),
        ({"shape": [64, 65]}, "expected"),
        ({"nested_offset": 1e999}, "nested offset inf"),
        ({"nested_offset": []}, "can't be understood"),
        ({"nested_blocksize": 128}, "blocks of 128"),
    ],
    ids=str,
)
def test_a_quant_state_that_makes_no_sense_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(64, 64))
    change_state(tmp_path, **changes)

    with pytest.raises(BadCheckpoint, match=message):
        four_bit(tmp_path)


def test_a_quant_map_of_other_values_is_refused(tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(64, 64))
    change(tmp_path, lambda tensors: tensors["w.weight.quant_map"].mul_(1.5))

    with pytest.raises(BadCheckpoint, match=r"w\.weight\.quant_map: not the values of nf4"):
        four_bit(tmp_path).open(LocalFolder(tmp_path))


def test_absmax_without_a_number_is_refused(tmp_path: Path) -> None:
    save_four_bit(tmp_path, random(64, 64), nested=False)
    change(tmp_path, lambda tensors: tensors["w.weight.absmax"].fill_(float("nan")))

    with pytest.raises(BadCheckpoint, match="a NaN or an infinity"):
        four_bit(tmp_path).open(LocalFolder(tmp_path))


def test_eight_bits_in_a_layout_of_a_gpu_are_refused(tmp_path: Path) -> None:
    save_eight_bit(tmp_path, random(64, 64))
    change(tmp_path, lambda tensors: tensors["w.weight_format"].fill_(2))

    with pytest.raises(Unsupported, match=r"w\.weight_format: a layout of a GPU's tiles"):
        eight_bit(tmp_path)


def test_absmax_of_eight_bits_must_be_one_a_row(tmp_path: Path) -> None:
    save_eight_bit(tmp_path, random(64, 32))
    change(tmp_path, lambda tensors: tensors.update({"w.SCB": tensors["w.SCB"][:32].clone()}))

    with pytest.raises(BadCheckpoint, match=r"w\.SCB: F32 \[32\], expected F32 \[64\]"):
        eight_bit(tmp_path)


def test_absmax_without_codes_is_refused(tmp_path: Path) -> None:
    save_eight_bit(tmp_path, random(64, 32))
    change(tmp_path, lambda tensors: tensors.pop("w.weight"))

    with pytest.raises(BadCheckpoint, match=r"w\.weight: no matrix of I8"):
        eight_bit(tmp_path)

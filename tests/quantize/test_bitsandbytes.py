"""What the encoders make of tiles equals what bitsandbytes makes of whole tensors, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import NotFinite
from converter.merge.change import Rounding, add
from converter.quantize.bnb import NESTED_BLOCK, dynamic_map, quantize_absmax
from converter.quantize.cut import tile_bounds
from converter.quantize.format import Encoded, Encoder, Rows
from converter.quantize.formats import format_of
from converter.quantize.four_bit import FourBitEncoder
from converter.quantize.measure import row_sums
from converter.read.header import DTYPE_BYTES
from converter.read.stored.codes import four_bit_map
from converter.recipe import BLOCK_SIZES, Recipe
from converter.threads import Buffers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOUR_BITS: list[Any] = ["nf4", "fp4"]


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int, scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def encoder(recipe: Recipe) -> Encoder:
    return format_of(recipe).encoder(torch.device("cpu"))


def encode(recipe: Recipe, values: torch.Tensor, start: int = 0, name: str = "w.weight") -> Encoded:
    """Some rows of a weight, nothing merged."""
    rounding = Rounding("float32", "bfloat16")
    return encoder(recipe).encode(Rows(name, start, values, None, rounding, "BF16"), Buffers(pinned=False))


def in_tiles(
    recipe: Recipe, values: torch.Tensor, bounds: list[int] | tuple[int, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Codes, and the absmax of each tile, of a weight that is quantized in tiles of rows."""
    tiles = [encode(recipe, values[start:end], start) for start, end in itertools.pairwise(bounds)]
    codes: list[torch.Tensor] = []
    for tile in tiles:
        ((name, first, piece),) = tile.pieces
        assert (name, first) == ("w.weight", sum(before.numel() for before in codes))
        codes.append(piece)
    return torch.cat(codes), [tile.scales for tile in tiles if tile.scales is not None]


def restored(recipe: Recipe, values: torch.Tensor) -> torch.Tensor:
    """What the codes of a weight stand for."""
    found = encode(recipe, values)
    assert found.scales is not None
    return FourBitEncoder(recipe, torch.device("cpu")).restore(found.pieces[0][2], found.scales, tuple(values.shape))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype and bits, which tell NaN and the two zeros apart."""
    return one.dtype == other.dtype and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def as_state_dict(recipe: Recipe, values: torch.Tensor, bounds: list[int]) -> dict[str, torch.Tensor]:
    codes, scales = in_tiles(recipe, values, bounds)
    return {"w.weight": codes, **encoder(recipe).finish("w.weight", tuple(values.shape), scales)}


@st.composite
def weights_and_cuts(draw: st.DrawFn, block: int) -> tuple[torch.Tensor, list[int]]:
    """A weight of any size and dtype, with zeros and large values in places, and rows to cut it at, between blocks."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    scale = draw(st.sampled_from([0.02, 1e-4, 30.0]))
    values = weights(rows, columns, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000)), scale)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, rows * columns - 1))
        values.view(-1)[start : start + draw(st.integers(1, 300))] = draw(st.sampled_from([0.0, -0.0, 1e-7, 500.0]))
    cuts = [row for row in range(1, rows) if row * columns % block == 0 and row * columns % 2 == 0]
    return values, [0, *draw(st.lists(st.sampled_from(cuts), unique=True).map(sorted) if cuts else st.just([])), rows]


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("block", BLOCK_SIZES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_weight_in_tiles_is_quantized_as_bitsandbytes_quantizes_it_whole(
    quant_type: Any, double_quant: bool, block: int, data: st.DataObject
) -> None:
    values, bounds = data.draw(weights_and_cuts(block))
    expected, state = quantize_4bit(
        values, blocksize=block, compress_statistics=double_quant, quant_type=quant_type, quant_storage=torch.uint8
    )
    found = as_state_dict(Recipe(quant_type, double_quant, block, "bfloat16"), values, bounds)

    assert same(found["w.weight"], expected)
    assert found["w.weight"].shape == expected.shape
    for key, value in state.as_dict(packed=True).items():
        # The dtype that quant_state names is the recipe's, not that of what was quantized.
        if "bitsandbytes__" not in key:
            assert same(found[f"w.weight.{key}"], value), key
    if double_quant:
        raw = bytes(found[f"w.weight.quant_state.bitsandbytes__{quant_type}"].tolist())
        assert f'"nested_offset": {float(state.offset)!r}'.encode() in raw


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_weight_in_tiles_is_quantized_to_int8_as_bitsandbytes_quantizes_it_whole(data: st.DataObject) -> None:
    values, _ = data.draw(weights_and_cuts(1))
    cuts = data.draw(st.sets(st.integers(0, values.shape[0])))
    bounds = sorted(cuts | {0, values.shape[0]})
    codes, scale, _ = int8_vectorwise_quant(values.to(torch.float16))

    found = as_state_dict(Recipe("int8"), values, bounds)

    assert same(found["w.weight"], codes)
    assert same(found["w.SCB"], scale)
    assert found["w.weight_format"].item() == 0


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 64), (7, 9), (1, 1), (3, 4096), (64, 33)], ids=str)
def test_restored_values_are_those_that_bitsandbytes_restores(
    quant_type: Any, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    values = weights(*shape, dtype, seed=1)
    values.view(-1)[:64] = 0
    packed, state = quantize_4bit(values.float(), blocksize=64, compress_statistics=False, quant_type=quant_type)

    found = restored(Recipe(quant_type), values)

    assert found.dtype is torch.float32
    assert torch.equal(found, dequantize_4bit(packed, state))


def test_the_figures_of_int8_are_those_of_codes_times_scale() -> None:
    values = weights(9, 33, torch.bfloat16, seed=1)

    found = encode(Recipe("int8"), values)

    assert found.scales is not None
    stand_for = found.pieces[0][2].float() * (found.scales[:, None] / 127)
    expected = row_sums(add(values, None, Rounding("float32", "bfloat16")), stand_for)
    assert found.sums is not None
    assert (found.sums == expected).all()
    assert float((stand_for - values.float()).abs().max()) < float(values.float().abs().max()) / 100


# What modules of bitsandbytes hold


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(96, 64), (3, 50)], ids=str)
def test_names_and_bytes_are_those_of_a_linear4bit(
    quant_type: Any, double_quant: bool, dtype: torch.dtype, block: int, shape: tuple[int, int]
) -> None:
    values = weights(*shape, dtype, seed=2)
    module = Linear4bit(shape[1], shape[0], bias=False, quant_type=quant_type, compress_statistics=double_quant)
    parameter = Params4bit(
        values.clone(), False, blocksize=block, compress_statistics=double_quant, quant_type=quant_type, module=module
    )
    module.weight = parameter.to("cpu")
    recipe = Recipe(quant_type, double_quant, block, "bfloat16" if dtype is torch.bfloat16 else "float16")

    found = as_state_dict(recipe, values, [0, shape[0]])

    expected = {f"w.{key}": value for key, value in module.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same(found[name], value), name
        assert found[name].shape == value.shape, name


def test_names_and_bytes_are_those_of_a_linear8bitlt() -> None:
    values = weights(96, 64, torch.float16, seed=2)
    module = Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    module.weight = Int8Params(values.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")

    found = as_state_dict(Recipe("int8"), values, [0, 32, 96])

    expected = {f"w.{key}": value for key, value in module.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same(found[name], value.to(found[name].dtype)), name
        assert found[name].shape == value.shape, name


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(96, 64), (3, 50), (1, 1), (700, 33)], ids=str)
def test_outputs_have_the_names_dtypes_and_shapes_that_the_plan_gives(
    quant_type: Any, double_quant: bool, shape: tuple[int, int]
) -> None:
    recipe = Recipe(quant_type, double_quant, dtype="bfloat16")
    planned = {o.name: o for o in format_of(recipe).outputs("w.weight", shape)}

    found = as_state_dict(recipe, weights(*shape, torch.bfloat16, seed=3), [0, shape[0]])

    assert found.keys() == planned.keys()
    for name, value in found.items():
        output = planned[name]
        assert value.element_size() == DTYPE_BYTES[output.dtype]
        assert value.nbytes <= output.nbytes if output.is_state else tuple(value.shape) == output.shape


def test_tiles_as_the_plan_cuts_them_hold_whole_blocks() -> None:
    values = weights(1000, 24, torch.bfloat16, seed=4)
    bounds = tile_bounds(1000, 24, block=64, most=2000)
    recipe = Recipe("nf4", dtype="bfloat16")

    found = as_state_dict(recipe, values, list(bounds))

    assert len(bounds) > 3
    for name, value in as_state_dict(recipe, values, [0, 1000]).items():
        assert same(found[name], value), name


# What is not finite


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 63, 64, 500, 1049])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(
    quant_type: Any, dtype: torch.dtype, bad: float, place: int
) -> None:
    values = weights(21, 50, dtype, seed=5)
    values.view(-1)[place] = bad

    with pytest.raises(NotFinite, match=r"^layers\.3\.weight: holds a NaN or an infinity"):
        encode(Recipe(quant_type), values, name="layers.3.weight")


def test_a_value_too_large_for_float16_is_refused_for_int8_only() -> None:
    values = weights(2, 64, torch.float32, seed=6)
    values[1, 3] = 70_000.0

    with pytest.raises(NotFinite, match="too large for float16"):
        encode(Recipe("int8"), values)

    assert bool(restored(Recipe("nf4"), values).isfinite().all())


@pytest.mark.parametrize(
    ("recipe", "value", "words"),
    [
        (Recipe("nf4", dtype="float16"), 70_000.0, "a value too large for float16"),
        (Recipe("fp4", double_quant=False, dtype="float16"), 65_505.0, "a value too large for float16"),
        (Recipe("nf4", double_quant=False, dtype="bfloat16"), 3.4e38, "a value too large for bfloat16"),
        (Recipe("nf4", dtype="bfloat16"), 1e38, "its values are too large for double quantization"),
    ],
)
def test_what_a_loader_would_make_an_infinity_of_is_refused(recipe: Recipe, value: float, words: str) -> None:
    with pytest.raises(NotFinite, match=f"^w: .*{words}$"):
        encoder(recipe).finish("w", (64, 64), [torch.full((64,), value)])


def test_the_largest_values_that_a_dtype_has_are_quantized() -> None:
    recipe = Recipe("nf4", double_quant=False, dtype="float16")

    assert encoder(recipe).finish("w", (64, 64), [torch.full((64,), 65_504.0)])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_zeros_stay_zeros(quant_type: Any) -> None:
    values = torch.zeros(5, 50, dtype=torch.bfloat16)

    tile = encode(Recipe(quant_type), values)

    assert tile.scales is not None
    assert float(tile.scales.max()) <= 1e-38  # what bitsandbytes gives to a last block that is short
    assert tile.sums is not None
    assert not tile.sums.any()


# What is taken from bitsandbytes


@pytest.mark.parametrize("quant_type", FOUR_BITS)
def test_the_map_of_codes_is_that_of_bitsandbytes(quant_type: Any) -> None:
    assert same(four_bit_map(quant_type), bitsandbytes.functional.get_4bit_type(quant_type, device="cpu"))


def test_the_map_of_an_absmax_is_that_of_bitsandbytes() -> None:
    assert same(dynamic_map(), bitsandbytes.functional.create_dynamic_map())


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000, 70_000])
def test_an_absmax_is_quantized_as_bitsandbytes_quantizes_it_blockwise(count: int) -> None:
    centred = weights(1, count, torch.float32, seed=7)[0]
    expected, state = bitsandbytes.functional.quantize_blockwise(centred.clone(), blocksize=NESTED_BLOCK)

    codes, absmax = quantize_absmax(centred.clone())

    assert same(codes, expected)
    assert same(absmax, state.absmax)

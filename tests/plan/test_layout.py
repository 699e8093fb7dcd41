"""Where bytes go and where tensors are cut, and that quant states say what bitsandbytes' own do."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.plan.layout import header_json, lay_out, pack_shards, shard_names
from converter.quantize.cut import MIN_MERGE_ROWS, tile_bounds
from converter.quantize.format import Output
from converter.quantize.formats import format_of
from converter.quantize.four_bit import LONGEST_FLOAT, quant_state_json
from converter.read.header import DTYPE_BYTES
from converter.recipe import BLOCK_SIZES, Recipe
from converter.silence import quietly

with quietly():
    from bitsandbytes.functional import QuantState, get_4bit_type, int8_vectorwise_quant, quantize_4bit

NF4 = Recipe("nf4", dtype="bfloat16")
FOUR_BIT_RECIPES = [
    Recipe(quant_type=quant_type, double_quant=double_quant, block_size=block_size, dtype=dtype)
    for quant_type in ("nf4", "fp4")
    for double_quant in (True, False)
    for block_size, dtype in ((32, "float16"), (64, "bfloat16"), (4096, "bfloat16"))
]


def in_short(recipe: Recipe) -> str:
    return f"{recipe.quant_type} {'double' if recipe.double_quant else 'single'} {recipe.block_size} {recipe.dtype}"


FLOAT32 = st.floats(width=32)
SMALLEST, LARGEST = 1.401298464324817e-45, 3.4028234663852886e38

# Tiles

ROWS = st.integers(0, 300) | st.integers(0, 300_000)
COLUMNS = st.integers(0, 300) | st.integers(0, 50_000) | st.sampled_from([64, 4096, 14336])
BLOCKS = st.sampled_from([1, *BLOCK_SIZES])
MOST = st.integers(1, 10_000) | st.integers(1, 1 << 23)


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, columns=COLUMNS, block=BLOCKS, most=MOST)
def test_tiles_hold_all_rows_begin_with_whole_blocks_and_are_neither_too_short_nor_too_long(
    rows: int, columns: int, block: int, most: int
) -> None:
    """Too short is what BLAS would compute in another way. Too long is more than `most` elements and a block, and twice
    the shortest length."""
    bounds = tile_bounds(rows, columns, block=block, most=most)

    assert (bounds[0], bounds[-1]) == (0, rows)
    lengths = [end - start for start, end in pairwise(bounds)]
    assert all(bound * columns % block == 0 for bound in bounds[:-1])
    assert len(lengths) == 1 or min(lengths) >= MIN_MERGE_ROWS
    if columns:
        unit = block // math.gcd(columns, block)
        shortest = math.ceil(MIN_MERGE_ROWS / unit) * unit
        assert max(lengths) < max(math.ceil(most / columns), 2 * shortest - 1) + unit


@pytest.mark.parametrize(
    ("rows", "columns", "block", "most", "bounds"),
    [
        (4096, 4096, 64, 4 << 20, (0, 1024, 2048, 3072, 4096)),
        (128, 64, 64, 10**9, (0, 128)),
        (127, 64, 64, 1, (0, 127)),
        (128, 64, 64, 1, (0, 64, 128)),
        (200, 3, 64, 1, (0, 64, 128, 200)),
        (0, 64, 64, 1, (0, 0)),
        (5, 0, 64, 1, (0, 5)),
    ],
)
def test_a_matrix_is_cut_into_equal_parts_where_blocks_allow(
    rows: int, columns: int, block: int, most: int, bounds: tuple[int, ...]
) -> None:
    assert tile_bounds(rows, columns, block=block, most=most) == bounds


# Shards


@given(sizes=st.lists(st.integers(0, 100), max_size=30), limit=st.integers(1, 150))
def test_units_stay_in_order_when_packed_into_shards(sizes: list[int], limit: int) -> None:
    shards = pack_shards(sizes, limit)

    assert [index for shard in shards for index in shard] == list(range(len(sizes)))
    assert all(shards) or shards == [[]]


@given(sizes=st.lists(st.integers(0, 100), max_size=30), limit=st.integers(1, 150))
def test_no_shard_exceeds_the_limit_but_one_of_a_single_unit(sizes: list[int], limit: int) -> None:
    shards = pack_shards(sizes, limit)

    assert all(len(shard) == 1 or sum(sizes[index] for index in shard) <= limit for shard in shards)


@given(sizes=st.lists(st.integers(0, 100), max_size=30), limit=st.integers(1, 150))
def test_no_shard_ends_while_the_next_unit_would_fit(sizes: list[int], limit: int) -> None:
    shards = pack_shards(sizes, limit)

    assert all(sum(sizes[i] for i in shard) + sizes[after[0]] > limit for shard, after in pairwise(shards))


def test_shards_are_named_as_transformers_names_them() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert shard_names(100) == sorted(shard_names(100))


# The layout of a shard


@st.composite
def output_sets(draw: st.DrawFn) -> list[Output]:
    name = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
    names = draw(st.lists(name, max_size=8, unique=True))
    shapes = st.lists(st.integers(0, 200), max_size=3).map(tuple)
    state = st.tuples(st.integers(1, 300))
    return [
        Output(name, "U8", draw(state), is_state=True)
        if draw(st.booleans())
        else Output(name, draw(st.sampled_from(list(DTYPE_BYTES))), draw(shapes))
        for name in names
    ]


@settings(deadline=None)
@given(outputs=output_sets())
def test_the_tensors_of_a_shard_lie_one_after_the_other_without_overlap_or_hole(outputs: list[Output]) -> None:
    layout = lay_out(outputs)

    end = 8 + layout.header_bytes
    tensors = [output for output in outputs if not output.is_state]
    for output in sorted(tensors, key=lambda output: (layout.offsets[output.name], output.nbytes)):
        assert layout.offsets[output.name] == end
        end += output.nbytes
    assert layout.offsets.keys() == {output.name for output in tensors}
    assert layout.states_offset == end


@settings(deadline=None)
@given(outputs=output_sets())
def test_the_quant_states_come_last_and_have_room_for_their_longest_form(outputs: list[Output]) -> None:
    layout = lay_out(outputs)

    assert layout.size == layout.states_offset + sum(output.nbytes for output in outputs if output.is_state)


@settings(deadline=None)
@given(outputs=output_sets())
def test_every_tensor_is_aligned_to_the_width_of_its_dtype(outputs: list[Output]) -> None:
    layout = lay_out(outputs)

    dtypes = {output.name: output.dtype for output in outputs}
    assert all(offset % DTYPE_BYTES[dtypes[name]] == 0 for name, offset in layout.offsets.items())


@settings(deadline=None)
@given(outputs=output_sets(), data=st.data())
def test_the_header_fits_into_its_room_however_short_the_quant_states_turn_out(
    outputs: list[Output], data: st.DataObject
) -> None:
    layout = lay_out(outputs)

    start = 8 + layout.header_bytes
    placed = [(o, layout.offsets[o.name] - start, o.nbytes) for o in outputs if not o.is_state]
    end = layout.states_offset
    for output in (output for output in outputs if output.is_state):
        length = data.draw(st.integers(0, output.nbytes))
        placed.append((output, end - start, length))
        end += length
    assert len(header_json(placed)) <= layout.header_bytes


def test_tensors_of_one_width_keep_their_order() -> None:
    outputs = [Output(name, dtype, (3,)) for name, dtype in (("b", "BF16"), ("z", "F32"), ("a", "F16"), ("y", "I32"))]

    offsets = lay_out(outputs).offsets

    assert sorted(offsets, key=lambda name: offsets[name]) == ["z", "y", "b", "a"]


def test_the_header_says_that_the_tensors_are_pytorchs_as_transformers_demands() -> None:
    header = json.loads(header_json([]))

    assert header == {"__metadata__": {"format": "pt"}}


# Quant states


def quant_state(recipe: Recipe, shape: tuple[int, ...], offset: float | None) -> Any:
    """bitsandbytes' own, of a weight whose mean absmax is `offset`; None: single quant."""
    state = QuantState(
        absmax=torch.ones(1),
        shape=torch.Size(shape),
        code=get_4bit_type(recipe.quant_type, device="cpu"),
        blocksize=recipe.block_size,
        quant_type=recipe.quant_type,
        dtype=getattr(torch, recipe.dtype),
    )
    if offset is not None:
        state.offset = torch.tensor(offset, dtype=torch.float32)
        state.state2 = QuantState(absmax=torch.ones(1), code=torch.ones(256), blocksize=256, dtype=torch.float32)
        state.nested = True
    return state


def packed_state(state: Any, recipe: Recipe) -> bytes:
    return bytes(state.as_dict(packed=True)[f"quant_state.bitsandbytes__{recipe.quant_type}"].tolist())


@pytest.mark.parametrize("recipe", FOUR_BIT_RECIPES, ids=in_short)
@pytest.mark.parametrize("offset", [0.0, 0.0234375, SMALLEST, 1.1754942106924411e-38, 1e-5, 16777216.0, LARGEST])
def test_a_quant_state_is_spelled_as_bitsandbytes_spells_it(recipe: Recipe, offset: float) -> None:
    mean = torch.tensor(offset).item() if recipe.double_quant else None

    ours = quant_state_json(recipe, (4096, 11008), mean)

    assert ours == packed_state(quant_state(recipe, (4096, 11008), mean), recipe)


@settings(deadline=None)
@given(offset=FLOAT32, rows=st.integers(0, 1 << 20), columns=st.integers(0, 1 << 20))
def test_a_quant_state_is_spelled_as_bitsandbytes_spells_it_whatever_its_offset(
    offset: float, rows: int, columns: int
) -> None:
    ours = quant_state_json(NF4, (rows, columns), offset)

    assert ours == packed_state(quant_state(NF4, (rows, columns), offset), NF4)


@settings(deadline=None, max_examples=200)
@given(offset=FLOAT32)
def test_no_float32_is_spelled_longer_than_the_float_that_room_is_reserved_for(offset: float) -> None:
    assert len(json.dumps(offset)) <= len(json.dumps(LONGEST_FLOAT))


@pytest.mark.parametrize("recipe", FOUR_BIT_RECIPES, ids=in_short)
@pytest.mark.parametrize("shape", [(4, 64), (3, 5), (1, 1), (64, 272)])
def test_the_outputs_of_a_4_bit_weight_are_the_tensors_that_bitsandbytes_stores(
    recipe: Recipe, shape: tuple[int, int]
) -> None:
    weight = torch.linspace(-1, 1, math.prod(shape), dtype=getattr(torch, recipe.dtype)).view(shape)
    packed, state = quantize_4bit(
        weight, blocksize=recipe.block_size, compress_statistics=recipe.double_quant, quant_type=recipe.quant_type
    )

    outputs = format_of(recipe).outputs("m.weight", shape)

    stored = {"m.weight": packed, **{f"m.weight.{key}": t for key, t in state.as_dict(packed=True).items()}}
    safetensors_dtype = {torch.uint8: "U8", torch.float32: "F32"}
    *tensors, planned_state = outputs
    assert planned_state.is_state
    assert planned_state.nbytes >= stored.pop(planned_state.name).numel()
    assert {o.name: (o.dtype, o.shape) for o in tensors} == {
        name: (safetensors_dtype[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()
    }


def test_the_outputs_of_an_8_bit_weight_are_codes_scales_and_a_format() -> None:
    codes, scales, _ = int8_vectorwise_quant(torch.ones(4, 64, dtype=torch.float16))

    outputs = format_of(Recipe(quant_type="int8")).outputs("m.weight", (4, 64))

    assert outputs == (
        Output("m.weight", "I8", tuple(codes.shape)),
        Output("m.SCB", "F32", tuple(scales.shape)),
        Output("m.weight_format", "U8", ()),
    )


@pytest.mark.parametrize(("dtype", "spelled"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_a_weight_in_16_bits_is_its_own_only_output(dtype: Any, spelled: str) -> None:
    assert format_of(Recipe("none", dtype=dtype)).outputs("w", (4, 64)) == (Output("w", spelled, (4, 64)),)

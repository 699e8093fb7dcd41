"""Each kind of change, on tiles, against PEFT's own layers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from converter.merge.bias import LoraBias
from converter.merge.blocks import BlockLora
from converter.merge.change import Change, MergedTile, Rounding, read_stored
from converter.merge.convolution import ConvolutionLora
from converter.merge.dora import Dora
from converter.merge.embedding import EmbeddingDora, EmbeddingLora
from converter.merge.experts import ExpertFactors, OneExpert, StackedExperts
from converter.merge.tokens import TokenRows
from converter.read.folder import LocalFolder
from converter.read.header import TensorHeader, read_header

CPU = torch.device("cpu")
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ROUNDINGS = [Rounding("float32", "bfloat16"), Rounding("reference", "bfloat16"), Rounding("reference", "float16")]


def peft_layer(layer: nn.Module, config: Any, scale: float = 0.05) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's layer around `layer`, trained a little; and its adapter's tensors, by the ends of their names."""
    wrapped = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        tensors = {
            name.replace(".default", ""): value.detach().float()
            for name, value in wrapped.named_parameters()
            if "base_layer" not in name
        }
        for name, value in wrapped.named_parameters():
            if "base_layer" not in name:
                value += torch.randn(value.shape, generator=generator) * scale
    return wrapped, tensors


def saved(folder: Path, tensors: dict[str, Tensor]) -> tuple[LocalFolder, dict[str, TensorHeader]]:
    """An adapter's file."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    opened = LocalFolder(folder)
    return opened, read_header(opened, "adapter_model.safetensors")


def merged(change: Change, folder: LocalFolder, weight: Tensor, rounding: Rounding, rows: int) -> MergedTile:
    """All of a weight, merged in tiles of so many rows."""
    merge = change.load(folder, CPU, rounding)
    assert merge is not None
    bounds = [*range(0, max(1, weight.shape[0] - rows + 1), rows), weight.shape[0]]
    tiles = [merge(weight[start:end], start, end) for start, end in itertools.pairwise(bounds)]
    return MergedTile(
        *(torch.cat([getattr(tile, part) for tile in tiles]) for part in ("values", "exact", "base", "delta"))
    )


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1).to(dtype)


def linear(outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    layer.weight.data = weights(outputs, inputs, dtype=dtype)
    if bias:
        layer.bias.data = weights(outputs, dtype=dtype)
    return layer


def test_each_kind_says_what_it_is(tmp_path: Path) -> None:
    _, headers = saved(tmp_path, {"a": torch.ones(4, 96), "b": torch.ones(70, 4), "m": torch.ones(70)})
    dora = Dora("layer", headers["a"], headers["b"], 2.0, headers["m"])

    assert dora.as_json() == {"dora": {"module": "layer", "rank": 4, "scaling": 2.0}}
    assert dora.shape == (70, 96)
    assert dora.label == "DoRA, rank 4, scaling 2"
    assert set(dora.parts) == set(headers.values())


@pytest.mark.parametrize("rows", [64, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("use_rslora", [True, False])
def test_dora_on_a_linear_layer_has_pefts_bits(tmp_path: Path, use_rslora: bool, dtype: torch.dtype, rows: int) -> None:
    layer = linear(200, 96, dtype)
    config = LoraConfig(r=8, lora_alpha=12, use_dora=True, use_rslora=use_rslora, target_modules=["0"])
    wrapped, tensors = peft_layer(layer, config)
    folder, headers = saved(tmp_path, tensors)
    parts = [headers[f"{name}.weight"] for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
    change = Dora("0", parts[0], parts[1], wrapped.scaling["default"], parts[2])
    weight = layer.weight.detach().clone()

    rounding = Rounding("reference", DTYPES[dtype]) if dtype in DTYPES else ROUNDINGS[0]
    tile = merged(change, folder, weight, rounding, rows)

    wrapped.merge()
    assert not torch.equal(tile.values, weight)
    assert tile.values.dtype == dtype
    assert torch.equal(tile.values, wrapped.get_base_layer().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dora_on_a_conv1d_has_pefts_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = Conv1D(200, 96).to(dtype)
    layer.weight.data = weights(96, 200, dtype=dtype)
    wrapped, tensors = peft_layer(layer, LoraConfig(r=8, use_dora=True, fan_in_fan_out=True, target_modules=["0"]))
    folder, headers = saved(tmp_path, tensors)
    parts = [headers[f"{name}.weight"] for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
    weight = layer.weight.detach().clone()

    rounding = Rounding("reference", "bfloat16") if dtype in DTYPES else ROUNDINGS[0]
    tile = merged(Dora("0", parts[0], parts[1], 1.0, parts[2]), folder, weight.T, rounding, 200)

    wrapped.merge()
    assert torch.equal(tile.values, wrapped.get_base_layer().weight.T)


@pytest.mark.parametrize("rows", [64, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_lora_on_an_embedding_has_pefts_bits(tmp_path: Path, dtype: torch.dtype, rows: int) -> None:
    layer = nn.Embedding(300, 96, dtype=dtype)
    layer.weight.data = weights(300, 96, dtype=dtype)
    wrapped, tensors = peft_layer(layer, LoraConfig(r=8, lora_alpha=20, target_modules=["0"]))
    folder, headers = saved(tmp_path, tensors)
    change = EmbeddingLora("0", headers["lora_embedding_A"], headers["lora_embedding_B"], 2.5)
    weight = layer.weight.detach().clone()

    rounding = Rounding("reference", DTYPES[dtype]) if dtype in DTYPES else ROUNDINGS[0]
    tile = merged(change, folder, weight, rounding, rows)

    wrapped.merge()
    assert not torch.equal(tile.values, weight)
    assert torch.equal(tile.values, wrapped.get_base_layer().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bias_of_lora_has_pefts_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = linear(200, 96, dtype, bias=True)
    wrapped, tensors = peft_layer(layer, LoraConfig(r=8, lora_alpha=12, lora_bias=True, target_modules=["0"]))
    folder, headers = saved(tmp_path, tensors)
    bias = layer.bias.detach().clone()

    rounding = Rounding("reference", "bfloat16") if dtype in DTYPES else ROUNDINGS[0]
    tile = merged(LoraBias("0", headers["lora_B.bias"], 1.5), folder, bias[:, None], rounding, 64)

    wrapped.merge()
    assert not torch.equal(tile.values.flatten(), bias)
    assert torch.equal(tile.values.flatten(), wrapped.get_base_layer().bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_trained_tokens_replace_rows_as_pefts_do(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = nn.Embedding(300, 96, dtype=dtype)
    layer.weight.data = weights(300, 96, dtype=dtype)
    tokens = [7, 299, 0, 130]
    wrapped, tensors = peft_layer(layer, TrainableTokensConfig(token_indices=tokens, target_modules=["0"]))
    folder, headers = saved(tmp_path, tensors)
    weight = layer.weight.detach().clone()
    change = TokenRows("0", headers["trainable_tokens_delta"], tuple(tokens), 300)

    rounding = Rounding("reference", "bfloat16") if dtype in DTYPES else ROUNDINGS[0]
    tile = merged(change, folder, weight, rounding, 64)

    wrapped.merge()
    assert change.shape == (300, 96)
    assert torch.equal(tile.values, wrapped.get_base_layer().weight)
    assert (tile.values != weight).any(dim=1).nonzero().flatten().tolist() == sorted(tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(24, 40, 3),
        nn.Conv2d(3, 40, 14),
        nn.Conv2d(24, 40, 1),
        nn.Conv2d(24, 40, (3, 5)),
        nn.Conv3d(3, 40, (2, 7, 7)),
    ],
    ids=str,
)
def test_lora_on_a_convolution_has_pefts_bits(
    tmp_path: Path, layer: nn.Conv2d, use_dora: bool, dtype: torch.dtype
) -> None:
    layer = type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, dtype=dtype)  # type: ignore[arg-type]
    layer.weight.data = weights(*layer.weight.shape, dtype=dtype)
    wrapped, tensors = peft_layer(layer, LoraConfig(r=4, lora_alpha=6, use_dora=use_dora, target_modules=["0"]))
    folder, headers = saved(tmp_path, tensors)
    magnitude = headers["lora_magnitude_vector.weight"] if use_dora else None
    change = ConvolutionLora("0", headers["lora_A.weight"], headers["lora_B.weight"], 1.5, magnitude)
    weight = layer.weight.detach().clone()

    rounding = Rounding("reference", "bfloat16") if dtype in DTYPES else ROUNDINGS[0]
    tile = merged(change, folder, weight.view(40, -1), rounding, 40)

    wrapped.merge()
    assert change.shape == weight.shape
    assert not torch.equal(tile.values.view(weight.shape), weight)
    assert torch.equal(tile.values.view(weight.shape), wrapped.get_base_layer().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_block_diagonal_lora_has_pefts_bits(tmp_path: Path, factor: str, dtype: torch.dtype) -> None:
    layer = linear(200, 96, dtype)
    names = {f"target_modules_bd_{factor.lower()}": ["0"]}
    config = LoraConfig(r=8, lora_alpha=12, use_bdlora=BdLoraConfig(nblocks=4, **names), target_modules=["0"])
    wrapped, tensors = peft_layer(layer, config)
    folder, headers = saved(tmp_path, tensors)
    change = BlockLora("0", headers["lora_A.weight"], headers["lora_B.weight"], 1.5, factor, 4)
    weight = layer.weight.detach().clone()

    rounding = Rounding("reference", "bfloat16") if dtype in DTYPES else ROUNDINGS[0]
    tile = merged(change, folder, weight, rounding, 64)

    wrapped.merge()
    assert change.shape == weight.shape
    assert not torch.equal(tile.values, weight)
    assert torch.equal(tile.values, wrapped.get_base_layer().weight)


class Stack(nn.Module):
    """Experts as transformers has them: one parameter."""

    def __init__(self, weight: Tensor, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.is_transposed = nn.Parameter(weight), is_transposed


@pytest.fixture(params=[False, True], ids=["(out, in)", "(in, out)"])
def turned(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def stack(request: pytest.FixtureRequest, turned: bool) -> Stack:
    return Stack(weights(3, 150, 96, dtype=request.param), is_transposed=turned)


def trained_stack(stack: Stack, folder: Path) -> tuple[Any, LocalFolder, ExpertFactors]:
    config = LoraConfig(r=8, lora_alpha=12, target_modules=[], target_parameters=["0.weight"])
    wrapped, tensors = peft_layer(stack, config)
    opened, headers = saved(folder, tensors)
    a, b = headers["lora_A.weight"], headers["lora_B.weight"]
    return wrapped, opened, ExpertFactors(a, b, 1.5, 3, turned=stack.is_transposed)


def rounding_of(weight: Tensor) -> Rounding:
    """The one that PEFT has on a base of the weight's dtype."""
    return Rounding("reference", DTYPES[weight.dtype]) if weight.dtype in DTYPES else ROUNDINGS[0]


@pytest.mark.parametrize("rows", [64, 97, 450])
def test_lora_on_stacked_experts_has_pefts_bits(tmp_path: Path, stack: Stack, rows: int) -> None:
    weight = stack.weight.detach().clone()
    wrapped, folder, factors = trained_stack(stack, tmp_path)
    change = StackedExperts("0", factors)

    tile = merged(change, folder, weight.view(450, 96), rounding_of(weight), rows)

    wrapped.merge()
    assert change.shape == weight.shape
    assert not torch.equal(tile.values.view(weight.shape), weight)
    assert torch.equal(tile.values.view(weight.shape), wrapped.get_base_layer().weight)


@pytest.mark.parametrize(("first", "rows"), [(0, 150), (0, 75), (75, 75), (140, 10)])
def test_the_weights_of_one_expert_have_the_bits_of_the_stack(
    tmp_path: Path, stack: Stack, first: int, rows: int
) -> None:
    weight = stack.weight.detach().clone()
    wrapped, folder, factors = trained_stack(stack, tmp_path)

    parts = [OneExpert("0", factors, expert, first, rows) for expert in range(3)]
    tiles = [
        merged(part, folder, weight[number, first : first + rows], rounding_of(weight), 64)
        for number, part in enumerate(parts)
    ]

    wrapped.merge()
    assert {part.shape for part in parts} == {(rows, 96)}
    assert torch.equal(torch.stack([t.values for t in tiles]), wrapped.get_base_layer().weight[:, first : first + rows])


def test_factors_that_are_grouped_by_expert_are_those_of_peft_in_another_order(tmp_path: Path) -> None:
    stack = Stack(weights(3, 150, 96))
    weight = stack.weight.detach().clone()
    _, folder, factors = trained_stack(stack, tmp_path)
    expected = merged(StackedExperts("0", factors), folder, weight.view(450, 96), ROUNDINGS[0], 450)
    a, b = (read_stored(part, folder) for part in (factors.a, factors.b))
    (tmp_path / "grouped").mkdir()
    in_groups = b.view(150, 8, 3).transpose(1, 2).reshape(150, 24)
    folder, headers = saved(tmp_path / "grouped", {"a": a, "b": in_groups})

    grouped = ExpertFactors(headers["a"], headers["b"], 1.5, 3, grouped=True)
    tile = merged(StackedExperts("0", grouped), folder, weight.view(450, 96), ROUNDINGS[0], 450)

    assert not torch.equal(in_groups, b)
    assert torch.equal(tile.values, expected.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dora_on_an_embedding_has_the_lengths_that_peft_means(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = nn.Embedding(3000, 96, dtype=dtype)
    layer.weight.data = weights(3000, 96, dtype=dtype)
    wrapped, tensors = peft_layer(layer, LoraConfig(r=8, lora_alpha=20, use_dora=True, target_modules=["0"]))
    folder, headers = saved(tmp_path, tensors)
    factors = headers["lora_embedding_A"], headers["lora_embedding_B"]
    change = EmbeddingDora("0", *factors, 2.5, headers["lora_magnitude_vector.weight"])
    weight, rounding = layer.weight.detach().clone(), rounding_of(layer.weight)
    made = []

    for rows in (64, 500):
        merge = change.load(folder, CPU, rounding)
        for start in range(0, 3000, rows):
            merge.survey(weight[start : start + rows], start, min(start + rows, 3000))
        made.append(merge(weight[100:200], 100, 200))

    wrapped.merge()
    expected = wrapped.get_base_layer().weight
    assert not torch.equal(made[0].values, weight[100:200])
    assert torch.equal(made[0].values, made[1].values), "a tile's size shows"
    # PEFT's own sum is in float32.
    torch.testing.assert_close(
        made[0].values, expected[100:200], rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=0
    )
    exact = (weight.double() + wrapped.get_delta_weight("default").double()).norm(dim=0)
    found = made[0].exact.double() / (weight[100:200].double() + wrapped.get_delta_weight("default")[100:200].double())
    torch.testing.assert_close(found[5], (tensors["lora_magnitude_vector.weight"].double() / exact), rtol=1e-6, atol=0)

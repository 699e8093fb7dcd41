"""Bases in FP8 and of compressed-tensors are converted as the 16-bit model that their libraries restore."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from converter import Job, Recipe, Resources, convert, convert_batch, plan_conversion, verify
from converter.errors import Interrupted, Unsupported
from tests.folders import change_json, contents
from tests.models import save_adapter, save_base
from tests.packed import awq, gptq, rounded
from tests.quantized import same_bytes
from tests.reference import differences, tensors_of

KINDS = ["fp8 of transformers", "fp8", "fp8-block", "w4a16", "w8a16", "nvfp4a16", "mxfp4a16", "gptq", "awq"]
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def restored(base: Path) -> dict[str, torch.Tensor]:
    """The weights of a base as compressed-tensors restores them."""
    tensors = tensors_of(base)
    config = QuantizationConfig.model_validate(json.loads((base / "config.json").read_text())["quantization_config"])
    [scheme] = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    weights = {}
    for module in sorted({name.rpartition(".")[0] for name in tensors}):
        parts = {name.rpartition(".")[2]: tensors[name] for name in tensors if name.rpartition(".")[0] == module}
        if "weight_scale" in parts:
            parts = {"weight": compressor.decompress(parts, scheme)["weight"]}
        weights |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return weights


def save_fp8(plain: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A base as DeepSeek saves its models; what its codes stand for."""
    codes, weights = {}, {}
    for name, tensor in tensors_of(plain).items():
        codes[name] = weights[name] = tensor
        if "_proj" in name:
            blocks = tensor.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            scale = blocks.abs().amax((1, 3)) / 448
            fp8 = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            codes[name], codes[f"{name}_scale_inv"] = fp8.flatten(2).flatten(0, 1).contiguous(), scale
            weights[name] = (fp8.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    folder.mkdir()
    save_file(codes, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    change_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return weights


def save_packed(plain: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """A base of GPTQ, its columns in the order of their activations, or of AWQ; what its codes stand for."""
    packed, weights = {}, {}
    for name, tensor in tensors_of(plain).items():
        if "_proj" in name:
            made = rounded(tensor, 64, ordered=kind == "awq")
            parts = awq(made) if kind == "awq" else gptq(made)
            packed |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            weights[name] = made.weight
        else:
            packed[name] = weights[name] = tensor
    folder.mkdir()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    change_json(folder / "config.json", quantization_config={"quant_method": kind, "bits": 4, "group_size": 64})
    return weights


def save_trio(place: Path, kind: str) -> tuple[Path, Path, Path]:
    """A quantized base, the base that it stands for, and an adapter."""
    plain = save_base(place / "plain", "llama", **WIDE)
    adapter = save_adapter(place / "adapter", plain, "llama", target_modules=["q_proj", "down_proj"])
    base, same = place / "base", place / "same"
    if kind == "fp8 of transformers":
        weights = save_fp8(plain, base)
    elif kind in ("gptq", "awq"):
        weights = save_packed(plain, base, kind)
    else:
        convert(plain, None, base, Recipe(quant_type=kind))
        weights = restored(base)
    same.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, same / "model.safetensors")
    (same / "config.json").write_bytes((plain / "config.json").read_bytes())
    return base, same, adapter


@pytest.fixture(scope="module")
def trios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    return {kind: save_trio(tmp_path_factory.mktemp("trio"), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_becomes_the_model_that_its_library_restores(
    kind: str, trios: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    base, same, _ = trios[kind]

    out = convert(base, None, tmp_path / "out", Recipe(quant_type="none")).out

    expected, found = tensors_of(same), tensors_of(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_bytes(found[name], expected[name].to(torch.bfloat16))] == []
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(quant_type="w4a16", group_size=32)], ids=["nf4", "w4a16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_merged_and_quantized_as_the_model_that_it_stands_for(
    kind: str, recipe: Recipe, trios: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    base, same, adapter = trios[kind]
    dtype = Recipe(**recipe.as_json() | {"dtype": "bfloat16", "keep": ()})

    report = convert(base, adapter, tmp_path / "out", dtype)

    # On the points that the output has, the nearest code would be the base's own.
    is_on_points = recipe.quant_type == "w4a16" and kind in ("w4a16", "gptq", "awq")
    rounding: Literal["adapter", "nearest"] = "adapter" if is_on_points else "nearest"
    as_stood_for = convert(same, adapter, tmp_path / "same", replace(dtype, rounding=rounding))
    assert differences(report.out, as_stood_for.out) == []
    assert report.plan.recipe.rounding == rounding
    assert any(note.startswith("the base is quantized (") for note in report.plan.notes)
    assert "all its weights are quantized again" in report.plan.notes
    assert verify(report.out, base, adapter).problems == []


@pytest.mark.parametrize("kind", ["w4a16", "gptq", "awq"])
def test_error_feedback_keeps_what_the_adapter_does_where_the_nearest_whole_number_is_the_bases_own(
    kind: str, trios: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    base, same, adapter = trios[kind]
    exact = tensors_of(convert(same, adapter, tmp_path / "exact", Recipe(quant_type="none")).out)
    config = load_file(adapter / "adapter_model.safetensors")

    def missed(rounding: Literal["adapter", "nearest"]) -> float:
        """Of what the weights make of the adapter's own directions."""
        recipe = Recipe(quant_type="w4a16", group_size=32, rounding=rounding)
        made = restored(convert(base, adapter, tmp_path / rounding, recipe).out)
        total = 0.0
        for name, a in config.items():
            if name.endswith("lora_A.weight"):
                weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                total += float(((made[weight].float() - exact[weight].float()) @ a.float().T).square().sum())
        return total

    assert missed("adapter") < 0.25 * missed("nearest")


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_threads_and_an_interruption_change_no_byte(
    kind: str, trios: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    base, _, adapter = trios[kind]
    expected = contents(convert(base, adapter, tmp_path / "whole").out)
    resources = Resources(threads=1, journal_seconds=0.0, tile_weights=(1 << 14, 1 << 14))
    tiles = itertools.count()

    with pytest.raises(Interrupted):
        convert(
            base,
            adapter,
            tmp_path / "out",
            resources=resources,
            stop=lambda: signal.SIGTERM if next(tiles) == 9 else None,
        )
    out = convert(base, adapter, tmp_path / "out", resources=resources).out

    assert contents(out) == expected
    assert convert(base, adapter, out).nothing_to_do


def test_a_batch_of_an_fp8_base_makes_what_single_conversions_make(
    trios: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    base, _, first = trios["fp8 of transformers"]
    other = save_adapter(tmp_path / "other", base.with_name("plain"), "llama", scale=0.1, target_modules=["k_proj"])

    outcomes = convert_batch([Job(tmp_path / f"b{n}", one, base) for n, one in enumerate((first, other))])

    assert [(outcome.status, outcome.shared_bytes > 0) for outcome in outcomes] == [("made", True)] * 2
    for number, adapter in enumerate((first, other)):
        assert differences(tmp_path / f"b{number}", convert(base, adapter, tmp_path / f"a{number}").out) == []


@pytest.mark.parametrize("method", ["mxfp4", "aqlm", "quip", "modelopt", "torchao", "hqq"])
def test_other_methods_are_refused_by_name_with_what_to_give(
    method: str, trios: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    base, _, _ = trios["fp8"]
    other = tmp_path / "base"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    change_json(other / "config.json", quantization_config={"quant_method": method, "bits": 4})

    with pytest.raises(Unsupported, match=rf"quantized already \({method}; see .*give the 16-bit model"):
        plan_conversion(other, None)

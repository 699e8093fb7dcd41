"""An adapter that alters no value of the output is refused, whatever the format and the kind of change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import convert, plan_conversion
from converter.errors import NoEffect
from converter.recipe import Recipe
from tests.folders import copy
from tests.models import save_adapter

FORMATS: list[Any] = ["none", "nf4", "fp4", "int8", "fp8", "w4a16", "nvfp4a16"]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "one parameter of a layer": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
}


def smaller(adapter: Path, target: Path, factor: float) -> Path:
    """The adapter with a change that is `factor` times as large."""
    copy(adapter, target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= factor
    save_file(tensors, file)
    return target


@pytest.mark.parametrize("quant_type", FORMATS)
def test_a_change_that_rounding_takes_away_is_an_error(
    quant_type: Any, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = smaller(inputs[1], tmp_path / "adapter", 1e-12)

    with pytest.raises(NoEffect) as caught:
        convert(inputs[0], adapter, tmp_path / "out", Recipe(quant_type=quant_type))

    rounded = "bfloat16" if quant_type == "none" else quant_type
    assert f"what the adapter changes is not zero, but rounding to {rounded} takes all of it away" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant_type", ["none", "nf4"])
def test_so_it_is_for_each_kind_of_change(
    quant_type: Any, kind: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    made = save_adapter(tmp_path / "made", inputs[0], "llama", **KINDS[kind])

    with pytest.raises(NoEffect):
        convert(inputs[0], smaller(made, tmp_path / "adapter", 1e-15), tmp_path / "out", Recipe(quant_type=quant_type))
    convert(inputs[0], made, tmp_path / "out", Recipe(quant_type=quant_type))


@pytest.mark.parametrize("quant_type", FORMATS)
def test_a_change_that_alters_few_values_is_none(quant_type: Any, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = copy(inputs[1], tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor * 1e-12 if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    last = max(name for name in tensors if "lora_B" in name)
    tensors[last] = torch.zeros_like(tensors[last])
    tensors[last][0] = 0.5
    save_file(tensors, file)

    convert(inputs[0], adapter, tmp_path / "out", Recipe(quant_type=quant_type))

    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_change_of_zeros_of_either_sign_is_noted(zero: float, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = smaller(inputs[1], tmp_path / "adapter", zero)

    notes = plan_conversion(inputs[0], adapter).plan.notes

    assert "every lora_B of the adapter is zero: it was never trained, and changes nothing" in notes

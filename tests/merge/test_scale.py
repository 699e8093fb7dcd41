"""An adapter of which more or less than all is merged (`scale`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from converter import Recipe, convert
from converter.errors import BadRecipe, ConversionRefused, Unsupported
from tests.merge.merges import REFERENCE, different, save_tuned
from tests.merge.test_kinds import KINDS, MAKERS, lora
from tests.models import load, save_base
from tests.reference import tensors_of

LORAS = [kind for kind in KINDS if "tokens" not in kind and "tuning" not in kind]


def base_for(kind: str, folder: Path) -> Path:
    name = KINDS[kind][0]
    return MAKERS[name](folder, torch.bfloat16) if name in MAKERS else save_base(folder, name, torch.bfloat16)


def merged_by_peft(base: Path, adapter: Path, scale: float, work: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load(base, dtype=torch.bfloat16), adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)
    model.merge_and_unload().save_pretrained(work)
    return tensors_of(work)


@pytest.mark.parametrize("scale", [0.8, -1.5])
@pytest.mark.parametrize("kind", LORAS)
def test_a_scaled_adapter_is_merged_to_pefts_bits(kind: str, scale: float, tmp_path: Path) -> None:
    base = base_for(kind, tmp_path / "base")
    save_tuned(tmp_path / "adapter", base, KINDS[kind][1])

    convert(base, tmp_path / "adapter", tmp_path / "out", replace(REFERENCE, scale=scale))

    theirs = merged_by_peft(base, tmp_path / "adapter", scale, tmp_path / "theirs")
    assert different(tensors_of(tmp_path / "out"), theirs) == []
    convert(base, tmp_path / "adapter", tmp_path / "whole", REFERENCE)
    assert different(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")) != []


def test_what_is_not_scaled_is_said(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, lora(trainable_token_indices=[5, 17], use_dora=True))

    report = convert(base, tmp_path / "adapter", tmp_path / "out", Recipe(scale=0.5))

    said = (
        "`scale` 0.5 multiplies the adapter's deltas, but not the tensors and rows that it replaces and the lengths "
        "that DoRA learned"
    )
    assert said in report.plan.notes


def test_the_scale_is_part_of_the_recipe_and_of_the_fingerprint(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, lora())

    plain, scaled, again = (
        convert(base, tmp_path / "adapter", tmp_path / name, Recipe(scale=scale))
        for name, scale in (("a", 1.0), ("b", 0.8), ("c", 0.8))
    )

    assert plain.fingerprint != scaled.fingerprint == again.fingerprint
    recipes = [json.loads((tmp_path / name / "conversion.json").read_text())["recipe"] for name in "ab"]
    assert "scale" not in recipes[0]
    assert Recipe.from_json(recipes[1]).scale == 0.8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tuner_without_a_scale_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))

    with pytest.raises(Unsupported, match=r"k_proj: IA3 by PEFT: `scale` has no meaning for this kind of adapter"):
        convert(base, tmp_path / "adapter", tmp_path / "out", Recipe(scale=0.8))

    assert not (tmp_path / "out").exists()


def test_a_scale_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="`scale` has no meaning without an `adapter`"):
        convert(save_base(tmp_path / "base", "llama"), None, tmp_path / "out", Recipe(scale=0.8))


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), 1e6])
def test_a_scale_that_merges_nothing_or_anything_is_refused(scale: float) -> None:
    with pytest.raises(ConversionRefused, match=r"`scale` .*: expected a number that is not 0, at most 1000"):
        Recipe(scale=scale)


@pytest.mark.parametrize("stated", [True, "0.8", None, 2**70])
def test_a_scale_in_json_is_a_number(stated: object) -> None:
    with pytest.raises(BadRecipe, match="scale is not a number"):
        Recipe.from_json({"scale": stated})

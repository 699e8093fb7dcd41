"""Every other tuner that PEFT merges, from its files to the merged checkpoint, against a merge of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftType

from converter.errors import BadAdapter, Unsupported
from converter.merge.options import TUNERS
from tests.merge.merges import different, edit_config, merged_by_peft, merged_by_us, save_tuned
from tests.models import save_base
from tests.reference import tensors_of

LINEAR = ["q_proj", "k_proj", "down_proj"]
"""With a bias and without one, square, wide and high."""

SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10, "tinit": 1, "tfinal": 1},
    "BEFT": {"target_modules": ["q_proj", "k_proj"]},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 50},
    "GLORA": {"target_modules": ["o_proj", "down_proj"]},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LOHA": {"r": 4, "alpha": 8},
    "LOKR": {"r": 4, "alpha": 8, "decompose_both": True},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 16, "r": 0},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 8},
    "ROAD": {"target_modules": ["q_proj", "up_proj"]},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "VBLORA": {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 2},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 50},
    "PiSSA": {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa"},
    "OLoRA": {"peft_type": "LORA", "r": 4, "init_lora_weights": "olora"},
    "KaSA": {"peft_type": "LORA", "r": 4, "kasa_config": peft.tuners.lora.config.KasaConfig()},
    "VeRA without its projection": {"peft_type": "VERA", "r": 8, "save_projection": False},
    "MiSS, bat": {"peft_type": "MISS", "r": 4, "init_weights": "bat"},
}
ON_CONV1D = """
    ADALORA DEFT FOURIERFT GRALORA HIRA IA3 PVERA RANDLORA VBLORA VERA WAVEFT PiSSA
"""
ON_OTHER_LAYERS = {
    "conv1d": ("gpt2", ["c_attn", "c_fc"], ON_CONV1D.split()),
    "embedding": ("llama", ["embed_tokens"], ["HIRA", "OFT"]),
}
CASES = [("linear", "qwen2", LINEAR, tuner) for tuner in SETTINGS]
CASES += [(layer, name, targets, tuner) for layer, (name, targets, some) in ON_OTHER_LAYERS.items() for tuner in some]


def config_of(tuner: str, targets: list[str]) -> peft.PeftConfig:
    settings = {"target_modules": targets, **SETTINGS[tuner]}
    if "feedforward_modules" in settings:
        settings["feedforward_modules"] = [name for name in settings["feedforward_modules"] if name in targets]
    kind = PeftType(settings.pop("peft_type", tuner))
    made: peft.PeftConfig = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings)
    return made


def test_every_tuner_is_tried() -> None:
    assert TUNERS.keys() <= {settings.get("peft_type", name) for name, settings in SETTINGS.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("layer", "name", "targets", "tuner"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_a_tuner_is_merged_to_pefts_bits(
    layer: str, name: str, targets: list[str], tuner: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name, dtype)
    save_tuned(tmp_path / "adapter", base, config_of(tuner, targets), dtype=dtype)

    ours = merged_by_us(base, tmp_path / "adapter", dtype, tmp_path / "ours")

    theirs = merged_by_peft(base, tmp_path / "adapter", dtype, tmp_path / "theirs")
    assert different(ours, theirs) == []
    assert different(ours, tensors_of(base)) != []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_option_that_peft_does_not_know_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, config_of("LOHA", ["q_proj"]))
    edit_config(tmp_path / "adapter", an_option_of_next_year=True)

    with pytest.raises(Unsupported, match="an_option_of_next_year = 'True' is not an option of LOHA in PEFT"):
        merged_by_us(base, tmp_path / "adapter", torch.bfloat16, tmp_path / "ours")

    assert not (tmp_path / "ours").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_another_rank_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_tuned(tmp_path / "adapter", base, config_of("LOHA", ["q_proj"]))
    edit_config(tmp_path / "adapter", r=5)

    with pytest.raises(BadAdapter, match=r"q_proj: PEFT can't load its tensors: .*hada_w1_a"):
        merged_by_us(base, tmp_path / "adapter", torch.bfloat16, tmp_path / "ours")

    assert not (tmp_path / "ours").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_glora_on_a_layer_with_a_bias_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    save_tuned(tmp_path / "adapter", base, _glora())

    with pytest.raises(Unsupported, match="GLORA on a layer with a bias"):
        merged_by_us(base, tmp_path / "adapter", torch.bfloat16, tmp_path / "ours")


def _glora() -> peft.PeftConfig:
    made: peft.PeftConfig = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.GLORA](target_modules=["q_proj"])
    return made

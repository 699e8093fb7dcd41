"""Every kind of defective adapter: the message that it gets, and that nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import converter
from converter.errors import ConversionRefused
from converter.merge.files import CONFIG, WEIGHTS
from converter.merge.keys import PREFIX
from tests.models import save_base

Tensors = dict[str, Tensor]
Q = [f"{PREFIX}model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
A, B = f"{Q[0]}.lora_A.weight", f"{Q[0]}.lora_B.weight"
OPTIONS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("reasons") / "base", "llama")


def sound() -> Tensors:
    halves = {"A": torch.full((4, 64), 0.01), "B": torch.full((64, 4), 0.01)}
    return {f"{module}.lora_{half}.weight": value.clone() for module in Q for half, value in halves.items()}


def put(name: str, value: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def unchanged(_: Tensors) -> None:
    """For defects of the config alone."""


SERVE = "serve base and adapter with PEFT"
DEFECTS: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "half a pair": (lambda t: t.pop(B), {}, "q_proj: has lora_A, but no lora_B: half of a pair is lost"),
    "a lost layer": (
        lambda t: [t.pop(name) for name in (A, B)],
        {},
        "layers.0.self_attn.q_proj: target_modules names it, but the adapter's file has no tensors for it",
    ),
    "two ranks": (put(A, torch.ones(2, 64)), {}, "lora_A is [2, 64] and lora_B [64, 4]: their ranks differ"),
    "another rank than the config's": (unchanged, {"r": 8}, f"rank 4 in the file, 8 in {CONFIG}"),
    "another shape": (put(B, torch.ones(32, 4)), {}, "was the adapter trained on another base?"),
    "one dimension": (put(A, torch.ones(256)), {}, "1 dimensions; LoRA on this layer has 2"),
    "empty": (put(A, torch.ones(0)), {}, "empty, as a ZeRO-3 run saves it when its parameters were not gathered"),
    "NaN": (put(A, torch.full((4, 64), torch.nan)), {}, "holds a NaN or an infinity"),
    "integers": (put(A, torch.ones(4, 64, dtype=torch.int8)), {}, "dtype I8, expected F32, F16"),
    "no tensors": (lambda t: t.clear(), {}, f"{WEIGHTS} holds no tensors"),
    "DoRA without magnitudes": (unchanged, {"use_dora": True}, "use_dora is true, but the file lacks lora_magnitude_v"),
    "magnitudes without DoRA": (
        put(f"{Q[0]}.lora_magnitude_vector", torch.ones(64)),
        {},
        "use_dora is false, but the file has lora_magnitude_vector",
    ),
    "an alpha of zero": (unchanged, {"lora_alpha": 0}, "lora_alpha is 0, so that the adapter changes nothing; set it"),
    "PiSSA by a random algorithm": (
        unchanged,
        {"init_lora_weights": "pissa_niter_4"},
        "convert the adapter to plain LoRA",
    ),
    "LoRA-GA": (unchanged, {"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
    "LoftQ": (unchanged, {"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
    "activated LoRA": (
        unchanged,
        {"alora_invocation_tokens": [3]},
        f"activated LoRA changes only what follows its tokens; {SERVE}",
    ),
    "repeated layers": (
        unchanged,
        {"layer_replication": [[0, 2], [1, 2]]},
        "make a base that has them, and give it as",
    ),
    "Arrow": (unchanged, {"arrow_config": {"top_k": 2}}, f"Arrow weighs adapters by the input; {SERVE}"),
    "QALoRA": (unchanged, {"use_qalora": True}, f"QALoRA adds to the zero points of a GPTQ base; {SERVE}"),
    "Megatron": (unchanged, {"megatron_config": {"x": 1}}, "export the adapter for transformers first"),
    "an unknown option": (
        unchanged,
        {"of_next_year": 1},
        "of_next_year = '1' is not an option that this tool understands",
    ),
    "prompt tuning": (unchanged, {"peft_type": "PROMPT_TUNING"}, f"puts trained tokens before the input; {SERVE}"),
    "prefix tuning": (unchanged, {"peft_type": "PREFIX_TUNING"}, f"puts trained tokens before the input; {SERVE}"),
    "adaption prompt": (unchanged, {"peft_type": "ADAPTION_PROMPT"}, f"it adds to what attention gives; {SERVE}"),
    "X-LoRA": (
        unchanged,
        {"peft_type": "XLORA"},
        f"weighs its parts by the input, which no single weight can; {SERVE}",
    ),
    "TinyLoRA": (unchanged, {"peft_type": "TINYLORA"}, "depend on each other's order; merge it with PEFT"),
    "FRoD": (unchanged, {"peft_type": "FROD"}, "decomposed together; merge it with PEFT"),
    "BONE": (unchanged, {"peft_type": "BONE"}, "was renamed MISS, and PEFT has no BONE any more"),
    "MLX's config": (
        unchanged,
        {"peft_type": ..., "fine_tune_type": "lora", "lora_parameters": {"rank": 8}},
        "of MLX, not of PEFT; run `mlx_lm.fuse",
    ),
    "an ancient PEFT": (unchanged, {"enable_lora": [True]}, "of a PEFT before 0.4, whose layers were others"),
    "a module that is not there": (
        lambda t: t.update({name.replace("q_proj", "q_projx"): t.pop(name) for name in (A, B)}),
        {},
        "layers.0.self_attn.q_projx: in the adapter, but the base has no such module; the nearest name there is model.",
    ),
    "a tensor without a reason": (put(f"{PREFIX}model.norm.weight", torch.ones(64)), {}, "neither modules_to_save nor"),
    "a module that was not saved": (
        unchanged,
        {"modules_to_save": ["lm_head"]},
        "but the adapter's file doesn't have it",
    ),
    "not targeted": (unchanged, {"target_modules": ["k_proj"]}, "but its target_modules don't name it"),
}


@pytest.mark.parametrize(("damage", "options", "expected"), DEFECTS.values(), ids=DEFECTS)
def test_a_defective_adapter_is_refused_with_a_reason_and_nothing_is_written(
    damage: Callable[[Tensors], object], options: dict[str, Any], expected: str, base: Path, tmp_path: Path
) -> None:
    tensors, adapter = sound(), tmp_path / "adapter"
    damage(tensors)
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS)
    settings = {key: value for key, value in {**OPTIONS, **options}.items() if value is not ...}
    (adapter / CONFIG).write_text(json.dumps(settings))

    with pytest.raises(ConversionRefused) as caught:
        converter.convert(base, adapter, tmp_path / "out")

    assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_the_adapter_without_a_defect_is_converted(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(sound(), adapter / WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps(OPTIONS))

    assert converter.convert(base, adapter, tmp_path / "out").out.is_dir()

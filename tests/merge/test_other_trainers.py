"""Adapters of other trainers.

MLX has the same factors as PEFT, turned, and a scale in the place of alpha and rank; torchtune writes PEFT's files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import Recipe, convert, convert_batch, verify
from converter.errors import AdapterMismatch, BadAdapter, ConversionRefused, Unsupported
from converter.job import Job
from converter.merge.files import CONFIG, WEIGHTS
from converter.merge.keys import PREFIX
from tests.merge.merges import save_tuned, says
from tests.merge.test_kinds import lora
from tests.models import load, save_base
from tests.reference import differences, tensors_of

OF_MLX = "adapters.safetensors"
SCALE, RANK = 1.7, 8
PARTS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}


def save_both(folder: Path, base: Path, **settings: Any) -> tuple[Path, Path]:
    """The same adapter in PEFT's form and in MLX's."""
    ours, theirs = folder / "peft", folder / "mlx"
    save_tuned(ours, base, lora(r=RANK, lora_alpha=SCALE * RANK, **settings))
    theirs.mkdir()
    tensors = {}
    for key, value in load_file(ours / WEIGHTS).items():
        module, part = next((key.removesuffix(f".{part}"), part) for part in PARTS if key.endswith(part))
        tensors[f"{module.removeprefix(PREFIX)}.{PARTS[part]}"] = value.T.contiguous() if value.ndim == 2 else value
    save_file(tensors, theirs / OF_MLX)
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.1, "keys": ["self_attn.q_proj"]}
    kind = "dora" if settings.get("use_dora") else "lora"
    config = {
        "fine_tune_type": kind,
        "num_layers": 2,
        "lora_parameters": parameters,
        "model": "some/model",
        "iters": 10,
    }
    (theirs / CONFIG).write_text(json.dumps(config))
    return ours, theirs


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", "llama", torch.float32)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("quant_type", ["none", "nf4"])
def test_an_adapter_of_mlx_gives_the_bytes_of_the_same_adapter_of_peft(
    quant_type: str, use_dora: bool, base: Path, tmp_path: Path
) -> None:
    ours, theirs = save_both(tmp_path, base, use_dora=use_dora)
    recipe = Recipe(quant_type=quant_type)

    convert(base, ours, tmp_path / "expected", recipe)
    report = convert(base, theirs, tmp_path / "out", recipe)

    assert differences(tmp_path / "out", tmp_path / "expected") == []
    assert differences(tmp_path / "out", base) != []
    assert "an adapter of MLX, whose factors and scale are taken in PEFT's form" in report.plan.notes
    assert "the adapter says that it was trained on some/model: this base has another name" in report.plan.notes


def test_pefts_form_says_what_mlx_computes(base: Path, tmp_path: Path) -> None:
    ours, theirs = save_both(tmp_path, base)
    factors = load_file(theirs / OF_MLX)
    model = load(base)

    def added(name: str) -> Callable[..., Tensor]:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        return lambda _, inputs, output: output + SCALE * ((inputs[0] @ a) @ b)

    for name in {key.rpartition(".")[0] for key in factors}:
        model.get_submodule(name).register_forward_hook(added(name))

    from peft import PeftModel

    said = says(model)
    torch.testing.assert_close(said, says(PeftModel.from_pretrained(load(base), ours).eval()), rtol=1e-4, atol=1e-5)
    assert (said - says(load(base))).abs().max() > 0.01


def test_an_output_of_mlxs_adapter_is_verified_and_made_in_a_batch(base: Path, tmp_path: Path) -> None:
    _, theirs = save_both(tmp_path, base)
    (theirs / "0000100_adapters.safetensors").write_bytes(b"of step 100")

    convert(base, theirs, tmp_path / "out")
    [made] = convert_batch([Job(tmp_path / "batch", theirs, base)])

    assert verify(tmp_path / "out", base, theirs).is_good
    assert made.message == ""
    assert differences(tmp_path / "batch", tmp_path / "out") == []


def parameters(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config["lora_parameters"] |= changes

    return change


def put(name: str, value: Tensor) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda _, tensors: tensors.update({name: value})


Q = "model.layers.0.self_attn.q_proj"
FUSE = "run `mlx_lm.fuse --model BASE"
DEFECTS: dict[str, tuple[Callable[..., object], type[ConversionRefused], str]] = {
    "all weights": (lambda c, _: c.update(fine_tune_type="full"), Unsupported, f"'full' of MLX is no adapter; {FUSE}"),
    "no parameters": (lambda c, _: c.pop("lora_parameters"), BadAdapter, "no lora_parameters, which say the rank and"),
    "an alpha": (parameters(alpha=16.0), Unsupported, f"lora_parameters has 'alpha', whose meaning changed; {FUSE}"),
    "no scale": (parameters(scale=None), BadAdapter, "lora_parameters: scale 'None', expected a number"),
    "no rank": (parameters(rank=0), BadAdapter, "lora_parameters: rank '0', expected a positive integer"),
    "another rank": (parameters(rank=4), BadAdapter, "_proj: rank 8 in the file, 4 in adapter_config.json"),
    "experts": (
        put("model.layers.0.mlp.switch_mlp.up_proj.lora_a", torch.ones(4, 8, 64)),
        Unsupported,
        f"has 3 dimensions, as MLX's LoRA on experts has, and not 2; {FUSE}",
    ),
    "a trained norm": (
        put("model.norm.weight", torch.ones(64)),
        Unsupported,
        "'model.norm.weight' is no part of MLX's",
    ),
    "half a pair": (lambda _, t: t.pop(f"{Q}.lora_a"), BadAdapter, f"{Q}: has lora_B, but no lora_A: half of a pair"),
    "lengths without DoRA": (
        put(f"{Q}.m", torch.ones(64)),
        BadAdapter,
        "use_dora is false, but the file has lora_magn",
    ),
    "integers": (put(f"{Q}.lora_a", torch.ones(64, 8, dtype=torch.int32)), BadAdapter, "dtype I32, expected F32, F16"),
    "NaN": (put(f"{Q}.lora_a", torch.full((64, 8), float("nan"))), BadAdapter, "holds a NaN or an infinity"),
    "an embedding": (
        lambda _, t: t.update(
            {f"model.embed_tokens.lora_{h}": torch.ones(s) for h, s in (("a", (256, 8)), ("b", (8, 64)))}
        ),
        Unsupported,
        "model.embed_tokens: LoRA on a module of kind 'embedding'",
    ),
    "names of MLX's own": (
        lambda _, t: t.update(
            {k.replace("self_attn.q_proj", "attention.wq"): t.pop(k) for k in list(t) if "q_proj" in k}
        ),
        AdapterMismatch,
        "layers.0.attention.wq: in the adapter, but the base has no such module",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_has_no_exact_form_in_peft_is_refused(defect: str, base: Path, tmp_path: Path) -> None:
    change, error, message = DEFECTS[defect]
    _, theirs = save_both(tmp_path, base)
    config, tensors = json.loads((theirs / CONFIG).read_text()), load_file(theirs / OF_MLX)
    change(config, tensors)
    (theirs / CONFIG).write_text(json.dumps(config))
    save_file(tensors, theirs / OF_MLX)

    with pytest.raises(error) as caught:
        convert(base, theirs, tmp_path / "out")

    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_beside_pefts_weights_mlxs_are_not_left_out_in_silence(base: Path, tmp_path: Path) -> None:
    ours, theirs = save_both(tmp_path, base)
    (ours / OF_MLX).write_bytes((theirs / OF_MLX).read_bytes())

    with pytest.raises(
        Unsupported, match=r"adapters\.safetensors lies beside the adapter, and what was trained with it"
    ):
        convert(base, ours, tmp_path / "out")


def test_a_damaged_file_of_mlx_is_refused(base: Path, tmp_path: Path) -> None:
    _, theirs = save_both(tmp_path, base)
    (theirs / OF_MLX).write_bytes(b"no header")

    with pytest.raises(BadAdapter, match=r"adapters\.safetensors"):
        convert(base, theirs, tmp_path / "out")


def test_the_dtypes_of_the_file_are_kept(base: Path, tmp_path: Path) -> None:
    ours, theirs = save_both(tmp_path, base)
    for file in (ours / WEIGHTS, theirs / OF_MLX):
        save_file({name: value.half() for name, value in load_file(file).items()}, file)

    convert(base, ours, tmp_path / "expected")
    convert(base, theirs, tmp_path / "out")

    assert differences(tmp_path / "out", tmp_path / "expected") == []
    assert len(tensors_of(tmp_path / "out")) == len(tensors_of(tmp_path / "expected"))


def test_what_torchtune_saves_in_pefts_form_is_merged_like_pefts(base: Path, tmp_path: Path) -> None:
    ours, _ = save_both(tmp_path, base)
    theirs = tmp_path / "torchtune"
    theirs.mkdir()
    (theirs / WEIGHTS).write_bytes((ours / WEIGHTS).read_bytes())
    (theirs / "adapter_model.pt").write_bytes(b"the same in its own names")
    config = {"r": RANK, "lora_alpha": SCALE * RANK, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    (theirs / CONFIG).write_text(json.dumps({**config, "peft_type": "LORA", "base_model_name_or_path": ""}))

    convert(base, ours, tmp_path / "expected")
    convert(base, theirs, tmp_path / "out")

    assert differences(tmp_path / "out", tmp_path / "expected") == []

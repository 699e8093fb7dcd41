"""Adapters in torchtune's own file: other names, and for most models other rows of q_proj and k_proj.

The files are made here as torchtune has them, by the inverse of how it saves them in PEFT's form.
https://github.com/pytorch/torchtune (torchtune/models/convert_weights.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import BatchOptions, convert, convert_batch, verify
from converter.errors import BadAdapter, ConversionRefused, Unsupported
from converter.job import Job
from converter.merge.files import CONFIG, PICKLED, WEIGHTS
from converter.merge.keys import PREFIX
from converter.merge.torchtune import NOTE
from converter.plan.adapters import open_adapter
from tests.merge.merges import save_tuned
from tests.merge.test_kinds import lora
from tests.models import ARCHITECTURES, save_base
from tests.reference import differences

NAMES = {
    "self_attn.o_proj": "attn.output_proj", "self_attn": "attn", "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3", "lm_head": "output", "lora_A": "lora_a", "lora_B": "lora_b",
    "lora_magnitude_vector": "magnitude", f"{PREFIX}model.": "", PREFIX: "",
}  # fmt: skip
HEADS = {"q_proj": 4, "k_proj": 2}
"""Those of the tiny models."""
EPOCH = "adapter_0.pt"


def torchtunes_name(key: str) -> str:
    for ours, theirs in NAMES.items():
        key = key.replace(ours, theirs)
    return key


def in_pairs(values: Tensor, heads: int) -> Tensor:
    """Rows of first and second halves of each head, as torchtune has them: in pairs."""
    return values.view(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape).contiguous()


def save_both(folder: Path, name: str = "llama", *, in_turn: bool = True, **settings: Any) -> tuple[Path, Path, Path]:
    """A base, and the same adapter in PEFT's form and in torchtune's. `in_turn`: q_proj and k_proj have other rows."""
    base = save_base(folder / "base", name, torch.float32, tie_word_embeddings=False)
    ours, theirs = folder / "peft", folder / "torchtune"
    save_tuned(ours, base, lora(**{"target_modules": [*ARCHITECTURES[name][3], "lm_head"], **settings}))
    tensors = {}
    for key, value in load_file(ours / WEIGHTS).items():
        if ".base_layer." in key:  # PEFT saves the head beside its factors, torchtune doesn't
            continue
        heads = next((HEADS[one] for one in HEADS if f".{one}." in key), None)
        is_turned = in_turn and heads is not None and "lora_A" not in key
        tensors[torchtunes_name(key)] = in_pairs(value, heads) if is_turned and heads else value
    theirs.mkdir()
    torch.save(tensors, theirs / EPOCH)
    saved = {"r": 8, "lora_alpha": 12, "target_modules": [*ARCHITECTURES[name][3], "lm_head"], "peft_type": "LORA"}
    (theirs / CONFIG).write_text(json.dumps(saved))
    shutil.copy(base / "config.json", theirs)
    return base, ours, theirs


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(
    ("name", "in_turn"), [("llama", True), ("mistral", True), ("gemma2", True), ("qwen2", False), ("qwen3", False)]
)
def test_an_adapter_of_torchtune_gives_the_bytes_of_the_same_adapter_of_peft(
    name: str, in_turn: bool, use_dora: bool, tmp_path: Path
) -> None:
    base, ours, theirs = save_both(tmp_path, name, in_turn=in_turn, use_dora=use_dora)

    convert(base, ours, tmp_path / "expected")
    report = convert(base, theirs, tmp_path / "out", allow_pickle=True)

    assert differences(tmp_path / "out", tmp_path / "expected") == []
    assert differences(tmp_path / "out", base) != []
    assert NOTE in report.plan.notes


def test_rows_are_turned_so_that_both_ways_to_rotate_give_the_same_scores(tmp_path: Path) -> None:
    """torchtune rotates neighbours, transformers values that lie half a head apart: queries · keys must be equal."""
    _, _, theirs = save_both(tmp_path)
    in_pairs_of = torch.load(theirs / EPOCH, weights_only=True)
    adapter = open_adapter(theirs, allow_pickle=True).adapter
    angles = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
    scores = []
    for position in (0, 3):
        cosine, sine = (angles * position).cos(), (angles * position).sin()
        key = "model.layers.1.self_attn.q_proj"
        header = adapter.modules[key]["lora_B"]
        raw = b"".join(piece.tobytes() for piece in header.pieces(adapter.folder))
        halves = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(4, 16, 8).double()
        pairs = in_pairs_of["layers.1.attn.q_proj.lora_b.weight"].view(4, 8, 2, 8).double()
        by_halves = rotated(halves[:, :8], halves[:, 8:], cosine, sine)
        by_pairs = rotated(pairs[:, :, 0], pairs[:, :, 1], cosine, sine)
        scores.append((by_halves, by_pairs))
    (first, first_pairs), (third, third_pairs) = scores
    expected = torch.einsum("hdr,hds->hrs", first_pairs, third_pairs)
    torch.testing.assert_close(torch.einsum("hdr,hds->hrs", first, third), expected)
    assert not torch.allclose(torch.einsum("hdr,hds->hrs", first, first), expected)


def rotated(one: Tensor, other: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=1)


def test_an_output_of_torchtunes_adapter_is_verified_and_made_in_a_batch(tmp_path: Path) -> None:
    base, _, theirs = save_both(tmp_path)

    convert(base, theirs, tmp_path / "out", allow_pickle=True)
    [made] = convert_batch([Job(tmp_path / "batch", theirs, base)], BatchOptions(allow_pickle=True))

    assert verify(tmp_path / "out", base, theirs, allow_pickle=True).is_good
    assert made.message == ""
    assert differences(tmp_path / "batch", tmp_path / "out") == []


@pytest.mark.parametrize("pickled", [False, True])
def test_where_pefts_form_lies_beside_torchtunes_it_is_taken(pickled: bool, tmp_path: Path) -> None:
    base, ours, theirs = save_both(tmp_path)
    weights = load_file(ours / WEIGHTS)
    if pickled:
        torch.save(weights, theirs / PICKLED)
    else:
        save_file(weights, theirs / WEIGHTS)
    (theirs / EPOCH).write_bytes(b"of the first epoch")
    (theirs / "hf_model_0001_0.pt").write_bytes(b"merged by torchtune")

    convert(base, ours, tmp_path / "expected")
    report = convert(base, theirs, tmp_path / "out", allow_pickle=pickled)

    assert differences(tmp_path / "out", tmp_path / "expected") == []
    assert any("hf_model_0001_0.pt, of a whole model, lies beside the adapter" in note for note in report.plan.notes)


def test_without_leave_torchtunes_file_is_refused(tmp_path: Path) -> None:
    base, _, theirs = save_both(tmp_path)

    with pytest.raises(BadAdapter, match="an adapter in torchtune's own format; give `allow_pickle` to read it, where"):
        convert(base, theirs, tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pickled", [False, True])
def test_what_torchtune_turns_though_it_must_not_is_refused(pickled: bool, tmp_path: Path) -> None:
    base, ours, theirs = save_both(tmp_path, "qwen2", in_turn=False)
    if pickled:
        torch.save(load_file(ours / WEIGHTS), theirs / PICKLED)
    else:
        shutil.copy(ours / WEIGHTS, theirs)

    with pytest.raises(Unsupported, match=rf"a model of qwen2 has none to turn; move .* to read {EPOCH}"):
        convert(base, theirs, tmp_path / "out", allow_pickle=pickled)

    assert not (tmp_path / "out").exists()


Change = Callable[[Path, dict[str, Any], dict[str, Any], dict[str, Tensor]], object]
Q = "layers.0.attn.q_proj"
DEFECTS: dict[str, tuple[Change, type[ConversionRefused], str]] = {
    "two epochs": (
        lambda folder, *_: shutil.copy(folder / EPOCH, folder / "adapter_1.pt"),
        BadAdapter,
        "2 adapters of torchtune, one for each epoch: adapter_0.pt, adapter_1.pt; leave one of them in the folder",
    ),
    "no config of the base": (
        lambda _, base, *__: base.clear(),
        BadAdapter,
        "put the base's config.json beside it, as torchtune does",
    ),
    "no alpha": (lambda _, __, config, ___: config.pop("lora_alpha"), BadAdapter, "lora_alpha 'None'"),
    "no config": (
        lambda _, __, config, ___: config.clear(),
        BadAdapter,
        "where adapter_config.json (r, lora_alpha: lora_rank and lora_alpha of the recipe) and config.json of the base",
    ),
    "another rank": (
        lambda _, __, config, ___: config.update(r=4),
        BadAdapter,
        "rank 8 in the file, 4 in adapter_config.json",
    ),
    "fused projections": (
        lambda _, base, *__: base.update(model_type="phi3"),
        Unsupported,
        "model_type 'phi3': torchtune's adapter of such a model has no exact form in PEFT; give the merged model",
    ),
    "another base": (
        lambda _, base, *__: base.update(num_attention_heads=8, head_dim=16),
        BadAdapter,
        f"'{Q}.lora_b.weight' has 64 rows, but config.json says 8 heads of 16",
    ),
    "odd heads": (
        lambda _, base, *__: base.update(num_attention_heads=64, num_key_value_heads=32, head_dim=1),
        BadAdapter,
        "config.json says 32 heads of 1",
    ),
    "heads that are no number": (
        lambda _, base, *__: base.update(num_attention_heads="4"),
        BadAdapter,
        "num_attention_heads '4', expected a positive integer",
    ),
    "a trained norm": (
        lambda _, __, ___, tensors: tensors.update({"norm.scale": torch.ones(64)}),
        Unsupported,
        "'norm.scale' is no part of LoRA on a linear layer of torchtune; give the merged model",
    ),
    "vision": (
        lambda _, __, ___, tensors: tensors.update({f"decoder.{Q}.lora_a.weight": tensors.pop(f"{Q}.lora_a.weight")}),
        Unsupported,
        f"'decoder.{Q}.lora_a.weight' is no part of LoRA",
    ),
    "experts": (
        lambda _, __, ___, tensors: tensors.update({"layers.0.mlp.w1.lora_a.weight": torch.ones(2, 3, 4)}),
        BadAdapter,
        "'layers.0.mlp.w1.lora_a.weight' has 3 dimensions",
    ),
    "half a pair": (
        lambda _, __, ___, tensors: tensors.pop(f"{Q}.lora_a.weight"),
        BadAdapter,
        "q_proj: has lora_B, but no lora_A: half of a pair",
    ),
    "an option of another trainer": (
        lambda _, __, config, ___: config.update(an_option_of_next_year=True),
        Unsupported,
        "an_option_of_next_year = 'True' is not an option",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_has_no_exact_form_in_peft_is_refused(defect: str, tmp_path: Path) -> None:
    change, error, message = DEFECTS[defect]
    base, _, theirs = save_both(tmp_path)
    files = theirs / "config.json", theirs / CONFIG
    configs = [json.loads(file.read_text()) for file in files]
    tensors = torch.load(theirs / EPOCH, weights_only=True)
    change(theirs, *configs, tensors)
    torch.save(tensors, theirs / EPOCH)
    for file, config in zip(files, configs, strict=True):
        file.write_text(json.dumps(config)) if config else file.unlink()

    with pytest.raises(error) as caught:
        convert(base, theirs, tmp_path / "out", allow_pickle=True)

    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_torchtune_is_refused(tmp_path: Path) -> None:
    base, _, theirs = save_both(tmp_path)
    (theirs / EPOCH).write_bytes(b"no pickle")

    with pytest.raises(BadAdapter, match=rf"{EPOCH}: is damaged, or no pickle of torch"):
        convert(base, theirs, tmp_path / "out", allow_pickle=True)

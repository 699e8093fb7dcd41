"""A base of pickled weights is read where the user says so: in place, tensor by tensor, and nothing of it is run."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from converter import BatchOptions, Job, Recipe, convert, convert_batch, plan_conversion, verify
from converter.errors import BadCheckpoint
from tests.models import save_adapter, save_base
from tests.reference import differences, tensors_of

PICKLED = "pytorch_model.bin"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save_base(tmp_path / "plain", "llama")


def pickled(plain: Path, folder: Path, tensors: object = None, shards: int = 1) -> Path:
    """The same base with pickled weights."""
    folder.mkdir()
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    if tensors is not None or shards == 1:
        torch.save(tensors if tensors is not None else tensors_of(plain), folder / PICKLED)
        return folder
    weight_map = {}
    for number in range(shards):
        some = dict(list(tensors_of(plain).items())[number::shards])
        weight_map |= dict.fromkeys(some, f"pytorch_model-{number}.bin")
        torch.save(some, folder / f"pytorch_model-{number}.bin")
    (folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_base_is_converted_to_what_the_same_base_in_safetensors_becomes(
    shards: int, plain: Path, tmp_path: Path
) -> None:
    base = pickled(plain, tmp_path / "base", shards=shards)
    adapter = save_adapter(tmp_path / "adapter", plain, "llama")

    out = convert(base, adapter, tmp_path / "out", allow_pickle=True).out

    assert differences(out, convert(plain, adapter, tmp_path / "expected").out) == []
    assert not list(out.glob("*.bin*"))
    assert verify(out, base, adapter, allow_pickle=True).problems == []
    [outcome] = convert_batch([Job(tmp_path / "again", adapter, base)], BatchOptions(allow_pickle=True))
    assert outcome.status == "made", outcome
    assert differences(tmp_path / "again", out) == []


def test_weights_that_are_parts_of_one_tensor_and_weights_that_are_one_are_read(plain: Path, tmp_path: Path) -> None:
    tensors = tensors_of(plain)
    one, other = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    tensors[one], tensors[other] = torch.cat([tensors[one], tensors[other]]).chunk(2)
    tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"]
    base = pickled(plain, tmp_path / "base", tensors)

    out = convert(base, None, tmp_path / "out", Recipe(quant_type="none"), allow_pickle=True).out

    written = tensors_of(out)
    assert [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)] == []


def test_without_the_users_word_no_pickle_is_opened(plain: Path, tmp_path: Path) -> None:
    base = pickled(plain, tmp_path / "base")

    with pytest.raises(BadCheckpoint, match=r"only pickled weights \(\.bin\); give `allow_pickle` to read them"):
        plan_conversion(base, None)


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def damaged(kind: str, plain: Path, folder: Path) -> Path:
    """A base whose pickle is damaged in some way."""
    weights = tensors_of(plain)
    name = "model.layers.0.self_attn.q_proj.weight"
    if kind == "a view":
        return pickled(plain, folder, weights | {name: weights[name].T})
    if kind == "code":
        return pickled(plain, folder, weights | {"x": Touches(folder / "touched")})
    if kind == "no names":
        return pickled(plain, folder, list(weights.values()))
    base = pickled(plain, folder)
    file = base / PICKLED
    raw = file.read_bytes()
    if kind == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif kind == "old":
        torch.save(weights, file, _use_new_zipfile_serialization=False)
    elif kind == "plain pickle":
        file.write_bytes(pickle.dumps({"x": 1}))
    else:
        with zipfile.ZipFile(file) as before:
            parts = {part: before.read(part) for part in before.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after:
            for part, value in parts.items():
                after.writestr(part, value)
    return base


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a view", r"q_proj\.weight' is a view of another tensor; load the model with transformers"),
        ("code", r"pytorch_model\.bin: names \S+, which is no weight"),
        ("no names", "holds list, expected tensors by name"),
        ("cut", r"pytorch_model\.bin: is damaged, or of a version of torch before 1\.6; load the model with"),
        ("old", r"pytorch_model\.bin: is damaged, or of a version of torch before 1\.6"),
        ("plain pickle", r"pytorch_model\.bin: is damaged, or of a version of torch before 1\.6"),
        ("compressed", r"pytorch_model\.bin: is damaged, or of a version of torch before 1\.6"),
    ],
)
def test_other_pickles_are_refused_and_nothing_is_run(kind: str, message: str, plain: Path, tmp_path: Path) -> None:
    base = damaged(kind, plain, tmp_path / "base")

    with pytest.raises(BadCheckpoint, match=message):
        convert(base, None, tmp_path / "out", allow_pickle=True)

    assert not (tmp_path / "out").exists()
    assert not (base / "touched").exists()

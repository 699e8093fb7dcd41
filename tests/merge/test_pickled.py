"""Adapters with pickled weights: read only where the user says so, and as weights only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import BatchOptions, Recipe, convert, convert_batch, verify
from converter.errors import BadAdapter, ConversionRefused, Undecided, Unsupported
from converter.job import Job
from converter.merge.files import CONFIG, PICKLED, TRAINED_BESIDE, WEIGHTS
from converter.merge.keys import PREFIX
from tests.folders import contents
from tests.models import save_adapter, save_base
from tests.reference import differences, tensors_of

MERGED = Recipe(quant_type="none")
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(folder / "adapter", base, "llama")


def pickled(adapter: Path, folder: Path, *, in_a_zip: bool = True) -> Path:
    """The same adapter with pickled weights."""
    folder.mkdir()
    (folder / CONFIG).write_bytes((adapter / CONFIG).read_bytes())
    torch.save(load_file(adapter / WEIGHTS), folder / PICKLED, _use_new_zipfile_serialization=in_a_zip)
    return folder


@pytest.mark.parametrize("in_a_zip", [True, False], ids=["of today", "of torch before 1.6"])
def test_pickled_weights_give_the_contents_the_same_weights_in_safetensors(
    base: Path, adapter: Path, in_a_zip: bool, tmp_path: Path
) -> None:
    convert(base, adapter, tmp_path / "expected")

    convert(base, pickled(adapter, tmp_path / "adapter", in_a_zip=in_a_zip), tmp_path / "out", allow_pickle=True)

    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_without_leave_pickled_weights_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BadAdapter, match=r"only pickled weights \(adapter_model\.bin\); give `allow_pickle` to read"):
        convert(base, pickled(adapter, tmp_path / "adapter"), tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_an_output_of_pickled_weights_is_verified_with_leave_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = pickled(adapter, tmp_path / "adapter")
    convert(base, folder, tmp_path / "out", allow_pickle=True)

    found = verify(tmp_path / "out", base, folder, allow_pickle=True)

    assert found.is_good
    assert found.recomputed == len(tensors_of(base))
    with pytest.raises(Undecided, match=r"not compared.*only pickled weights"):
        verify(tmp_path / "out", base, folder)


def test_a_batch_takes_pickled_weights_with_leave(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = pickled(adapter, tmp_path / "adapter")
    convert(base, adapter, tmp_path / "expected")

    [refused] = convert_batch([Job(tmp_path / "refused", folder, base)])
    [made] = convert_batch([Job(tmp_path / "out", folder, base)], BatchOptions(allow_pickle=True))

    assert (refused.status, made.status) == ("refused", "made")
    assert "only pickled weights" in refused.message
    assert differences(tmp_path / "out", tmp_path / "expected") == []


class Malicious:
    """Touches a file where it is unpickled by Python."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_no_code_of_a_pickle_is_run(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder, trap = pickled(adapter, tmp_path / "adapter"), tmp_path / "trap"
    torch.save({"a": Malicious(trap)}, folder / PICKLED)

    with pytest.raises(BadAdapter, match=r"adapter_model\.bin: names \w+\.mkdir, which is no weight"):
        convert(base, folder, tmp_path / "out", allow_pickle=True)

    assert not trap.exists()
    assert not (tmp_path / "out").exists()


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([torch.ones(2)], "holds list, expected tensors by name"),
    "nothing": ({}, "holds dict, expected tensors by name"),
    "a number": ({"step": 3}, "'step' is int, expected a tensor"),
    "a number as a name": ({3: torch.ones(2)}, "'3' is Tensor, expected a tensor"),
    "one value many times": ({"a": torch.ones(1).expand(1 << 40)}, "'a' does not hold all its values"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, r"'a' has the dtype torch\.complex64"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, "'a' does not hold all its values"),
}


@pytest.mark.parametrize(("held", "expected"), WRONG.values(), ids=WRONG)
def test_a_pickle_of_anything_but_named_tensors_is_refused(
    base: Path, adapter: Path, held: Any, expected: str, tmp_path: Path
) -> None:
    folder = pickled(adapter, tmp_path / "adapter")
    torch.save(held, folder / PICKLED)

    with pytest.raises(BadAdapter, match=expected):
        convert(base, folder, tmp_path / "out", allow_pickle=True)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:0], lambda raw: b"\0" * len(raw)]
)
def test_a_damaged_pickle_is_refused(base: Path, adapter: Path, damage: Any, tmp_path: Path) -> None:
    folder = pickled(adapter, tmp_path / "adapter")
    (folder / PICKLED).write_bytes(damage((folder / PICKLED).read_bytes()))

    with pytest.raises(BadAdapter, match=r"adapter_model\.bin: is damaged, or no pickle of torch"):
        convert(base, folder, tmp_path / "out", allow_pickle=True)


# Whole tensors that LLaVA saves beside an adapter


def beside(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, folder / TRAINED_BESIDE)
    return folder


def copy_of(adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((adapter / name).read_bytes())
    return folder


@pytest.mark.parametrize("in_safetensors", [True, False])
def test_whole_tensors_beside_an_adapter_are_those_of_modules_to_save(
    base: Path, adapter: Path, in_safetensors: bool, tmp_path: Path
) -> None:
    trained = torch.full((64,), 1.25)
    whole = copy_of(adapter, tmp_path / "whole")
    config = json.loads((whole / CONFIG).read_text())
    (whole / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["model.norm"]}))
    save_file(load_file(whole / WEIGHTS) | {PREFIX + NORM: trained}, whole / WEIGHTS)
    convert(base, whole, tmp_path / "expected", MERGED)
    folder = (copy_of if in_safetensors else pickled)(adapter, tmp_path / "adapter")

    convert(base, beside(folder, {PREFIX + NORM: trained}), tmp_path / "out", MERGED, allow_pickle=True)

    assert tensors_of(tmp_path / "out")[NORM].float().equal(trained)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_whole_tensors_beside_an_adapter_are_refused_without_leave(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = beside(copy_of(adapter, tmp_path / "adapter"), {PREFIX + NORM: torch.ones(64)})

    with pytest.raises(Unsupported, match="give `allow_pickle` to take them"):
        convert(base, folder, tmp_path / "out")


def test_whole_tensors_beside_an_adapter_must_have_a_place(base: Path, adapter: Path, tmp_path: Path) -> None:
    projector = f"{PREFIX}model.mm_projector.0.weight"
    folder = beside(copy_of(adapter, tmp_path / "adapter"), {projector: torch.ones(64, 64)})

    with pytest.raises(ConversionRefused, match=r"model\.mm_projector\.0\.weight: in the adapter, but the base has no"):
        convert(base, folder, tmp_path / "out", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NORM, r"'model\.norm\.weight' does not begin with base_model\.model\., as PEFT names"),
        (f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight", "is in the adapter's file, too"),
    ],
)
def test_whole_tensors_of_other_names_are_refused(
    base: Path, adapter: Path, name: str, expected: str, tmp_path: Path
) -> None:
    folder = beside(copy_of(adapter, tmp_path / "adapter"), {name: torch.ones(64)})

    with pytest.raises(BadAdapter, match=expected):
        convert(base, folder, tmp_path / "out", allow_pickle=True)

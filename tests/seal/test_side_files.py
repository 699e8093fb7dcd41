"""Files and folders beside the weights that travel, and what is said of those that don't."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from converter import convert, plan_conversion, verify
from tests.folders import contents, copy


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


def test_what_is_not_copied_is_said(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    for name in (
        "model.safetensors.bak",
        "notes.txt",
        "pytorch_model.bin",
        "modeling_own.py",
        ".gitattributes",
        "README.md",
    ):
        (base / name).write_text("{}")

    assert (
        "not copied from the base's folder: model.safetensors.bak, notes.txt" in plan_conversion(base, None).plan.notes
    )
    assert not any("not copied" in note for note in plan_conversion(inputs[0], None).plan.notes)


def with_pooling(base: Path, target: Path) -> Path:
    """A base as sentence-transformers saves it."""
    target = copy(base, target)
    modules = [{"idx": 0, "path": "", "type": "…Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "…Pooling"}]
    (target / "modules.json").write_text(json.dumps(modules))
    (target / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    for folder in ("1_Pooling", "onnx"):
        (target / folder).mkdir()
        (target / folder / "config.json").write_text('{"pooling_mode_lasttoken": true}')
        (target / folder / "code.py").write_text("")
    return target


def test_the_folders_that_modules_json_names_are_copied_and_are_part_of_what_is_checked(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    base = with_pooling(inputs[0], tmp_path / "base")

    convert(base, inputs[1], out)

    assert {path.name for path in out.iterdir() if path.is_dir()} == {"1_Pooling"}
    assert contents(out / "1_Pooling") == {"config.json": b'{"pooling_mode_lasttoken": true}'}
    assert (out / "sentence_bert_config.json").exists()
    assert verify(out, base, inputs[1]).problems == []
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=False).returncode == 0
    assert convert(base, inputs[1], out).nothing_to_do
    (base / "1_Pooling" / "config.json").write_text("{}")
    assert not convert(base, inputs[1], out, overwrite=True).nothing_to_do
    assert contents(out / "1_Pooling") == {"config.json": b"{}"}
    (out / "1_Pooling" / "config.json").write_text("[]")
    assert any(problem.startswith("1_Pooling/config.json: ") for problem in verify(out).problems)


@pytest.mark.parametrize("path", ["..", "../elsewhere", "/etc", "1_Pooling/..", "linked", "1_Pooling/inner", 7, None])
def test_a_folder_that_modules_json_names_outside_the_base_is_not_copied(
    path: object, inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    base = with_pooling(inputs[0], tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.json").write_text("{}")
    (base / "linked").symlink_to(tmp_path / "elsewhere")
    (base / "modules.json").write_text(json.dumps([{"path": path}]))

    convert(base, inputs[1], out)

    assert [found for found in out.iterdir() if found.is_dir()] == []


def test_an_out_that_cannot_be_renamed_takes_folders_too(inputs: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    base = with_pooling(inputs[0], tmp_path / "base")
    (out / ".partial").mkdir(parents=True)  # as an earlier run leaves it that found that out

    convert(base, inputs[1], out)
    convert(base, None, out, overwrite=True)

    assert contents(out / "1_Pooling") == {"config.json": b'{"pooling_mode_lasttoken": true}'}
    assert verify(out, base).problems == []

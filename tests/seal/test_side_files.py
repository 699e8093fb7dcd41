"""Files and folders beside the weights that travel, and what is said of those that don't."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from converter import convert, plan_conversion, verify
from converter.errors import BadCheckpoint
from converter.read.side_files import MAX_OTHER_BYTES, MAX_SIDE_FILE_BYTES, MAX_SIDE_FILES
from tests.folders import contents, copy


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


OWN = {"config.json", "model.safetensors", "conversion.json", "SHA256SUMS", "README.md", "generation_config.json"}
"""What every output has here; the last of them is the base's."""
TRAVEL = {
    *("spm.model", "source.spm", "target.spm", "sentencepiece.bpe.model", "tiktoken.model", "bpe.codes", "dict.txt"),
    *("entity_vocab.json", "normalizer.json", "mel_filters.npz", "my_own_tokens.dat", "tokenizer.bin", "notes.txt"),
    *("labels.csv", "picture.png", "results.json", "LICENSE", "configuration.json"),
    *("additional_chat_templates/tool_use.jinja", "speakers/en/one.npy", "assets/logo.svg", "a/b/c/deep.json"),
}
"""Names that no list of the tool's has, and some that one has."""
LEFT = {
    *("pytorch_model.bin", "model.fp16.safetensors", "model.safetensors.index.fp16.json", "model.safetensors.bak"),
    *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "model.Q4_K_M.gguf", "weights.npz"),
    *("params.json", "hf_quant_config.json", "quantize_config.json", "training_args.bin", "optimizer.pt", "all.zip"),
    *("modeling_own.py", "state.pkl"),
}
LEFT_FOLDERS = {
    *("onnx/config.json", "original/params.json", "checkpoint-5/model.safetensors", "checkpoint-5/trainer_state.json"),
    *("my-lora/adapter_config.json", "my-lora/adapter_model.safetensors", "a/b/c/d/too_deep.json"),
}


def filled(base: Path, target: Path, *names: str) -> Path:
    target = copy(base, target)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("{}")
    return target


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def what_is_left(base: Path) -> set[str]:
    """What the plan says of it."""
    start = "not copied from the base's folder: "
    notes = [note.removeprefix(start) for note in plan_conversion(base, None).plan.notes if note.startswith(start)]
    return set(notes[0].split(", ")) if notes else set()


def test_everything_in_the_bases_folder_that_is_no_weights_travels(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    base = filled(inputs[0], tmp_path / "base", *TRAVEL, *LEFT, *LEFT_FOLDERS, ".gitattributes", ".cache/x.json")

    convert(base, inputs[1], out)

    assert files_in(out) - OWN == TRAVEL
    assert json.loads((out / "conversion.json").read_text())["files"].keys() >= TRAVEL
    assert verify(out, base, inputs[1]).problems == []
    assert convert(base, inputs[1], out).nothing_to_do


@pytest.mark.parametrize("name", sorted(LEFT))
def test_a_file_that_does_not_travel_is_named(name: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert what_is_left(filled(inputs[0], tmp_path / "base", name)) == {name}


def test_folders_of_which_nothing_travels_are_named_as_folders(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = filled(inputs[0], tmp_path / "base", *LEFT_FOLDERS - {"a/b/c/d/too_deep.json"})

    assert what_is_left(base) == {"onnx/", "original/", "checkpoint-5/", "my-lora/"}


def test_of_what_an_output_has_of_its_own_nothing_is_said(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    names = ("README.md", ".gitattributes", ".cache/x.json", "__pycache__/x.pyc")

    assert what_is_left(filled(inputs[0], tmp_path / "base", *names)) == set()


def test_a_link_that_is_not_followed_is_named(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    (tmp_path / "elsewhere").write_text("{}")
    (base / "vocab.json").symlink_to(tmp_path / "elsewhere")

    assert what_is_left(base) == {"vocab.json"}


def test_what_is_too_large_is_left_and_named_and_the_rest_travels(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = filled(inputs[0], tmp_path / "base", "vocab.json", "small.dat")
    for name in ("film.mp4", "other.mp4"):
        with (base / name).open("wb") as file:
            file.truncate(MAX_OTHER_BYTES - 1_000)

    plan = plan_conversion(base, None).plan

    assert {side.name for side in plan.side_files} - OWN == {"vocab.json", "small.dat", "film.mp4"}
    assert what_is_left(base) == {"other.mp4"}


def test_a_tokenizer_that_is_too_large_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    with (base / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_SIDE_FILE_BYTES + 1)

    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json and other files beside the weights have more than"):
        plan_conversion(base, None)


def test_of_more_files_than_are_copied_those_that_loaders_read_are_copied_first(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base = filled(inputs[0], tmp_path / "base", *(f"data/{number}.txt" for number in range(MAX_SIDE_FILES)))
    (base / "vocab.json").write_text('{"longer": "than the others"}')

    chosen = {side.name for side in plan_conversion(base, None).plan.side_files}

    assert len(chosen) == MAX_SIDE_FILES
    assert "vocab.json" in chosen
    assert len(what_is_left(base)) == 2


TEMPLATES = {
    "a file": {"chat_template.jinja": "the base's"},
    "an older file": {"chat_template.json": '{"chat_template": "the base\'s"}'},
    "in its config": {"tokenizer_config.json": '{"chat_template": "the base\'s"}'},
}


@pytest.mark.parametrize("where", TEMPLATES)
def test_where_the_adapter_has_a_tokenizer_and_no_chat_template_the_bases_stays(
    where: str, inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    base = filled(inputs[0], tmp_path / "base", "vocab.json", "merges.txt", "special_tokens_map.json")
    for name, text in TEMPLATES[where].items():
        (base / name).write_text(text)
    adapter = filled(inputs[1], tmp_path / "adapter", "spm.model", "tokenizer_config.json", "checkpoint-3/vocab.json")

    convert(base, adapter, out)

    expected = "chat_template.json" if where == "an older file" else "chat_template.jinja"
    assert "the base's" in (out / expected).read_text()
    assert (out / "tokenizer_config.json").read_text() == "{}"
    assert files_in(out) - OWN == {"spm.model", "tokenizer_config.json", expected}
    assert verify(out, base, adapter).problems == []


@pytest.mark.parametrize("where", [*TEMPLATES, "several"])
def test_a_chat_template_of_the_adapter_takes_the_place_of_all_that_the_base_has(
    where: str, inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    files = ("tokenizer.model", "chat_template.jinja", "additional_chat_templates/rag.jinja", "processor_config.json")
    base = filled(inputs[0], tmp_path / "base", *files)
    adapter = filled(inputs[1], tmp_path / "adapter", "tokenizer.model")
    several = {"chat_template.jinja": "1", "additional_chat_templates/tool_use.jinja": "2"}
    theirs = several if where == "several" else TEMPLATES[where]
    (adapter / "additional_chat_templates").mkdir()
    for name, text in theirs.items():
        (adapter / name).write_text(text)

    convert(base, adapter, out)

    templates = {name for name in files_in(out) if "template" in name or name == "tokenizer_config.json"}
    assert templates == theirs.keys()
    assert {name: (out / name).read_text() for name in theirs} == theirs
    assert (out / "processor_config.json").exists()


def test_a_template_and_a_config_of_an_adapter_without_vocabulary_are_left_and_named(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = filled(inputs[1], tmp_path / "adapter", "chat_template.jinja", "tokenizer_config.json")

    plan = plan_conversion(inputs[0], adapter).plan

    assert [side.name for side in plan.side_files] == ["generation_config.json"]
    assert (
        "not copied from the adapter's folder, for they belong to a tokenizer that it has no vocabulary of: "
        "chat_template.jinja, tokenizer_config.json"
    ) in plan.notes


def with_pooling(base: Path, target: Path) -> Path:
    """A base as sentence-transformers saves it."""
    target = copy(base, target)
    modules = [{"idx": 0, "path": "", "type": "…Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "…Pooling"}]
    (target / "modules.json").write_text(json.dumps(modules))
    (target / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    (target / "1_Pooling" / "code.py").write_text("")
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


@pytest.mark.parametrize("folder", ["2_Dense", "modules/2_Dense", "onnx"])
def test_the_weights_in_a_folder_that_modules_json_names_travel(
    folder: str, inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    names = {f"{folder}/{name}" for name in ("config.json", "model.safetensors", "x.bin")}
    base = filled(inputs[0], tmp_path / "base", *names)
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": folder}]))

    convert(base, inputs[1], out)

    assert {name for name in files_in(out) if "/" in name} == names
    assert verify(out, base, inputs[1]).problems == []


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

    assert {name for name in files_in(out) if "/" in name} == {"1_Pooling/config.json"}


def test_an_out_that_cannot_be_renamed_takes_folders_too(inputs: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    base = with_pooling(inputs[0], tmp_path / "base")
    (out / ".partial").mkdir(parents=True)  # as an earlier run leaves it that found that out

    convert(base, inputs[1], out)
    convert(base, None, out, overwrite=True)

    assert contents(out / "1_Pooling") == {"config.json": b'{"pooling_mode_lasttoken": true}'}
    assert verify(out, base).problems == []

"""Usual mistakes: each message says what is wrong, where, and what to do next."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import ConversionRefused, Recipe, convert
from tests.cli.conftest import Run, is_one_line
from tests.conftest import REPOSITORY
from tests.folders import change_json, copy
from tests.models import save_base


class Places(NamedTuple):
    base: Path
    adapter: Path
    here: Path
    """An empty folder, which is the current one."""


class Mistake(NamedTuple):
    make: Callable[[Places], list[object]]
    """Makes what is there, and gives the arguments."""
    wrong: str
    """What is wrong and where, as a regular expression."""
    step: str
    """What to do next."""


def one(*arguments: str) -> Callable[[Places], list[object]]:
    """Arguments in which BASE and ADAPTER are those of the test, and nothing else is there."""
    return lambda at: [word.replace("BASE", str(at.base)).replace("ADAPTER", str(at.adapter)) for word in arguments]


def with_file(name: str, *arguments: str, content: str = "GGUF") -> Callable[[Places], list[object]]:
    def make(at: Places) -> list[object]:
        (at.here / name).parent.mkdir(parents=True, exist_ok=True)
        (at.here / name).write_text(content)
        return one(*arguments)(at)

    return make


def adapter_of(**changes: Any) -> Callable[[Places], list[object]]:
    def make(at: Places) -> list[object]:
        change_json(copy(at.adapter, at.here / "changed") / "adapter_config.json", **changes)
        return ["--adapter", "changed", "--out", "out"]

    return make


def quantized(at: Places) -> list[object]:
    base = copy(at.base, at.here / "aqlm")
    change_json(base / "config.json", quantization_config={"quant_method": "aqlm"})
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.codes"] = tensors.pop(f"{name}.weight").to(torch.int32)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return ["--base", base, "--adapter", at.adapter, "--out", "out"]


def of_another_size(at: Places) -> list[object]:
    other = save_base(at.here / "other", "llama", hidden_size=128, intermediate_size=96)
    return ["--base", other, "--adapter", at.adapter, "--out", "out"]


def a_parent(at: Places) -> list[object]:
    copy(at.adapter, at.here / "runs" / "checkpoint-500")
    return ["--base", at.base, "--adapter", "runs", "--out", "out"]


def a_parent_of_models(at: Places) -> list[object]:
    copy(at.base, at.here / "models" / "one")
    return ["--base", "models", "--out", "out"]


def pickled(at: Places) -> list[object]:
    base = copy(at.base, at.here / "pickled")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return ["--base", base, "--out", "out"]


def half_downloaded(at: Places) -> list[object]:
    base = copy(at.base, at.here / "half")
    (base / "model.safetensors").unlink()
    return ["--base", base, "--out", "out"]


def something_there(at: Places) -> list[object]:
    (at.here / "out").mkdir()
    (at.here / "out" / "thesis.txt").write_text("mine")
    return ["--base", at.base, "--out", "out"]


def another_there(at: Places) -> list[object]:
    convert(at.base, None, at.here / "out")
    return ["--base", at.base, "--adapter", at.adapter, "--out", "out"]


def out_in_the_base(at: Places) -> list[object]:
    return ["--base", copy(at.base, at.here / "copied"), "--out", "copied/out"]


GONE = "/home/someone/models/gone"
MISTAKES = {
    "a GGUF file": Mistake(
        with_file("model.gguf", "--base", "model.gguf", "--out", "out"),
        "model.gguf: a GGUF file, for llama.cpp",
        "give the folder of the transformers checkpoint that it was made from",
    ),
    "a folder with GGUF": Mistake(
        with_file("ggufs/q4.gguf", "--base", "ggufs", "--out", "out"),
        r"ggufs: has a model in GGUF \(q4.gguf\)",
        "give the folder of the transformers checkpoint that it was made from",
    ),
    "a weights file of the base": Mistake(
        one("--base", "BASE/model.safetensors", "--out", "out"),
        "base/model.safetensors: a file",
        "give its folder, {base}",
    ),
    "a weights file of the adapter": Mistake(
        one("--base", "BASE", "--adapter", "ADAPTER/adapter_model.safetensors", "--out", "out"),
        "adapter_model.safetensors: a file",
        "give its folder, {adapter}",
    ),
    "the config of the adapter": Mistake(
        one("--adapter", "ADAPTER/adapter_config.json", "--out", "out"),
        "adapter_config.json: a file",
        "give its folder, {adapter}",
    ),
    "an archive": Mistake(
        with_file("model.tar.gz", "--base", "model.tar.gz", "--out", "out"),
        "model.tar.gz: an archive",
        "unpack it, and give the folder",
    ),
    "a picture": Mistake(
        with_file("in.png", "in.png", "out.jpg"), "'in.png' is a picture", "this is the converter of models"
    ),
    "base and adapter swapped": Mistake(
        one("--base", "ADAPTER", "--adapter", "BASE", "--out", "out"),
        "/base is a model and .*/adapter an adapter",
        "swap --base and --adapter",
    ),
    "an adapter as the base": Mistake(
        one("--base", "ADAPTER", "--out", "out"), "/adapter: a PEFT adapter, not a model", "give it as --adapter"
    ),
    "a model as the adapter": Mistake(
        one("--base", "BASE", "--adapter", "BASE", "--out", "out"), "/base: a whole model, no adapter", "as --base"
    ),
    "a path without its option": Mistake(one("BASE", "--out", "out"), "/base' is no command", "Give a model as --base"),
    "the parent of a checkpoint": Mistake(
        a_parent,
        "runs: no adapter itself, but its folders are: checkpoint-500",
        "give one of them, as .*runs/checkpoint-500",
    ),
    "the parent of models": Mistake(
        a_parent_of_models, "models: no model itself, but its folders are: one", "give one of them, as models/one"
    ),
    "an adapter that names a folder which is gone": Mistake(
        adapter_of(base_model_name_or_path=GONE),
        f"changed: adapter_config.json names '{GONE}' as the base, but {GONE}: no such folder",
        "give --base",
    ),
    "an adapter that names nothing": Mistake(
        adapter_of(base_model_name_or_path=None), "changed: does not name its base", "give --base"
    ),
    "prompt tuning": Mistake(
        adapter_of(peft_type="PROMPT_TUNING"),
        "changed: .*PROMPT_TUNING.* changes no weight",
        "serve base and adapter with PEFT",
    ),
    "an adapter of another model": Mistake(of_another_size, "lora_B·lora_A is", "another base"),
    "a quantized base": Mistake(
        quantized,
        "the base is quantized already",
        "give the 16-bit model",
    ),
    "pickled weights": Mistake(pickled, "only pickled weights", r"save_pretrained\(FOLDER\)"),
    "half a download": Mistake(
        half_downloaded, "half: neither model.safetensors nor ", "the download may be incomplete"
    ),
    "an OUT with other files": Mistake(something_there, "out: not empty, and not made by this tool", "choose another"),
    "an OUT of another conversion": Mistake(another_there, "out: holds another conversion", "--overwrite replaces it"),
    "an OUT in the base": Mistake(out_in_the_base, "lies inside the input", "choose another folder"),
    "a misspelt option": Mistake(one("--bas", "x"), "No such option", "--base"),
    "a misspelt format": Mistake(
        one("--base", "BASE", "--format", "int4", "--out", "out"), "'int4' is not one of", "nf4, fp4, int8"
    ),
    "a format of llama.cpp": Mistake(
        one("--base", "BASE", "--format", "q4_k_m", "--out", "out"),
        "'q4_k_m' is not one of",
        "write bf16, and give OUT",
    ),
    "a format that servers have a successor of": Mistake(
        one("--base", "BASE", "--format", "gptq", "--out", "out"), "'gptq' is not one of", "w4a16 is what servers run"
    ),
    "an address of the Hub": Mistake(
        one("--base", "https://huggingface.co/maker/model/tree/main", "--out", "out"),
        "https://huggingface.co/maker/model/tree/main: an address",
        "give the id, maker/model",
    ),
    "a misspelt folder": Mistake(
        lambda at: ["--base", f"{copy(at.base, at.here / 'model')}s", "--out", "out"],
        "/models: no such folder",
        "did you mean .*/model\\?",
    ),
    "a misspelt key of a job": Mistake(
        with_file("jobs.jsonl", "batch", "jobs.jsonl", content='{"base": "x", "adaptor": "y", "out": "z"}'),
        "jobs.jsonl: .*'adaptor' is not known",
        "did you mean 'adapter'",
    ),
    "too little memory": Mistake(
        one("--base", "BASE", "--out", "out", "--memory", "1MB"),
        "--memory 1,000,000: [0-9,]+ bytes are needed, because of",
        "give that much",
    ),
    "a pattern that matches nothing": Mistake(
        one("--base", "BASE", "--out", "out", "--keep", "lm_haed"), "--keep lm_haed: matches no module", "did you mean"
    ),
    "no OUT": Mistake(one("--base", "BASE"), "Give --out", "or --dry-run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_usual_mistake_is_named_in_one_line_with_the_next_step(
    name: str, run: Run, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, wrong, step = MISTAKES[name]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    arguments = make(Places(base, adapter, here))
    before = sorted(path.name for path in here.iterdir())

    ran = run(*arguments, "--offline") if arguments[0] != "in.png" else run(*arguments)

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert re.search(wrong, ran.err)
    assert re.search(step.format(base=base, adapter=adapter), ran.err)
    assert "`" not in ran.err
    assert sorted(path.name for path in here.iterdir()) == before


def test_there_are_twenty_at_the_least() -> None:
    assert len(MISTAKES) >= 20


# From Python


def test_from_python_errors_name_parameters(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert(base, None, tmp_path / "out")

    with pytest.raises(ConversionRefused, match="holds another conversion; `overwrite` replaces it"):
        convert(base, adapter, tmp_path / "out")
    with pytest.raises(ConversionRefused, match="`block_size` 100: expected one of 32, 64"):
        Recipe(block_size=100)
    with pytest.raises(ConversionRefused, match="swap `base` and `adapter`"):
        convert(adapter, base, tmp_path / "other")


OF_OTHER_PROGRAMS = re.compile(
    r"`(hf|mlx_lm)[^`]*`|run `mlx_lm.*|--model-path PATH.*|^ --load-format \w+$|`hf download.*|^ --revision $"
    r"|^ --local-dir FOLDER`$|^ --include '$|^/\*' --local-dir DIR$|^RUN pip install .*|--quantize bitsandbytes-nf4"
)


def texts(path: Path) -> list[str]:
    """The texts of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_no_message_of_the_library_names_an_option() -> None:
    package = REPOSITORY / "converter"
    named = {
        (path.name, text)
        for path in package.rglob("*.py")
        if "cli" not in (rooms := path.relative_to(package).parts)
        for text in texts(path)
        if re.search(r"(?<!\w)--[a-z]", OF_OTHER_PROGRAMS.sub("", text))
        # A word alone is an argument in a command of a server, and no message.
        if not ({"export", "latency"} & {*rooms} and re.fullmatch(r"--[a-z-]+=?", text))
    }

    assert named == set()


def test_a_note_of_a_plan_names_the_option(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    both = copy(base, tmp_path / "both")
    for file in adapter.iterdir():
        (both / file.name).write_bytes(file.read_bytes())

    ran = run("--base", both, "--dry-run")

    assert "which is not merged: give it with --adapter" in ran.out


def test_a_job_file_is_told_of_its_keys(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(json.dumps({"adapter": "a", "out": "z", "quant_type": "q4"}))

    assert run("batch", file).err.startswith(f"error: {file}: job 1: quant_type q4: expected one of ")

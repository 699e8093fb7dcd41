from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import Recipe, convert
from converter.cli import main
from converter.verify import verify
from tests.folders import change_json
from tests.limits import cpu_below
from tests.models import save_adapter, save_base
from tests.reference import nf4, reference_flow

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", sharded=True)
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture
def out(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    return convert(*inputs, tmp_path / "out").out


def change(out: Path, what: Callable[[dict[str, torch.Tensor]], object], *, receipt: bool = False) -> None:
    """Change the tensors of a checkpoint of one shard; without its receipt, unless asked to keep it."""
    tensors = load_file(out / "model.safetensors")
    what(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if not receipt:
        (out / "conversion.json").unlink()


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(quant_type="int8"), Recipe(quant_type="none"), Recipe(double_quant=False)]
)
def test_what_was_made_is_good_and_is_what_base_and_adapter_give(
    recipe: Recipe, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = convert(*inputs, tmp_path / "out", recipe).out

    found = verify(out, *inputs)

    assert (found.problems, found.has_receipt) == ([], True)
    assert found.recomputed == len(load_file_names(inputs[0]))
    assert found.files == len(list(out.iterdir())) - 2


def load_file_names(base: Path) -> set[str]:
    return {name for file in base.glob("*.safetensors") for name in load_file(file)}


def test_what_the_usual_flow_made_is_good_too(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    reference = reference_flow(*inputs, tmp_path, nf4(), torch.bfloat16)

    found = verify(reference, *inputs)

    assert (found.problems, found.has_receipt) == ([], False)
    assert found.recomputed == len(load_file_names(inputs[0]))


def test_another_adapter_is_noticed_tensor_by_tensor(inputs: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", inputs[0], "llama", scale=0.2)

    found = verify(out, inputs[0], other)

    assert f"{WEIGHT}: differs from what base and adapter give" in found.problems
    assert not any("embed_tokens" in problem for problem in found.problems)


def test_a_sample_is_the_same_each_time_and_about_as_large_as_asked_for(inputs: tuple[Path, Path], out: Path) -> None:
    counts = [verify(out, *inputs, sample=share).recomputed for share in (0.3, 0.3, 0.6)]

    assert counts[0] == counts[1]
    assert 0 < counts[0] < counts[2] < len(load_file_names(inputs[0]))


def test_a_flipped_bit_is_found_by_the_digest_and_by_comparison(inputs: tuple[Path, Path], out: Path) -> None:
    change(out, lambda tensors: tensors[WEIGHT].view(-1)[7].bitwise_xor_(1), receipt=True)

    found = verify(out, *inputs)

    assert any("model.safetensors" in problem and "the receipt says otherwise" in problem for problem in found.problems)
    assert f"{WEIGHT}: differs from what base and adapter give" in found.problems


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda t: t.pop(f"{WEIGHT}.absmax"), f"{WEIGHT}.absmax is missing"),
        (lambda t: t.update({f"{WEIGHT}.quant_map": torch.zeros(8)}), r"quant_map is F32 \[8\], expected F32 \[16\]"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight: holds a NaN"),
        (lambda t: t[f"{WEIGHT}.nested_absmax"].fill_(float("inf")), "nested_absmax: holds a NaN or an infinity"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 64)}), r"lm_head.weight: shape \[3, 64\]"),
        (
            lambda t: t.update({f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(5, dtype=torch.uint8)}),
            "its quant state can't be read",
        ),
    ],
)  # fmt: skip
def test_defects_are_found_without_a_receipt(
    what: Callable[[dict[str, torch.Tensor]], object], message: str, out: Path
) -> None:
    change(out, what)

    problems = verify(out).problems

    assert any(re.search(message, problem) for problem in problems), problems


STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "stated",
    [
        {"blocksize": 0},
        {"blocksize": -64},
        {"blocksize": 64.0},
        {"blocksize": float("inf")},
        {"nested_blocksize": 0},
        {"shape": ["a", 10**11]},
        {"shape": {"64": 1}},
        {"shape": 64},
        {"shape": [[64], 64]},
        {"shape": [10**4000, 64]},
        {"shape": [2**62] * 2000},
    ],
)
def test_a_quant_state_that_makes_no_sense_is_found_and_not_computed_with(
    stated: dict[str, object], inputs: tuple[Path, Path], out: Path
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | stated
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    change(out, damage)

    with cpu_below(10):
        problems = verify(out, *inputs).problems

    assert any(problem.startswith(f"{WEIGHT}: its quant state can't be read") for problem in problems)


def test_a_quant_state_of_gigabytes_is_not_read(out: Path) -> None:
    size, shard = 1 << 30, out / "model.safetensors"
    raw = shard.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    end = len(raw) - length
    state = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    header = json.dumps(json.loads(raw[8:length]) | {f"more.{STATE}": state}).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + raw[length:])
    os.truncate(shard, shard.stat().st_size + size)

    with cpu_below(10):
        problems = verify(out).problems

    assert any(f"{size:,} bytes, expected at most" in problem for problem in problems)
    assert any(problem.startswith("model.safetensors: ") for problem in problems)


@pytest.mark.parametrize(
    "recipe",
    [None, [1], {}, {"keep": 5}, {"keep": [["x"]]}, {"strange": 1}, {"quant_type": "q4"}, {"quant_type": {}},
     {"block_size": 64.0}, {"max_shard_size": "5GB"}, {"double_quant": "yes"}],
)  # fmt: skip
def test_a_recipe_in_a_receipt_that_is_not_understood_is_a_problem(
    recipe: object, inputs: tuple[Path, Path], out: Path
) -> None:
    change_json(out / "conversion.json", recipe=recipe)

    problems = verify(out, *inputs).problems

    if recipe == {}:  # the defaults
        assert problems == []
    else:
        assert [problem for problem in problems if "no recipe that can be understood" in problem] == problems


@pytest.mark.parametrize("name", ["x" * 300, "x\0", "\ud800", "", "..", "/etc/passwd", "../out/config.json"])
def test_a_name_in_a_receipt_is_only_looked_up(name: str, out: Path) -> None:
    receipt = json.loads((out / "conversion.json").read_text())
    change_json(out / "conversion.json", files=receipt["files"] | {name: receipt["files"]["config.json"]})

    assert verify(out).problems == [f"{name}: missing"]


def test_a_config_that_quantizes_other_modules_is_found(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "up_proj"]
    (out / "config.json").write_text(json.dumps(config))

    problems = verify(out).problems

    assert any("config.json" in problem for problem in problems)
    assert f"{WEIGHT}: quantized here, not by transformers" in problems


def test_missing_and_superfluous_files_are_found(out: Path) -> None:
    shutil.copy(out / "model.safetensors", out / "consolidated.safetensors")
    (out / "README.md").unlink()

    problems = verify(out).problems

    assert problems == ["README.md: missing", "consolidated.safetensors: not in the receipt, and loaders would read it"]


def test_the_sums_work_with_the_usual_program(out: Path) -> None:
    run = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stdout.count(": OK")) == (0, len(list(out.iterdir())) - 1)


def test_the_command_says_good_or_what_is_wrong_by_its_exit_code(
    inputs: tuple[Path, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as good:
        main(["verify", str(out), "--base", str(inputs[0]), "--adapter", str(inputs[1]), "--sample", "50%", "--json"])
    first = json.loads(capsys.readouterr().out)
    (out / "README.md").write_text("changed")
    with pytest.raises(SystemExit) as bad:
        main(["verify", str(out)])

    assert (good.value.code, bad.value.code) == (0, 1)
    assert (first["good"], first["problems"]) == (True, [])
    assert "README.md: 7 bytes, the receipt says otherwise" in capsys.readouterr().out

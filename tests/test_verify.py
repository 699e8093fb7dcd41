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

from converter import ConversionFailed, Job, Recipe, convert, convert_batch
from converter.api import verify
from converter.compare import all_of
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


def change_offset(tensors: dict[str, torch.Tensor], offset: str) -> None:
    """Have the quant state of WEIGHT say that this was subtracted from its absmax."""
    name = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
    state = re.sub(rb'("nested_offset": )[^,}]+', rb"\1" + offset.encode(), bytes(tensors[name].tolist()))
    tensors[name] = torch.tensor(list(state), dtype=torch.uint8)


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(quant_type="int8"), Recipe(quant_type="none"), Recipe(double_quant=False)]
)
def test_what_was_made_is_good_and_is_what_base_and_adapter_give(
    recipe: Recipe, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = convert(*inputs, tmp_path / "out", recipe).out

    found = verify(out, *inputs)

    assert (found.problems, found.has_receipt) == ([], True)
    assert found.loaders == {loader: [] for loader in ("transformers 5", "transformers 4.57", "vLLM", "SGLang")}
    assert found.recomputed == len(load_file_names(inputs[0]))
    assert found.files == len(list(out.iterdir())) - 2  # SHA256SUMS, and the model card, which people edit


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


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_a_sample_is_of_every_shard(share: float, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Here one that other outputs have, too, and one of its own."""
    job = Job(tmp_path / "out", inputs[1], inputs[0])
    other = Job(tmp_path / "other", save_adapter(tmp_path / "adapter", inputs[0], "llama", scale=0.2), inputs[0])
    assert all(outcome.is_good for outcome in convert_batch([job, other]))
    out = job.out
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == 2
    for shard in shards:  # everything in it becomes another, and stays what it was in the other output
        tensors = {n: (~t.view(torch.uint8)).view(t.dtype) for n, t in load_file(shard).items()}
        shard.unlink()
        save_file(tensors, shard, metadata={"format": "pt"})

    problems = verify(out, *inputs, sample=share).problems

    different = {problem.partition(":")[0] for problem in problems if "differs from what base and adapter" in problem}
    assert all(different & load_file(shard).keys() for shard in shards)


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
        (lambda t: change_offset(t, "Infinity"), f"{WEIGHT}: its quant state's offset is inf"),
        (lambda t: change_offset(t, "NaN"), "its quant state can't be read"),
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
        {"nested_offset": 10**400},
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


@pytest.mark.parametrize("name", ["x" * 300, "x\0", "\ud800", "", "..", "/etc/passwd", "../out/config.json"])
def test_a_name_in_a_receipt_is_only_looked_up(name: str, out: Path) -> None:
    receipt = json.loads((out / "conversion.json").read_text())
    change_json(out / "conversion.json", files=receipt["files"] | {name: receipt["files"]["config.json"]})

    assert [problem for problem in verify(out).problems if "SHA256SUMS says" not in problem] == [f"{name}: missing"]


@pytest.mark.parametrize(
    ("recipe", "name", "what"),
    [
        (Recipe(), "model.norm.weight", lambda tensor: tensor.view(torch.float16)),
        (Recipe(quant_type="int8"), "model.layers.0.mlp.up_proj.SCB", lambda tensor: torch.cat([tensor, tensor])),
    ],
    ids=["a dtype", "a shape"],
)
def test_the_same_bytes_under_another_dtype_or_shape_are_found_by_comparison(
    recipe: Recipe,
    name: str,
    what: Callable[[torch.Tensor], torch.Tensor],
    inputs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    out = convert(*inputs, tmp_path / "out", recipe).out
    change(out, lambda tensors: tensors.update({name: what(tensors[name])}), receipt=True)

    problems = verify(out, *inputs, sample=0.01).problems

    assert any(re.match(rf"{name}: F\d+ \[\d+\], expected B?F\d+ \[\d+\]", problem) for problem in problems), problems


def test_a_config_that_quantizes_other_modules_is_found(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "up_proj"]
    (out / "config.json").write_text(json.dumps(config))

    problems = verify(out).problems

    assert any("config.json" in problem for problem in problems)
    assert f"{WEIGHT}: quantized here, not by transformers" in problems
    loaders = verify(out).loaders
    assert loaders["transformers 4.57"][0] == "model.layers.0.mlp.up_proj: quantized, it would keep it"
    assert loaders["vLLM"] == []  # where it is called gate_up_proj


def test_missing_and_superfluous_files_are_found(out: Path) -> None:
    shutil.copy(out / "model.safetensors", out / "consolidated.safetensors")
    (out / "generation_config.json").unlink()

    problems = verify(out).problems

    assert problems == [
        "generation_config.json: missing",
        "consolidated.safetensors: not in the receipt, and loaders would read it",
    ]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "adapter_config.json", "x.safetensors"])
def test_a_file_that_was_added_is_found_if_loaders_would_read_it(name: str, out: Path) -> None:
    for added in ("notes.txt", "LICENSE", "eval_results.json"):
        (out / added).touch()
    assert verify(out).problems == []

    (out / name).symlink_to("/dev/null")

    assert verify(out).problems == [f"{name}: not in the receipt, and loaders would read it"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "SHA256SUMS").unlink(), "SHA256SUMS: missing"),
        (lambda out: (out / "SHA256SUMS").write_text("no sums"), "SHA256SUMS: line 1 is 'no sums', expected a sha256"),
        (
            lambda out: (out / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n"),
            "SHA256SUMS: has another sha256 for config.json than the receipt",
        ),
        (lambda out: change_json(out / "conversion.json", tensors={}), "conversion.json: .* SHA256SUMS says otherwise"),
        (lambda out: (out / "conversion.json").unlink(), "conversion.json: missing"),
        (lambda out: (out / "conversion.json").write_text("{"), "conversion.json: .* SHA256SUMS says otherwise"),
    ],
    ids=["no sums", "no sums in it", "other sums", "another receipt", "no receipt", "no receipt in it"],
)
def test_the_receipt_and_the_sums_are_held_against_each_other(
    change: Callable[[Path], object], message: str, out: Path
) -> None:
    change(out)

    problems = verify(out).problems

    assert len(problems) == 1
    assert re.search(message, problems[0])


@pytest.mark.parametrize(
    "recipe",
    [None, [1], {}, {"keep": 1}, {"keep": [["x"]]}, {"keep": [], "quant_type": "nf5"}, {"quant_type": {}},
     {"strange": 1}, {"block_size": 64.0}, {"max_shard_size": "5GB"}, {"double_quant": "yes"}],
)  # fmt: skip
def test_a_receipt_whose_recipe_makes_no_sense_is_found_and_nothing_is_made_by_it(
    recipe: object, inputs: tuple[Path, Path], out: Path
) -> None:
    change_json(out / "conversion.json", recipe=recipe)

    found = verify(out, *inputs)

    assert any(problem.startswith("conversion.json: its recipe can't be understood") for problem in found.problems)
    assert found.recomputed == 0


def test_what_was_not_made_again_to_the_last_tensor_is_not_called_good() -> None:
    """With too little memory CPython 3.11 may lose the MemoryError and end the loop as if that were all."""
    with pytest.raises(ConversionFailed, match="only 0 of 21 tensors were made again: too little memory"):
        list(all_of([], 21))


def test_the_sums_work_with_the_usual_program(out: Path) -> None:
    run = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stdout.count(": OK")) == (0, len(list(out.iterdir())) - 2)

"""One conversion: what is printed, what is written, and the exit code."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converter import Progress, Recipe, convert
from converter.errors import WriteFailed
from tests.cli.conftest import Run, is_one_line
from tests.folders import change_json, change_tensor, copy
from tests.models import save_base


def test_a_conversion_prints_a_summary_and_ends_with_0(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out)

    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert "peak memory" in lines[0]
    assert lines[1] == "14 merged, 14 quantized, 7 kept"
    assert lines[2].startswith("relative error: mean 0.0")
    assert lines[3].startswith("survival of the delta: mean ")
    assert lines[-2:] == [
        f'load with: transformers.AutoModelForCausalLM.from_pretrained("{out}")',
        f"publish with: hf upload ORG/NAME {out}",
    ]
    assert (out / "config.json").exists()


def test_what_a_server_loads_best_is_said_to_be_loaded_by_it(run: Run, base: Path, out: Path) -> None:
    ran = run("--base", base, "--out", out, "--format", "w8a16", "--group-size", "32")

    assert ran.out.splitlines()[-2] == f"load with: vllm serve {out}"


def test_the_step_that_is_named_next_can_be_pasted(run: Run, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "my model"

    ran = run("--base", base, "--out", out)

    words = shlex.split(ran.out.splitlines()[-1].removeprefix("publish with: "))
    assert words == ["hf", "upload", "ORG/NAME", str(out)]


def test_a_conversion_that_was_made_before_says_so_and_ends_with_0(run: Run, base: Path, out: Path) -> None:
    run("--base", base, "--out", out)

    ran = run("--base", base, "--out", out)

    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{out}: made of the same inputs by the same recipe already; nothing to do\n"


def test_verbose_lists_every_tensor(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out, "-v")

    assert ran.code == 0
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        assert name in ran.out


def test_quiet_prints_nothing(run: Run, base: Path, adapter: Path, out: Path) -> None:
    for more in ([], ["--overwrite", "--quant-type", "fp4"], ["--quant-type", "fp4"], ["--dry-run", "--overwrite"]):
        assert run("--base", base, "--adapter", adapter, "--out", out, "--quiet", *more) == (0, "", "")


def test_json_is_one_object_with_the_figures(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out, "--json")

    told = json.loads(ran.out)
    receipt = json.loads((out / "conversion.json").read_text())
    assert (ran.code, ran.err) == (0, "")
    assert told["out"] == str(out)
    assert told["nothing_to_do"] is False
    assert told["fingerprint"] == receipt["fingerprint"]
    assert told["output_bytes"] == (out / "model.safetensors").stat().st_size
    assert told["base_bytes"] == sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    assert told["tensors"] == {"merged": 14, "quantized": 14, "kept": 7, "replaced": 0}
    errors = {name: t["error"] for name, t in receipt["tensors"].items() if t["action"] == "quantize"}
    assert told["error"]["worst"] == max(errors.values()) == errors[told["error"]["worst_tensor"]]
    assert told["survival"]["worst"] == min(t["survival"] for t in receipt["tensors"].values() if "survival" in t)
    assert told["seconds"] > 0
    assert told["peak_memory_bytes"] > 0


def test_json_of_a_conversion_that_was_made_before_says_so(run: Run, base: Path, out: Path) -> None:
    first = json.loads(run("--base", base, "--out", out, "--json").out)

    told = json.loads(run("--base", base, "--out", out, "--json").out)

    assert told["nothing_to_do"] is True
    assert told["fingerprint"] == first["fingerprint"]
    assert told["error"] is None


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--base", "./nope", "--out", "out"], 2),
        (["--base", "./nope", "--out", "out", "--max-shard-size", "5 cows"], 2),
        (["--base", "./nope"], 2),
        (["--nonsense"], 2),
        (["--dry-run"], 2),
    ],
    ids=str,
)
def test_json_of_a_refusal_is_one_object_too(run: Run, arguments: list[str], code: int) -> None:
    ran = run(*arguments, "--json")

    told = json.loads(ran.out)
    assert ran.code == told["exit_code"] == code
    assert told["error"] in ran.err
    assert told.keys() == {"error", "exit_code"}


def test_a_refusal_is_one_line_and_ends_with_2(run: Run, base: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")

    ran = run("--base", base, "--out", out)

    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: {out}: not empty, and not made by this tool; choose another folder\n"


def test_with_verbose_a_refusal_comes_with_its_traceback(run: Run, tmp_path: Path) -> None:
    ran = run("--base", tmp_path / "nope", "--out", tmp_path / "out", "-v")

    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1] == f"error: {tmp_path}/nope: no such folder"


def test_a_nan_met_on_the_way_ends_with_1_and_names_the_tensor(run: Run, base: Path, out: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]):
        bad = copy(base, tmp_path / f"bad{number}")
        change_tensor(bad / "model.safetensors", name, lambda tensor: tensor.view(-1)[7].fill_(torch.nan))

        ran = run("--base", bad, "--out", out)

        assert (ran.code, ran.out) == (1, "")
        assert is_one_line(ran.err)
        assert ran.err.startswith(f"error: {name}: holds a NaN or an infinity")
        assert list(out.parent.iterdir()) == []


@pytest.fixture
def large_base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "large", "llama", vocab_size=8192)


@pytest.fixture
def small_disk(out: Path) -> Iterator[Path]:
    """OUT's parent, with room for a part of what is to come."""
    out.parent.mkdir()
    if os.system(f"mount -t tmpfs -o size=4m tmpfs '{out.parent}' 2>/dev/null"):
        pytest.skip("mounting needs a privilege that this machine does not give")
    yield out.parent
    os.system(f"umount '{out.parent}'")


def test_a_disk_without_room_is_refused_at_once(run: Run, large_base: Path, out: Path, small_disk: Path) -> None:
    (small_disk / "others").write_bytes(bytes(2_500_000))

    ran = run("--base", large_base, "--out", out, "--max-shard-size", "1MB")

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert "bytes are needed, the disk has" in ran.err
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def test_a_disk_that_others_fill_meanwhile_ends_with_1_and_leaves_no_out(
    large_base: Path, out: Path, small_disk: Path
) -> None:
    def fill(_: Progress) -> None:
        (small_disk / f"others{next(number)}").write_bytes(bytes(shutil.disk_usage(small_disk).free))

    number = itertools.count()

    with pytest.raises(WriteFailed, match=rf"{out}.partial/.*No space left on device") as failed:
        convert(large_base, None, out, Recipe(max_shard_size=1_000_000), progress=fill)

    assert failed.value.exit_code == 1
    assert not out.exists()


def test_a_limit_on_file_size_ends_with_1_and_leaves_nothing(run: Run, large_base: Path, out: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        ran = run("--base", large_base, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"error: {out}.partial/model.safetensors.unfinished: File too large\n"
    assert not out.exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out, "--dry-run")

    assert (ran.code, ran.err) == (0, "")
    assert "model.layers.*.mlp.up_proj.weight" in ran.out
    assert "merge, rank 8, scaling 2, quantize" in ran.out
    assert "memory: at most " in ran.out
    assert ran.out.endswith("dry run: nothing was written\n")
    assert not out.parent.exists()


def test_a_dry_run_as_json_is_the_plan_as_one_object(run: Run, base: Path, adapter: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--dry-run", "--json")

    plan = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert plan["architecture"] == "LlamaForCausalLM"
    assert plan["counts"]["merged"] == 14
    assert {tensor["name"] for shard in plan["shards"] for tensor in shard["tensors"]} == set(
        load_file(base / "model.safetensors")
    )


def test_without_a_base_the_one_that_the_adapter_names_is_taken(
    run: Run, inputs: tuple[Path, Path], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(inputs[0], tmp_path / "models" / "base")
    adapter = copy(inputs[1], tmp_path / "lora")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="models/base")
    monkeypatch.chdir(tmp_path)

    ran = run("--adapter", "./lora", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    assert json.loads((out / "conversion.json").read_text())["origin"]["base_name"] == "models/base"


def test_an_adapter_that_names_no_base_asks_for_one(
    run: Run, inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    adapter = copy(inputs[1], tmp_path / "lora")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)

    ran = run("--adapter", adapter, "--out", out)

    assert ran == (2, "", f"error: {adapter}: does not name its base; give --base\n")


def test_a_terminal_gets_a_progress_bar(run: Run, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    ran = run("--base", base, "--out", out)

    assert ran.code == 0
    assert "sealing" in terminal.getvalue()
    assert "sealing" not in ran.out


def test_a_terminal_that_goes_meanwhile_is_no_reason_to_fail(
    run: Run, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, _: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")

    ran = run("--base", base, "--out", out)

    assert ran.code == 0
    assert ran.out.startswith(f"{out}: ")


def test_json_is_json_where_a_config_has_an_infinity(run: Run, base: Path, tmp_path: Path) -> None:
    other = copy(base, tmp_path / "other")
    change_json(other / "config.json", time_step_limit=[0.0, float("inf")])

    ran = run("--base", other, "--dry-run", "--json")

    def constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    assert json.loads(ran.out, parse_constant=constant)["config"]["time_step_limit"] == [0.0, "Infinity"]


# Several adapters into one output


def test_several_adapters_are_combined_into_one_output(run: Run, base: Path, adapter: Path, out: Path) -> None:
    both = ("--adapter", adapter, "--adapter", adapter)
    ran = run("--base", base, *both, "--combine", "cat", "--weight", "0.75", "--weight", "0.25", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[1] == "14 merged, 14 quantized, 7 kept"
    recipe = json.loads((out / "conversion.json").read_text())["recipe"]
    assert recipe["combine"] == {"kind": "cat", "weights": [0.75, 0.25]}
    assert run("verify", out, "--base", base, *both).code == 0


def test_how_adapters_are_combined_is_taken_from_a_receipt(
    run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    both = ("--base", base, "--adapter", adapter, "--adapter", adapter)
    how = ("--combine", "ties_svd", "--weight", "1", "--weight", "-0.5", "--density", "0.5", "--svd-rank", "4")
    assert run(*both, *how, "--out", out).code == 0

    again = run(*both, "--config", out, "--out", tmp_path / "again")

    assert (again.code, again.err) == (0, "")
    receipts = [json.loads((place / "conversion.json").read_text()) for place in (out, tmp_path / "again")]
    assert receipts[0] == receipts[1]
    printed = run("--config", out, "--print-config").out
    for line in ('combine = "ties_svd"', "weight = [1.0, -0.5]", "density = 0.5", "svd_rank = 4"):
        assert line in printed.splitlines()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--weight", "1"), "--weight has no meaning without --combine."),
        (("--density", "0.5"), "--density has no meaning without --combine."),
        (("--combine", "cat", "--weight", "1"), "--combine takes two adapters or more, and one --weight for each"),
        (("--combine", "dog", "--weight", "1", "--weight", "1"), "--combine dog: expected one of cat, linear"),
        (
            ("--combine", "cat", "--weight", "1", "--weight", "1"),
            "2 --weight for 3 adapters: give one for each",
        ),
    ],
)
def test_options_that_combine_nothing_are_refused(
    run: Run, base: Path, adapter: Path, out: Path, options: tuple[str, ...], expected: str
) -> None:
    three = [word for _ in range(3) for word in ("--adapter", adapter)]

    ran = run("--base", base, *three, *options, "--out", out)

    assert ran.code == 2
    assert expected in ran.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("before", "named"),
    [
        (("--base", "X", "--adapter", "Y", "--quant-type", "int8"), "--base, --adapter, --quant-type before verify"),
        (("--json",), "--json before verify"),
        (("--out", "Z"), "--out before verify"),
    ],
)
def test_options_of_a_conversion_before_a_command_are_refused(
    run: Run, before: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    ran = run(*before, "verify", tmp_path)

    assert ran.code == 2
    assert named.replace("--quant-type", "--format") in (ran.err + ran.out).replace("--quant-type", "--format")
    assert "come after it" in ran.err + ran.out


def test_a_dry_run_over_the_same_finished_conversion_says_that_nothing_is_to_be_done(
    run: Run, inputs: tuple[Path, Path], out: Path
) -> None:
    same = ("--base", inputs[0], "--adapter", inputs[1], "--out", out)
    run(*same)

    again, as_json = run(*same, "--dry-run"), run(*same, "--dry-run", "--json")
    other = run(*same, "--format", "int8", "--dry-run")

    assert (again.code, as_json.code, other.code) == (0, 0, 2)
    assert "nothing would be done, for OUT is this very conversion, finished" in again.out
    assert json.loads(as_json.out)["nothing_to_do"] is True
    assert "holds another conversion" in other.err

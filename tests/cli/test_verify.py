"""`convert verify`: what it compares with, what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter import convert
from tests.cli.conftest import Run, is_one_line
from tests.folders import change_json, change_tensor, copy, flip_bit
from tests.hub_server import StandInHub
from tests.models import save_adapter

WEIGHT = "model.layers.0.mlp.up_proj.weight"
TAKEN = "loaders that take it, by their rules: transformers 5, transformers 4.57, vLLM, SGLang"


@pytest.fixture
def out(base: Path, adapter: Path, tmp_path: Path) -> Path:
    return convert(base, adapter, tmp_path / "out").out


# Exit codes


def test_what_is_as_it_was_made_ends_with_0_and_says_how_to_compare(run: Run, out: Path) -> None:
    ran = run("verify", out)

    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        f"{out}: 4 files as the receipt says, 49 tensors read: good",
        f"note: not compared with its base and adapter; to compare: convert verify {out} --base BASE --adapter ADAPTER",
        TAKEN,
    ]


def test_what_base_and_adapter_give_ends_with_0(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("verify", out, "--base", base, "--adapter", adapter, "--sample", "50%", "--json")

    told = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert (told["good"], told["problems"], told["has_adapter"]) == (True, [], True)
    assert 0 < told["recomputed"] < 21


def test_a_changed_file_ends_with_1_and_is_named(run: Run, out: Path) -> None:
    (out / "config.json").write_text("{}")

    ran = run("verify", out)

    assert (ran.code, ran.err) == (1, "")
    assert "config.json: 2 bytes, the receipt says otherwise" in ran.out


@pytest.mark.parametrize("what", ["missing", "empty", "a text"])
def test_what_is_no_checkpoint_ends_with_2(what: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if what != "missing":
        folder.mkdir()
    if what == "a text":
        (folder / "config.json").write_text("no JSON")

    ran = run("verify", folder)

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)


def test_a_base_that_cannot_be_had_ends_with_3(run: Run, out: Path, adapter: Path, tmp_path: Path) -> None:
    ran = run("verify", out, "--base", tmp_path / "none", "--adapter", adapter, "--json")

    assert ran.code == json.loads(ran.out)["exit_code"] == 3
    assert ran.err == f"error: not compared with base and adapter: {tmp_path}/none: no such folder\n"


# What is not given


def test_an_adapter_that_the_receipt_has_no_name_for_is_asked_for(run: Run, base: Path, out: Path) -> None:
    ran = run("verify", out, "--base", base)

    assert (ran.code, ran.out) == (3, "")
    assert ran.err == (
        "error: made with an adapter that has no name in the receipt, as it was a folder: give --adapter\n"
    )


def test_a_base_that_the_receipt_has_no_name_for_is_asked_for(run: Run, base: Path, tmp_path: Path) -> None:
    out = convert(base, None, tmp_path / "quantized").out

    ran = run("verify", out, "--compare")

    assert (ran.code, ran.out) == (3, "")
    assert ran.err == "error: made from a base that has no name in the receipt, as it was a folder: give --base\n"


@pytest.fixture
def hub(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    pushed = copy(adapter, tmp_path / "pushed")
    change_json(pushed / "adapter_config.json", base_model_name_or_path="maker/base")
    with StandInHub({"maker/base": base, "maker/lora": pushed}) as server:
        server.use(monkeypatch, tmp_path / "hub")
        yield server


@pytest.mark.parametrize("given", [["--compare"], ["--base", "maker/base"], ["--adapter", "maker/lora"]])
def test_what_is_not_given_is_taken_from_the_receipt_at_its_commit(
    given: list[str], run: Run, hub: StandInHub, base: Path, tmp_path: Path
) -> None:
    run("--adapter", "maker/lora", "--out", tmp_path / "out")
    other = save_adapter(tmp_path / "other", base, "llama", scale=0.2)
    if given != ["--adapter", "maker/lora"]:
        hub.push("maker/lora", other)  # main is another one now

    ran = run("verify", tmp_path / "out", *given)

    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith(f"49 tensors read, 21 made again and compared: good\n{TAKEN}\n")


def test_the_hint_of_an_output_from_the_hub_needs_no_names(run: Run, hub: StandInHub, tmp_path: Path) -> None:
    run("--adapter", "maker/lora", "--out", tmp_path / "out")

    ran = run("verify", tmp_path / "out")

    assert ran.out.endswith(f"to compare: convert verify {tmp_path}/out --compare\n{TAKEN}\n")


def test_a_base_of_the_receipts_name_that_is_another_decides_nothing(
    run: Run, hub: StandInHub, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """What was converted was a folder; the adapter called it by the name of something else."""
    named = copy(adapter, tmp_path / "named")
    change_json(named / "adapter_config.json", base_model_name_or_path="maker/base")
    mine = copy(base, tmp_path / "mine")
    change_tensor(mine / "model.safetensors", WEIGHT, lambda tensor: tensor.mul_(2))
    out = convert(mine, named, tmp_path / "out").out

    ran = run("verify", out, "--adapter", named)

    assert (ran.code, ran.out) == (3, "")
    assert ran.err == "error: the base that the receipt names is not the one that was converted: give --base\n"


# What differs


def test_of_many_problems_of_a_kind_ten_are_listed_and_the_others_counted(
    run: Run, base: Path, out: Path, tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "other", base, "llama", scale=0.2)

    ran = run("verify", out, "--base", base, "--adapter", other)

    lines = ran.out.splitlines()
    assert (ran.code, ran.err) == (1, "")
    assert lines[1].startswith("adapter: not the one that was merged in, by the receipt (sha256 ")
    alike = [number for number, line in enumerate(lines) if line.endswith(": differs from what base and adapter give")]
    problems = json.loads(run("verify", out, "--base", base, "--adapter", other, "--json").out)["problems"]
    count = sum(problem.endswith(": differs from what base and adapter give") for problem in problems)
    assert len(alike) == 10 < count
    assert lines[alike[-1] + 1] == f"… and {count - 10} more like these"


def test_another_base_is_named_before_what_it_changes(
    run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    other = copy(base, tmp_path / "other")
    change_tensor(other / "model.safetensors", WEIGHT, lambda tensor: tensor.mul_(2))

    ran = run("verify", out, "--base", other, "--adapter", adapter)

    assert ran.code == 1
    assert ran.out.splitlines()[1] == "base: 1 of 21 tensors are not those that were converted, by the receipt"


def test_a_receipt_can_be_required(run: Run, out: Path) -> None:
    assert run("verify", out, "--require-receipt").code == 0
    (out / "conversion.json").unlink()

    assert run("verify", out).code == 1  # SHA256SUMS misses it
    (out / "SHA256SUMS").unlink()
    assert run("verify", out).code == 0
    ran = run("verify", out, "--require-receipt")

    assert ran.code == 1
    assert "conversion.json: missing, or not a receipt of this tool" in ran.out


# The model card, which people edit


def test_a_card_that_was_edited_or_removed_is_no_problem(run: Run, base: Path, adapter: Path, out: Path) -> None:
    (out / "README.md").write_text("# Mine\n")

    assert run("verify", out).code == 0
    assert "nothing to do" in run("--base", base, "--adapter", adapter, "--out", out).out
    (out / "README.md").unlink()
    assert run("verify", out).code == 0
    assert run("--base", base, "--out", out, "--overwrite").code == 0


def test_a_card_that_an_earlier_receipt_covers_may_be_edited_too(run: Run, out: Path) -> None:
    receipt = json.loads((out / "conversion.json").read_text())
    digest = "0" * 64
    files = receipt["files"] | {"README.md": {"bytes": 7, "sha256": digest}}
    (out / "conversion.json").write_text(json.dumps(receipt | {"files": files}))
    sums = [line for line in (out / "SHA256SUMS").read_text().splitlines() if "conversion.json" not in line]
    (out / "SHA256SUMS").write_text("\n".join([*sums, f"{digest}  README.md"]) + "\n")

    assert run("verify", out).code == 0


def test_a_flipped_bit_is_found(run: Run, out: Path) -> None:
    flip_bit(out / "model.safetensors")

    assert run("verify", out, "--quiet").code == 1


def test_a_base_that_was_never_converted_is_not_called_good(run: Run, base: Path) -> None:
    ran = run("verify", base)

    assert ran.code == 0
    assert "whole, but no conversion" in ran.out
    assert "good" not in ran.out
    assert "no receipt, and no weight is quantized" in ran.out

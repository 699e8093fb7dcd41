"""Bases and adapters on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run, is_one_line
from tests.folders import change_json, contents, copy
from tests.hub_server import StandInHub
from tests.hub_uploads import UploadHub, upload_hub
from tests.reference import differences


@pytest.fixture
def hub(tiny_base: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    adapter = copy(tiny_adapter, tmp_path / "pushed")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="maker/base")
    with StandInHub({"maker/base": tiny_base, "maker/lora": adapter}) as server:
        server.use(monkeypatch, tmp_path / "hub")
        yield server


def test_a_dry_run_on_the_hub_downloads_no_shard(run: Run, hub: StandInHub, tiny_base: Path, tmp_path: Path) -> None:
    ran = run("--base", "maker/base", "--dry-run", "--json")

    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["counts"]["quantize"] == 28
    shards = [request for request in hub.asked(".safetensors") if not request.path.endswith(".json")]
    assert all(request.method == "HEAD" or request.range for request in shards)
    assert sum(request.sent for request in shards) < sum(path.stat().st_size for path in tiny_base.iterdir()) / 4
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_conversion_from_the_hub_equals_that_of_the_folders(
    run: Run, hub: StandInHub, tiny_base: Path, tiny_adapter: Path, out: Path, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    run("--base", tiny_base, "--adapter", tiny_adapter, "--out", local)

    ran = run("--adapter", "maker/lora", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    assert differences(out, local) == []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert contents(out)[name] == contents(local)[name]


def test_a_quantized_base_on_the_hub_is_planned_without_its_shards_and_converted_as_the_folder(
    run: Run, hub: StandInHub, tiny_base: Path, tiny_adapter: Path, out: Path, tmp_path: Path
) -> None:
    quantized, local = tmp_path / "quantized", tmp_path / "local"
    run("--base", tiny_base, "--out", quantized)
    hub.push("maker/four-bit", quantized)
    run("--base", quantized, "--adapter", tiny_adapter, "--out", local)

    planned = run("--base", "maker/four-bit", "--adapter", "maker/lora", "--dry-run", "--json")

    assert (planned.code, planned.err) == (0, "")
    assert json.loads(planned.out)["counts"]["quantize"] == 28
    assert not list((tmp_path / "hub").rglob("model*.safetensors"))
    assert run("--base", "maker/four-bit", "--adapter", "maker/lora", "--out", out).code == 0
    assert differences(out, local) == []


def test_the_receipt_of_a_conversion_from_the_hub_names_the_commits(run: Run, hub: StandInHub, out: Path) -> None:
    ran = run("--base", "maker/base", "--adapter", "maker/lora", "--out", out)

    assert ran.code == 0
    origin = json.loads((out / "conversion.json").read_text())["origin"]
    assert (origin["base_name"], origin["adapter_name"]) == ("maker/base", "maker/lora")
    for key, repo in (("base_commit", "maker/base"), ("adapter_commit", "maker/lora")):
        assert origin[key] == hub.repositories[repo].branches["main"]
        assert origin[key] in (out / "README.md").read_text()
    assert set(origin["base"]) == {f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)}


def test_a_conversion_from_the_hub_that_was_made_before_downloads_nothing(
    run: Run, hub: StandInHub, out: Path, tmp_path: Path
) -> None:
    run("--base", "maker/base", "--out", out)
    cache = tmp_path / "hub"
    cache.rename(tmp_path / "forgotten")
    hub.log.clear()

    ran = run("--base", "maker/base", "--out", out)

    assert ran.code == 0
    assert "nothing to do" in ran.out
    assert not list(cache.rglob("*.safetensors"))


def test_another_commit_of_the_base_is_another_conversion(
    run: Run, hub: StandInHub, tiny_base: Path, out: Path, tmp_path: Path
) -> None:
    run("--base", "maker/base", "--out", out)
    base = copy(tiny_base, tmp_path / "second")
    shard = base / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    hub.push("maker/base", base)

    ran = run("--base", "maker/base", "--out", out)

    assert ran.code == 2
    assert "--overwrite replaces it" in ran.err


def test_offline_the_cache_serves(run: Run, hub: StandInHub, out: Path, tmp_path: Path) -> None:
    run("--adapter", "maker/lora", "--out", out)
    hub.log.clear()

    ran = run("--adapter", "maker/lora", "--out", tmp_path / "again", "--offline")

    assert (ran.code, ran.err) == (0, "")
    assert contents(tmp_path / "again") == contents(out)
    assert not hub.log


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--base", "maker/base", "--offline"], "is not in the cache"),
        (["--base", "maker/gated"], "gated"),
        (["--base", "maker/nothing"], "maker/nothing: no such folder here, and on the Hub: "),
        (["--base", "maker/base", "--base-revision", "v9"], "v9"),
    ],
    ids=str,
)
def test_what_the_hub_does_not_have_for_us_ends_with_2_and_one_line(
    run: Run, hub: StandInHub, tiny_base: Path, out: Path, arguments: list[str], found: str
) -> None:
    hub.push("maker/gated", tiny_base)
    hub.gated.add("maker/gated")

    ran = run(*arguments, "--out", out)

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert found in ran.err
    assert not out.parent.exists()


def test_a_hub_that_fails_ends_with_1(run: Run, hub: StandInHub, out: Path) -> None:
    hub.failures, hub.failing_status = 1_000, 501  # which is not tried again

    ran = run("--base", "maker/base", "--out", out)

    assert ran.code == 1
    assert is_one_line(ran.err)
    assert "501" in ran.err


@pytest.mark.parametrize("named", [True, False], ids=["by a name", "against an output"])
def test_the_revision_of_an_adapter_is_kept_on_the_way_to_a_batch(
    named: bool, run: Run, hub: StandInHub, tiny_adapter: Path, out: Path, tmp_path: Path
) -> None:
    earlier = copy(tiny_adapter, tmp_path / "earlier")
    change_json(earlier / "adapter_config.json", base_model_name_or_path="maker/base", lora_alpha=1)
    commit = hub.push("maker/lora", earlier, branch="v1")
    given: list[object] = ["--adapter", "x=maker/lora" if named else "maker/lora"]
    if not named:
        run("--adapter", "one=maker/lora", "--adapter", "two=maker/lora", "--out", tmp_path / "first")
        given += ["--against", tmp_path / "first" / "one"]

    ran = run(*given, "--adapter-revision", "v1", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    receipt = (out / "x" if named else out) / "conversion.json"
    assert json.loads(receipt.read_text())["origin"]["adapter_commit"] == commit


def test_the_card_names_base_and_adapter_of_the_hub_and_their_licences(
    run: Run, hub: StandInHub, tiny_base: Path, out: Path, tmp_path: Path
) -> None:
    base = copy(tiny_base, tmp_path / "with card")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.push("maker/base", base)
    text = tmp_path / "own.md"
    text.write_text("Trained on my notes.")

    assert run("--adapter", "maker/lora", "--out", out, "--card", text).code == 0
    assert run("--base", "maker/base", "--out", tmp_path / "alone").code == 0

    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nbase_model:\n- maker/base\n- maker/lora\nbase_model_relation: merge\n")
    assert "Trained on my notes." in card
    alone = (tmp_path / "alone" / "README.md").read_text()
    assert "base_model: maker/base\nbase_model_relation: quantized\n" in alone


def test_text_for_the_card_that_cannot_be_read_is_refused(run: Run, base: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "front.md").write_text("---\nlicense: mit\n---\n")
    for file, said in (("none.md", "No such file or directory"), ("front.md", "begins with metadata")):
        ran = run("--base", base, "--out", out, "--card", tmp_path / file)

        assert ran.code == 2
        assert f"--card {tmp_path / file}: {said}" in ran.err


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub(tmp_path, monkeypatch) as server:
        yield server


def test_a_report_is_written_while_converting_to_the_hub_and_from_what_lies_there(
    run: Run, uploads: UploadHub, tiny_base: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--base", tiny_base, "--adapter", tiny_adapter, "--out", "hf://org/merged"]

    made = run(*arguments, "--report", "one.html", "-q")
    uploads.log.clear()
    ran = run("report", "hf://org/merged")
    missed = run(*arguments, "--report", "missed.html", "--max-error", "0.001", "-q")

    assert (made.code, made.err) == (0, "")
    assert (ran.code, ran.out) == (0, "merged-report.html: open it in a browser\n")
    assert not uploads.asked(".safetensors")
    assert missed.code == 4
    for file in ("one.html", "merged-report.html", "missed.html"):
        assert "<title>Conversion report: merged</title>" in (tmp_path / file).read_text()
    assert "a gate is missed" in (tmp_path / "missed.html").read_text()


def test_what_lies_on_the_hub_is_verified_there(
    run: Run, uploads: UploadHub, tiny_base: Path, tiny_adapter: Path
) -> None:
    run("--base", tiny_base, "--adapter", tiny_adapter, "--out", "hf://org/merged", "-q")

    ran = run("verify", "hf://org/merged")

    assert ran.code == 0
    assert ran.out.startswith("hf://org/merged: ")
    assert "convert verify hf://org/merged --base" in ran.out


def test_a_report_of_what_this_tool_did_not_make_is_refused(run: Run, uploads: UploadHub) -> None:
    uploads.commit("org/merged", {"README.md": b"hello"})

    ran = run("report", "hf://org/merged")

    assert ran.code == 2
    assert is_one_line(ran.err)
    assert "hf://org/merged: has no conversion.json, so nothing tells that this tool made it" in ran.err

"""What servers are given: commands that a shell runs, manifests that Kubernetes' schemas take, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from converter import Recipe, convert
from converter.batch.job_file import read_file
from converter.errors import BadOutput, BadRecipe, Unsupported
from converter.export.export import SERVERS, export
from converter.export.served import Serving
from converter.seal.receipt import read_receipt
from tests.cli.conftest import Run
from tests.folders import change_json, copy
from tests.models import save_adapter, save_base

VERSIONS = ("1.30", "1.34", "1.37")
"""Of Kubernetes."""
FORMATS = {"nf4": Recipe(), "w4a16": Recipe(quant_type="w4a16", group_size=32), "bf16": Recipe(quant_type="none")}


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An output of each kind of weights."""
    folder = tmp_path_factory.mktemp("outs")
    base = save_base(folder / "base", "llama")
    adapter = save_adapter(folder / "adapter", base, "llama")
    return {name: convert(base, adapter, folder / name, recipe).out for name, recipe in FORMATS.items()}


def run_script(folder: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    """The words and the environment that a server gets from `serve.sh`, run by a shell."""
    programs = folder / "programs"
    programs.mkdir()
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    for name in ("vllm", "python", "text-generation-launcher", "tritonserver"):
        (programs / name).write_text(f"#!{sys.executable}\n{show}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    script: list[str] = [str(folder / "serve.sh"), *more]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    words, seen = json.loads(ran.stdout)
    return words, seen


SGLANG = ["-m", "sglang.launch_server", "--model-path"]
COMMANDS: dict[tuple[str, str], list[str]] = {
    ("vllm", "nf4"): ["serve", "/models/nf4", "--served-model-name", "nf4"],
    ("vllm", "w4a16"): ["serve", "/models/w4a16", "--served-model-name", "w4a16"],
    ("sglang", "nf4"): [*SGLANG, "/models/nf4", "--served-model-name", "nf4", "--load-format", "bitsandbytes"],
    ("sglang", "bf16"): [*SGLANG, "/models/bf16", "--served-model-name", "bf16"],
    ("tgi", "bf16"): ["--model-id", "/models/bf16"],
    ("triton", "w4a16"): ["--model-repository=model_repository"],
}


@pytest.mark.parametrize(("server", "kind"), COMMANDS)
def test_a_server_is_started_with_these_words_and_downloads_nothing(
    server: str, kind: str, outs: dict[str, Path], tmp_path: Path
) -> None:
    export(outs[kind], server, tmp_path / "x")

    words, seen = run_script(tmp_path / "x", "--port", "9")

    assert words == [*COMMANDS[server, kind], "--port", "9"]
    assert seen["HF_HUB_OFFLINE"] == "1"


def test_a_model_on_the_hub_may_be_downloaded_and_split(outs: dict[str, Path], tmp_path: Path) -> None:
    export(outs["w4a16"], "vllm", tmp_path / "x", Serving("org/name", gpus=2))

    words, seen = run_script(tmp_path / "x")

    assert words == ["serve", "org/name", "--served-model-name", "w4a16", "--tensor-parallel-size", "2"]
    assert "HF_HUB_OFFLINE" not in seen


@pytest.mark.parametrize(
    ("server", "kind", "packages"),
    [
        ("vllm", "nf4", ["vllm==0.32.0", "vllm-bnb-plugin==0.0.3"]),
        ("vllm", "w4a16", ["vllm==0.32.0"]),
        ("sglang", "bf16", ["sglang==0.5.23"]),
        ("triton", "nf4", ["vllm-bnb-plugin==0.0.3"]),
    ],
)
def test_the_packages_of_a_server_are_those_that_take_these_weights(
    server: str, kind: str, packages: list[str], outs: dict[str, Path], tmp_path: Path
) -> None:
    export(outs[kind], server, tmp_path / "x")

    assert (tmp_path / "x" / "requirements.txt").read_text().split() == packages


def test_triton_gets_a_model_repository_for_its_vllm_backend(outs: dict[str, Path], tmp_path: Path) -> None:
    export(outs["w4a16"], "triton", tmp_path / "x", Serving(gpus=2))

    repository = tmp_path / "x" / "model_repository" / "w4a16"
    engine = json.loads((repository / "1" / "model.json").read_text())
    assert (engine["model"], engine["tensor_parallel_size"]) == ("/models/w4a16", 2)
    assert 'backend: "vllm"' in (repository / "config.pbtxt").read_text()


def documents(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((folder / "kubernetes" / name).read_text()))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("serving", [Serving(), Serving("org/name", gpus=2)], ids=["a path", "an id"])
def test_the_manifests_are_what_kubernetes_takes(
    serving: Serving, version: str, outs: dict[str, Path], tmp_path: Path
) -> None:
    export(outs["w4a16"], "vllm", tmp_path / "x", serving)

    found = documents(tmp_path / "x", "serve.yaml") + documents(tmp_path / "x", "convert.yaml")
    assert [one["kind"] for one in found] == ["Deployment", "Service", "PersistentVolumeClaim", "ConfigMap", "Job"]
    for one in found:
        kubernetes_validate.validate(one, version, strict=True)


def test_a_manifest_with_a_misspelled_name_is_found(outs: dict[str, Path], tmp_path: Path) -> None:
    export(outs["w4a16"], "vllm", tmp_path / "x")
    deployment = documents(tmp_path / "x", "serve.yaml")[0]
    deployment["spec"]["strategey"] = deployment["spec"].pop("strategy")

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_a_new_version_is_rolled_out_and_the_same_one_is_not(outs: dict[str, Path], tmp_path: Path) -> None:
    export(outs["w4a16"], "vllm", tmp_path / "one")
    export(outs["w4a16"], "vllm", tmp_path / "two")
    other = copy(outs["w4a16"], tmp_path / "w4a16")
    change_json(other / "conversion.json", fingerprint="another")
    export(other, "vllm", tmp_path / "three")

    one, two, three = (documents(tmp_path / name, "serve.yaml")[0]["spec"] for name in ("one", "two", "three"))
    assert one == two
    assert one["template"] != three["template"]
    assert one["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert one["selector"]["matchLabels"].items() <= one["template"]["metadata"]["labels"].items()


def test_no_container_is_root_and_none_writes_to_its_image(outs: dict[str, Path], tmp_path: Path) -> None:
    export(outs["nf4"], "vllm", tmp_path / "x")

    for name in ("serve.yaml", "convert.yaml"):
        for one in documents(tmp_path / "x", name):
            if one["kind"] in ("Deployment", "Job"):
                pod = one["spec"]["template"]["spec"]
                (container,) = pod["containers"]
                assert pod["securityContext"]["runAsNonRoot"]
                assert container["securityContext"]["readOnlyRootFilesystem"]
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_job_that_converts_has_the_recipe_of_the_receipt(outs: dict[str, Path], tmp_path: Path) -> None:
    out = copy(outs["w4a16"], tmp_path / "w4a16")
    receipt = json.loads((out / "conversion.json").read_text())
    named = {"base_name": "org/base", "base_commit": "b" * 40, "adapter_name": "org/lora", "adapter_commit": "a" * 40}
    change_json(out / "conversion.json", origin=receipt["origin"] | named)
    export(out, "vllm", tmp_path / "x")

    _, config_map, job = documents(tmp_path / "x", "convert.yaml")
    (tmp_path / "job.json").write_text(config_map["data"]["job.json"])
    ((asked, _, _),) = read_file(tmp_path / "job.json", stores=True)

    assert asked.recipe == Recipe.from_json(receipt["recipe"])
    assert (asked.base, asked.base_revision) == ("org/base", "b" * 40)
    assert (asked.adapter, asked.adapter_revision) == ("org/lora", "a" * 40)
    assert asked.out == Path("/models/w4a16")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["pipeline", "/job/job.json"]
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 4]


def test_what_no_receipt_describes_gets_no_job(outs: dict[str, Path], tmp_path: Path) -> None:
    out = copy(outs["w4a16"], tmp_path / "7b")
    (out / "conversion.json").unlink()

    names = export(out, "vllm", tmp_path / "x")

    assert read_receipt(out) is None
    assert "kubernetes/convert.yaml" not in names
    deployment, service = documents(tmp_path / "x", "serve.yaml")
    assert service["metadata"]["name"] == "model-7b", "a service's name begins with a letter"
    kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


REFUSED = {
    ("tgi", "nf4"): "TGI loads no weights that bitsandbytes has quantized",
    ("tgi", "w4a16"): "TGI documents no weights of compressed-tensors",
}


@pytest.mark.parametrize(("server", "kind"), REFUSED)
def test_what_a_server_does_not_take_is_refused_with_what_helps(
    server: str, kind: str, outs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=REFUSED[server, kind]) as refused:
        export(outs[kind], server, tmp_path / "x")

    assert "convert with `quant_type` none" in str(refused.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("server", ["vllm", "sglang", "triton"])
def test_bitsandbytes_weights_are_not_split_among_gpus(server: str, outs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"splits no bitsandbytes weights among GPUs: take `gpus` 1, or convert with"):
        export(outs["nf4"], server, tmp_path / "x", Serving(gpus=2))


@pytest.mark.parametrize("server", ["vllm", "sglang", "triton"])
def test_a_class_that_a_server_does_not_have_is_refused_by_its_rules(
    server: str, outs: dict[str, Path], tmp_path: Path
) -> None:
    out = copy(outs["w4a16"], tmp_path / "other")
    change_json(out / "config.json", architectures=["LlamaForTokenClassification"])

    with pytest.raises(Unsupported, match=r"does not take it: .*; convert with `quant_type` w4a16 or none"):
        export(out, server, tmp_path / "x")


def test_a_folder_that_holds_something_is_left_alone(outs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("1")

    with pytest.raises(BadOutput, match="exists and is not empty; choose another folder, or remove it"):
        export(outs["bf16"], "vllm", tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("model", ["--trust-remote-code", "a b", "a\nb"])
def test_a_model_that_would_be_read_as_something_else_is_refused(model: str) -> None:
    with pytest.raises(BadRecipe, match="expected a text without spaces"):
        Serving(model)


@pytest.mark.parametrize("server", SERVERS)
def test_the_command_writes_beside_out_and_lists_what_it_wrote(server: str, run: Run, outs: dict[str, Path]) -> None:
    ran = run("export", outs["bf16"], "--server", server)

    folder = outs["bf16"].with_name(f"bf16-{server}")
    assert (ran.code, ran.err) == (0, "")
    assert {*ran.out.split()} == {str(path) for path in folder.rglob("*") if path.is_file()}


def test_the_command_says_why_a_server_can_not_serve_it(run: Run, outs: dict[str, Path], tmp_path: Path) -> None:
    ran = run("export", outs["nf4"], "--server", "vllm", "--gpus", "2", "--out", tmp_path / "x")

    assert ran.code == 2
    assert "take --gpus 1, or convert with --format w4a16" in ran.err

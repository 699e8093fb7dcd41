"""Models of a real MLflow server as base, adapter and OUT. `make mlflow` installs what these tests need."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from converter import Gates, convert, plan_conversion, verify
from converter.errors import GateFailed, StoreRefused
from converter.seal.receipt import RECEIPT
from converter.write.stores.reading import small_file
from tests.bucket_proxy import Proxy
from tests.conftest import REPOSITORY
from tests.delivery.scenes import delivered, job_file
from tests.folders import contents
from tests.limits import HANG
from tests.mlflow_server import TOKEN, MlflowServer, mlflow_server
from tests.write.stores.settings import ONE_THREAD, SMALL_SHARDS

pytestmark = pytest.mark.mlflow


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.fixture
def server(real: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MlflowServer:
    """The server, found by the environment, and a cache of the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", real.url)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return real


@pytest.fixture(scope="module")
def registered(real: MlflowServer, inputs: tuple[Path, Path]) -> tuple[str, str]:
    """Base and adapter of `inputs`, registered; the second version of the base is the right one."""
    base, adapter = inputs
    real.register("base", adapter)
    real.register("base", base)
    real.client.set_registered_model_alias("base", "champion", "2")
    real.register("lora", adapter, inside="")
    return "base", "lora"


def left_in_cache(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name == "reading"]


@pytest.mark.parametrize("base", ["models:/base/2", "models:/base@champion"])
def test_a_registered_base_and_adapter_give_the_bytes_of_those_in_folders(
    base: str,
    server: MlflowServer,
    registered: tuple[str, str],
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    report = convert(base, "models:/lora/1", tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert contents(report.out) == whole
    assert left_in_cache(tmp_path) == []
    assert verify(report.out, base=base, adapter="models:/lora/1").is_good


def test_a_version_or_alias_that_is_not_there_is_refused_by_name(
    server: MlflowServer, registered: tuple[str, str], tmp_path: Path
) -> None:
    for place, said in [
        ("models:/base/9", r"models:/base/9: .*check the name, and MLFLOW_TRACKING_URI"),
        ("models:/base@nobody", r"models:/base@nobody: .*check the name"),
        ("models:/other/1", r"models:/other/1: .*check the name"),
        ("models:/base", r"models:/base: which version\? give models:/base/VERSION or models:/base@ALIAS"),
    ]:
        with pytest.raises(StoreRefused, match=said) as refused:
            convert(place, "models:/lora/1", tmp_path / "out")
        assert TOKEN not in str(refused.value)


def test_what_a_flavor_of_mlflow_has_put_into_a_folder_is_found(
    server: MlflowServer, inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    logged = tmp_path / "logged"
    shutil.copytree(inputs[1], logged / "peft")
    (logged / "MLmodel").write_text("flavors: {}\n")
    server.register("flavored", logged)

    report = convert(inputs[0], "models:/flavored/1", tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert contents(report.out) == whole


# Out


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model of the test's own."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


def files_of(server: MlflowServer, version: Any, folder: Path) -> dict[str, bytes]:
    """What a reader gets of a version, by MLflow's own client."""
    return contents(Path(server.client.download_artifacts(version.run_id, "model", str(folder))))


def runs_of(server: MlflowServer, name: str) -> list[Any]:
    client = server.client
    experiment = client.get_experiment_by_name("nf4-converter")
    found = [] if experiment is None else client.search_runs([experiment.experiment_id])
    return [run for run in found if run.data.tags.get("nf4_converter.model") == name]


def alias_of(server: MlflowServer, name: str) -> dict[str, str]:
    models = server.client.search_registered_models(f"name='{name}'")
    return dict(models[0].aliases) if models else {}


def test_a_conversion_becomes_a_version_with_its_files_tags_figures_and_report(
    inputs: tuple[Path, Path], whole: dict[str, bytes], server: MlflowServer, name: str, tmp_path: Path
) -> None:
    out, work = f"models:/{name}@champion", tmp_path / "work"

    report = convert(*inputs, out, SMALL_SHARDS, ONE_THREAD, work=work, gates=Gates(max_error=0.5))

    (version,) = server.versions(name)
    assert files_of(server, version, tmp_path) == whole
    assert alias_of(server, name) == {"champion": version.version}
    assert report.store is not None
    assert report.store.seen_at == f"{server.url}/#/models/{name}/versions/1"
    assert version.tags["fingerprint"] == report.fingerprint
    assert version.tags["format"] == "nf4"
    (run,) = runs_of(server, name)
    assert run.info.status == "FINISHED"
    assert run.data.tags["fingerprint"] == report.fingerprint
    assert run.data.metrics["gates.max_error"] == 0.5
    assert 0 < run.data.metrics["relative_error.mean"] < run.data.metrics["relative_error.worst"] < 0.5
    assert 0 < run.data.metrics["survival.mean"] <= 1
    page = Path(server.client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))).read_text("utf-8")
    assert name in page
    assert small_file(out, RECEIPT) == whole[RECEIPT]
    assert TOKEN not in page + str(run.data.tags) + str(version.tags)
    assert not any(TOKEN.encode() in raw for raw in whole.values())

    again = convert(*inputs, out, SMALL_SHARDS, ONE_THREAD, work=work)

    assert again.nothing_to_do
    assert plan_conversion(*inputs, f"models:/{name}", SMALL_SHARDS).nothing_to_do
    assert len(server.versions(name)) == len(runs_of(server, name)) == 1
    assert verify(out, base=inputs[0], adapter=inputs[1], require_receipt=True).is_good
    with pytest.raises(StoreRefused, match=r"a version can't be replaced: give models:/.*, which gets a new one"):
        plan_conversion(*inputs, f"models:/{name}/1")


def test_what_was_registered_is_a_base_again(
    inputs: tuple[Path, Path], server: MlflowServer, name: str, tmp_path: Path
) -> None:
    here = convert(*inputs, tmp_path / name, SMALL_SHARDS, ONE_THREAD).out
    convert(*inputs, f"models:/{name}", SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    from_folder = convert(here, inputs[1], tmp_path / "from_folder", SMALL_SHARDS, ONE_THREAD)
    from_registry = convert(f"models:/{name}/1", inputs[1], tmp_path / "from_registry", SMALL_SHARDS, ONE_THREAD)

    assert contents(from_registry.out) == contents(from_folder.out)


def test_a_missed_gate_registers_nothing_and_a_weaker_one_needs_no_second_upload(
    inputs: tuple[Path, Path], whole: dict[str, bytes], server: MlflowServer, name: str, tmp_path: Path
) -> None:
    out, work = f"models:/{name}@champion", tmp_path / "work"

    with pytest.raises(GateFailed) as failed:
        convert(*inputs, out, SMALL_SHARDS, ONE_THREAD, work=work, gates=Gates(max_error=0.01))

    assert failed.value.exit_code == 4
    assert (server.versions(name), alias_of(server, name)) == ([], {})

    with Proxy(server.url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        convert(*inputs, out, SMALL_SHARDS, ONE_THREAD, work=work, gates=Gates(max_error=0.5))

    assert not [path for method, path in proxy.log if method == "PUT" and path.endswith(".safetensors")]
    (version,) = server.versions(name)
    assert files_of(server, version, tmp_path) == whole
    assert len(runs_of(server, name)) == 1


@pytest.mark.parametrize(
    "at", ["/model-00002-of-00004.safetensors", "/config.json", "/model-versions/create", "/registered-models/alias"]
)
def test_a_killed_run_shows_nothing_and_the_next_one_makes_one_version(
    at: str, inputs: tuple[Path, Path], whole: dict[str, bytes], server: MlflowServer, name: str, tmp_path: Path
) -> None:
    base, adapter = map(str, inputs)
    out, work = f"models:/{name}@champion", str(tmp_path / "work")
    arguments = ["--base", base, "--adapter", adapter, "--out", out, "--work", work, "--max-shard-size", "1MB"]
    with Proxy(server.url) as proxy:
        environment = os.environ | {"MLFLOW_TRACKING_URI": proxy.url}
        command = [sys.executable, "-m", "converter", *arguments, "--threads", "1"]
        killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=REPOSITORY)

        def before(method: str, path: str) -> str | None:
            if method in ("PUT", "POST") and path.partition("?")[0].endswith(at):
                killed.send_signal(signal.SIGKILL)
                return "drop"
            return None

        proxy.before = before
        assert killed.wait(HANG) == -signal.SIGKILL
    assert alias_of(server, name) == {}
    assert len(server.versions(name)) == (at == "/registered-models/alias")

    convert(*inputs, out, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    (version,) = server.versions(name)
    assert files_of(server, version, tmp_path) == whole
    assert alias_of(server, name) == {"champion": version.version}
    assert [run.info.run_id for run in runs_of(server, name)] == [version.run_id]


def test_a_pipeline_registers_what_passed_with_its_evaluation_and_nothing_else(
    server: MlflowServer, name: str, tmp_path: Path
) -> None:
    out, evaluate = f"models:/{name}@champion", {"text": "text.txt", "window": 32}

    failed = delivered(job_file(tmp_path, out, evaluate=evaluate | {"max_kl": 1e-9}), tmp_path / "work")

    assert (failed.code, failed.steps[-1]) == (4, ("gates", "failed"))
    assert (server.versions(name), alias_of(server, name), runs_of(server, name)) == ([], {}, [])

    file = job_file(tmp_path, out, evaluate=evaluate | {"max_kl": 5.0})
    ran = delivered(file, tmp_path / "work")

    assert (ran.code, ran.steps[-1]) == (0, ("announce", "done"))
    (version,) = server.versions(name)
    metrics = runs_of(server, name)[0].data.metrics
    assert metrics["gates.max_kl"] == 5.0
    assert [key for key in metrics if key.startswith("evaluation.perplexity")]
    assert alias_of(server, name) == {"champion": version.version}

    again = delivered(file, tmp_path / "work")

    assert (again.code, again.steps) == (0, [("announce", "skipped")])
    assert len(server.versions(name)) == 1


def test_no_message_has_the_login(inputs: tuple[Path, Path], server: MlflowServer, tmp_path: Path) -> None:
    login = {"MLFLOW_TRACKING_URI": "http://user:password-of-the-tests@127.0.0.1:9", "MLFLOW_TRACKING_TOKEN": TOKEN}
    command = [sys.executable, "-m", "converter", "--base", inputs[0], "--adapter", inputs[1], "--out", "models:/x"]

    ran = subprocess.run(command, env=os.environ | login, capture_output=True, text=True, cwd=REPOSITORY, check=False)

    assert ran.returncode == 1
    assert "models:/x: " in ran.stderr
    assert "check the connection, MLFLOW_TRACKING_URI, and the server" in " ".join(ran.stderr.split())
    assert "password-of-the-tests" not in ran.stderr + ran.stdout
    assert TOKEN not in ran.stderr + ran.stdout

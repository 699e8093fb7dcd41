"""Models of a real MLflow server as base, adapter and OUT. `make mlflow` installs what these tests need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter import convert, verify
from converter.errors import StoreRefused
from tests.folders import contents
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
    assert verify(report.out, base=base, adapter="models:/lora/1").ok


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

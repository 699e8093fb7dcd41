"""models:/NAME as base, adapter and OUT: what is refused before a server is asked."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from converter import plan_conversion
from converter.errors import ConversionRefused, HubOffline, StoreRefused
from converter.read.addresses import is_address, is_registered, name_in, parts_of, path_of
from converter.read.registry.folder import Named, named, open_version
from converter.read.registry.server import Server

SECRET = "a-password-of-the-tests"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("models:/lora/3", Named("lora", 3, None)),
        ("models:/llama-3.1 8B@champion", Named("llama-3.1 8B", None, "champion")),
        ("models:/lora", Named("lora", None, None)),
        ("Models://lora/12/", Named("lora", 12, None)),
    ],
)
def test_an_address_names_a_model_and_a_version_or_an_alias(address: str, parts: Named) -> None:
    assert named(address) == parts
    assert is_address(address)
    assert is_registered(address)
    assert path_of(address) is None
    assert parts_of(address)[0] == "models"
    assert name_in(address) == parts.name


@pytest.mark.parametrize("address", ["models:/", "models:/a/b/3", "models:/a/latest", "models:/a'b/3", "models:/a@"])
def test_an_address_that_is_none_says_how_one_looks(address: str) -> None:
    with pytest.raises(StoreRefused, match="give models:/NAME/VERSION or models:/NAME@ALIAS, or models:/NAME as OUT"):
        named(address)


def test_an_address_with_settings_is_refused_and_not_repeated() -> None:
    with pytest.raises(StoreRefused, match="an address holds no key and no settings") as refused:
        named(f"models:/lora/3?token={SECRET}")

    assert SECRET not in str(refused.value)


def test_a_folder_of_that_name_is_still_a_folder() -> None:
    assert path_of("models/lora/3") == Path("models/lora/3")
    assert path_of("models") == Path("models")


def test_without_a_server_the_address_says_what_to_set(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(StoreRefused, match=r"models:/lora/1: which server\? set MLFLOW_TRACKING_URI"):
        plan_conversion(inputs[0], "models:/lora/1", tmp_path / "out")


@pytest.mark.parametrize("uri", [f"sqlite:///{SECRET}.db", f"databricks://{SECRET}", SECRET])
def test_only_servers_are_asked_and_the_setting_is_not_repeated(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    with pytest.raises(StoreRefused, match="MLFLOW_TRACKING_URI is no http:// or https:// address") as refused:
        Server("models:/lora/1")

    assert SECRET not in str(refused.value)


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed here")
def test_without_the_library_the_address_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://user:{SECRET}@127.0.0.1:1")

    with pytest.raises(StoreRefused, match=r"pip install 'nf4-converter\[mlflow\]'") as refused:
        Server("models:/lora/1")

    assert SECRET not in str(refused.value)
    assert "mlflow" not in sys.modules


def test_offline_asks_no_registry() -> None:
    with pytest.raises(HubOffline, match="models:/lora/1: `offline` asks no registry; give a folder"):
        open_version("models:/lora/1", offline=True)


def test_a_revision_beside_the_address_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionRefused, match="models:/lora/1: the address has the version: leave the revision out"):
        plan_conversion(inputs[0], "models:/lora/1", tmp_path / "out", adapter_revision="main")

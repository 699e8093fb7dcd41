"""`examine`: what is looked at, and what is said to be wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from converter.health import (
    RECIPE,
    Finding,
    examine,
    of_comparison,
    of_disk,
    of_folder,
    of_kernels,
    of_login,
    of_versions,
    quantized_by,
    sample,
)
from converter.quantize.formats import format_of
from converter.read.hub.login import Login, login
from tests.hub_server import StandInHub

TOKEN = "hf_abcdefghijklmnop"


def installed(**versions: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return version


def versions_found(required: list[str], **versions: str) -> list[Finding]:
    return list(of_versions(required, installed(**versions)))[1:]


def test_versions_that_are_missing_or_too_old_or_too_new_are_wrong_and_say_how_to_get_the_right_ones() -> None:
    required = ["good>=1", "old>=2.5", "new>=1,<2", "missing>=3"]

    good, old, new, missing = versions_found(required, good="1.0", old="2.4", new="2.0")

    assert good == Finding("good", "good", "1.0")
    assert old == Finding("old", "wrong", "2.4, >=2.5 is needed", "pip install 'old>=2.5'")
    assert (new.state, new.step) == ("wrong", "pip install 'new<2,>=1'")
    assert missing == Finding("missing", "wrong", "not installed, >=3 is needed", "pip install 'missing>=3'")


def test_of_an_extra_only_a_wrong_version_is_noted() -> None:
    required = ["ray>=2; extra == 'ray'", "peft>=1; extra == 'peft'", "ruff; extra == 'dev'"]

    assert versions_found(required, peft="0.5", ruff="1") == [
        Finding("peft", "note", "0.5, >=1 is needed", "pip install 'peft>=1'")
    ]


def test_a_build_of_a_version_is_that_version() -> None:
    assert versions_found(["torch>=2.13"], torch="2.13.0+cpu")[0].state == "good"


def test_a_device_that_gives_other_bytes_is_wrong() -> None:
    assert of_comparison("cuda:0", "a card", b"same", b"same").state == "good"
    wrong = of_comparison("cuda:0", "a card", b"same", b"sane")

    assert wrong.state == "wrong"
    assert "other bytes than the processor" in wrong.found
    assert "`device` cpu" in wrong.step


def test_the_bytes_that_are_compared_are_those_of_the_whole_weight_and_its_scales() -> None:
    encoder = format_of(RECIPE).encoder(torch.device("cpu"), kernels=False)
    weight = sample()
    changed = weight.clone()
    changed[-1, -64:] *= 2  # one block: its codes stay, its scale doesn't

    raw = quantized_by(encoder, weight)

    assert len(raw) == weight.numel() // 2 + 4 * weight.numel() // 64
    assert raw == quantized_by(encoder, weight)
    assert raw != quantized_by(encoder, changed)


def test_the_kernels_are_held_against_bitsandbytes() -> None:
    found = of_kernels()

    assert found.state == "good"
    assert "the bytes of bitsandbytes" in found.found


def test_a_folder_that_can_not_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert of_folder("cache", tmp_path / "new" / "deeper", "a step").state == "good"
    assert of_folder("cache", tmp_path / "file" / "below", "a step") == Finding(
        "cache", "wrong", f"{tmp_path}/file/below: can't be written", "a step"
    )


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = of_disk(tmp_path)

    assert found.state in ("good", "note")
    assert "writes " in found.found
    assert list(tmp_path.iterdir()) == []
    assert of_disk(tmp_path / "missing").state == "wrong"


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandInHub:
    hub = StandInHub({})
    hub.use(monkeypatch, tmp_path / "hub")
    hub.tokens = {TOKEN}
    return hub


def test_without_a_token_the_hub_is_not_asked(hub: StandInHub) -> None:
    with hub:
        found = of_login(login())

    assert (found.state, found.step) == ("note", "for gated models: `hf auth login`")
    assert hub.log == []


def test_a_token_is_told_by_its_owner_and_never_shown(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    with hub:
        found = of_login(login())

    assert found == Finding("Hub", "good", f"{hub.url}: logged in as somebody")


def test_a_token_that_the_hub_does_not_know_is_wrong_and_never_shown(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotherone")

    with hub:
        found = of_login(login())

    assert found.state == "wrong"
    assert "hf auth login" in found.step
    assert "anotherone" not in str(found)


def test_offline_nobody_is_asked_whose_a_token_is(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    with hub:
        known = login(offline=True)

    assert known == Login(hub.url, known.cache, True)
    assert of_login(known).state == "note"
    assert hub.log == []


def test_everything_is_examined(tmp_path: Path) -> None:
    names = {finding.what for finding in examine(tmp_path, offline=True)}

    assert names >= {"Python", "torch", "processors", "kernels", "cache", "Hub cache", "disk", "Hub"}
    assert names & {"GPU", "cuda:0"}

"""A pipeline to a repository on the Hub: a stand-in that speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from converter import convert
from tests.delivery.scenes import ADAPTER, BASE, ONE_THREAD, delivered, job_file
from tests.folders import contents
from tests.hub_uploads import UploadHub, upload_hub

NOTHING = [("announce", "skipped")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(convert(BASE, ADAPTER, tmp_path_factory.mktemp("whole") / "out").out)


def test_what_passed_is_one_commit_and_a_second_run_makes_none(
    hub: UploadHub, whole: dict[str, bytes], tmp_path: Path
) -> None:
    file = job_file(tmp_path, "hf://org/merged", announce={"command": ["tee", "heard.json"]})

    ran = delivered(file, tmp_path / "work")

    assert ran.code == 0
    assert {name: raw for name, raw in hub.files("org/merged").items() if name != ".gitattributes"} == whole
    assert len(hub.commits) == 1
    assert f'"seen_at": "{hub.url}/org/merged/tree/' in (tmp_path / "heard.json").read_text()
    assert delivered(file, tmp_path / "work").steps == NOTHING
    assert len(hub.commits) == 1


def test_a_missed_gate_makes_no_repository(hub: UploadHub, tmp_path: Path) -> None:
    assert delivered(job_file(tmp_path, "hf://org/merged", max_error=0.01), tmp_path / "work").code == 4

    assert (hub.made, hub.commits, hub.stored) == ([], [], {})


def test_a_pull_request_is_opened_once(hub: UploadHub, whole: dict[str, bytes], tmp_path: Path) -> None:
    hub.commit("org/merged", {"README.md": b"hello"})
    file, options = job_file(tmp_path, "hf://org/merged"), replace(ONE_THREAD, create_pr=True)

    assert delivered(file, tmp_path / "work", options).code == 0
    again = delivered(file, tmp_path / "work", options)

    assert (again.code, again.steps) == (0, NOTHING)
    assert hub.files("org/merged", "refs/pr/1") == whole
    assert hub.files("org/merged") == {"README.md": b"hello"}
    assert len(hub.commits) == 1

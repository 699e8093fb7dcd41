"""Files that come from the Hub one after the other, into a folder of their own or into the Hub's cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from converter.errors import HubNotFound, WriteFailed
from converter.read.arrivals import Arrivals, held_bytes
from converter.read.hub.folder import HubFolder
from tests.hub_server import StandInHub
from tests.read.test_hub import REPO, SHARD_BYTES, SHARDS, write_base

FILE_BYTES = SHARD_BYTES + 100  # with a header, or less


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub({REPO: write_base(tmp_path / "base")}) as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def test_what_an_earlier_run_brought_and_is_needed_first_stays_and_all_else_goes(
    hub: StandInHub, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    HubFolder(REPO).fetch(SHARDS, place=place)
    unfinished = place / ".cache" / "huggingface" / "download" / "abc.incomplete"
    unfinished.write_bytes(b"half")
    (place / "other.safetensors").write_bytes(b"of another run")
    hub.log.clear()

    with closing(Arrivals(HubFolder(REPO), SHARDS, place, FILE_BYTES)) as arrivals:
        stated = arrivals.wait(SHARDS[0])
        there = {path.name for path in place.iterdir()}
        arrivals.release(SHARDS[0])
        arrivals.wait(SHARDS[1])

    assert stated is not None
    assert there == {SHARDS[0], ".cache"}
    assert not unfinished.exists()
    assert [request.path.rpartition("/")[2] for request in hub.asked("/resolve/") if request.method == "HEAD"] == [
        SHARDS[1]
    ]


def test_a_link_in_the_place_of_the_folder_is_not_followed(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work").write_text("of somebody")
    (tmp_path / "place").symlink_to(tmp_path / "mine")

    with closing(Arrivals(HubFolder(REPO), SHARDS[:1], tmp_path / "place", FILE_BYTES)) as arrivals:
        arrivals.wait(SHARDS[0])

    assert (tmp_path / "mine" / "work").read_text() == "of somebody"
    assert not (tmp_path / "place").is_symlink()


def test_what_the_cache_had_and_has_no_more_is_no_reason_to_wait_for_ever(hub: StandInHub, tmp_path: Path) -> None:
    folder = HubFolder(REPO)
    snapshot = folder.fetch(SHARDS).path
    room = sum(held_bytes(folder, name) for name in SHARDS)
    assert room == 0
    shutil.rmtree(snapshot)

    with (
        closing(Arrivals(folder, SHARDS, tmp_path / "place", room)) as arrivals,
        pytest.raises(WriteFailed, match=f"`disk` has no room for .* of {SHARDS[0]}, which the Hub's cache had"),
    ):
        arrivals.wait(SHARDS[0])


def test_what_fails_is_told_to_whoever_waits_for_that_file_and_to_nobody_before(
    hub: StandInHub, tmp_path: Path
) -> None:
    folder = HubFolder(REPO)
    folder.fetch(["config.json"])
    (tmp_path / "base" / SHARDS[1]).unlink()
    with closing(Arrivals(folder, SHARDS)) as arrivals:
        arrivals.wait(SHARDS[0])
        with pytest.raises(HubNotFound, match=SHARDS[1]):
            arrivals.wait(SHARDS[1])


def test_in_the_cache_a_file_that_is_released_stays(hub: StandInHub, tmp_path: Path) -> None:
    folder = HubFolder(REPO)
    folder.fetch(["config.json"])
    with closing(Arrivals(folder, SHARDS)) as arrivals:
        for name in SHARDS:
            arrivals.wait(name)
            arrivals.release(name)
        arrivals.remove()
        assert {path.name for path in arrivals.folder.path.iterdir()} == {"config.json", *SHARDS}

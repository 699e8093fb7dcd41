"""Bases and adapters from the Hub, against a stand-in for it."""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from converter.errors import (
    BadCheckpoint,
    HubFailed,
    HubGated,
    HubNotFound,
    HubOffline,
    HubRefused,
    InputChanged,
    WriteFailed,
)
from converter.read.beginning import HEAD_BYTES
from converter.read.checkpoint import INDEX, Checkpoint
from converter.read.folder import read_bytes
from converter.read.header import read_header
from converter.read.hub.answers import checking
from converter.read.hub.folder import HubFolder, is_hub_id
from tests.hub_server import MOST, StandInHub, git_sha1, sha256

REPO = "maker/base"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD_BYTES = 1_000_000
TOKEN = "hf_ThisIsNotForYourEyes"


def write_shard(path: Path, name: str, fill: bytes = b"\1") -> None:
    header = json.dumps({name: {"dtype": "U8", "shape": [SHARD_BYTES], "data_offsets": [0, SHARD_BYTES]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + fill * SHARD_BYTES)


def write_base(folder: Path, fill: bytes = b"\1") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {f"tensor.{number}": shard for number, shard in enumerate(SHARDS)}
    for name, shard in weight_map.items():
        write_shard(folder / shard, name, fill)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "README.md").write_text("A base.\n")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub({REPO: base}) as server:
        server.use(monkeypatch, cache)
        yield server


def read(folder: HubFolder, name: str, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    folder.read_into(name, offset, memoryview(buffer))
    return bytes(buffer)


# Which references mean the Hub


@pytest.mark.parametrize("reference", ["gpt2", "maker/base", "Qwen/Qwen2.5-0.5B", "a/b_c-1.0"])
def test_a_name_or_an_organization_and_a_name_mean_the_hub(reference: str) -> None:
    assert is_hub_id(reference)


@pytest.mark.parametrize(
    "reference",
    [
        "",
        ".",
        "./maker/base",
        "../base",
        "/maker/base",
        "~/base",
        "a/b/c",
        "maker/",
        "/",
        "a--b",
        "a..b",
        "x.git",
        "maker/b ase",
        "maker/base\n",
        "-x/y",
        "x/y-",
        "bäse",
        "a" * 97,
        "https://example.org/a",
    ],
)
def test_anything_else_means_a_path(reference: str) -> None:
    assert not is_hub_id(reference)


def test_a_path_that_exists_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker").mkdir()
    (tmp_path / "maker" / "base").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")

    assert not is_hub_id("maker/base")
    assert not is_hub_id("dangling")
    assert is_hub_id("maker/other")


def test_the_hub_library_is_not_imported_before_a_repository_is_opened() -> None:
    check = "import sys, converter.read.hub.folder as h; h.is_hub_id('a/b'); sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# Reading in pieces


def test_a_dry_run_reads_headers_by_range_and_downloads_no_shard(hub: StandInHub, cache: Path) -> None:
    with Checkpoint(HubFolder(REPO)) as checkpoint:
        assert checkpoint.shards == SHARDS
        assert sorted(checkpoint.tensors) == ["tensor.0", "tensor.1"]

    # The listing, config.json, the index, and one range for the header of each shard.
    assert [request.method for request in hub.log] == ["GET"] * 5
    ranges = [request.range for request in hub.asked(".safetensors") if INDEX not in request.path]
    assert ranges == [f"bytes=0-{HEAD_BYTES - 1}"] * len(SHARDS)
    assert hub.sent < len(SHARDS) * HEAD_BYTES + 5_000
    assert not cache.exists()


def test_a_header_longer_than_what_is_read_ahead_costs_one_more_request(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    path = tmp_path / "long" / "model.safetensors"
    entry = {"dtype": "U8", "shape": [1_000], "data_offsets": [0, 0]}
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2_000)]
    entries = {name: entry | {"data_offsets": [1_000 * at, 1_000 * at + 1_000]} for at, name in enumerate(names)}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1_000 * len(names)))
    hub.push("maker/long", tmp_path / "long")
    assert len(header) > HEAD_BYTES

    assert len(read_header(HubFolder("maker/long"), path.name)) == 2_000

    ranges = [request.range for request in hub.asked(path.name)]
    assert ranges == [f"bytes=0-{HEAD_BYTES - 1}", f"bytes={HEAD_BYTES}-{len(header) + 7}"]


def test_a_piece_beyond_the_beginning_is_one_range_of_just_its_bytes(hub: StandInHub, base: Path) -> None:
    folder = HubFolder(REPO)
    assert read(folder, SHARDS[0], 500_000, 100) == (base / SHARDS[0]).read_bytes()[500_000:500_100]

    (request,) = hub.asked(SHARDS[0])
    assert (request.range, request.sent) == ("bytes=500000-500099", 100)


def test_a_whole_file_is_the_bytes_of_the_repository(hub: StandInHub, base: Path) -> None:
    folder = HubFolder(REPO)
    for name in ("config.json", SHARDS[1]):
        assert read_bytes(folder, name, limit=10**7) == (base / name).read_bytes()
    assert read(folder, "config.json", 5, 0) == b""


def test_sizes_digests_and_names_are_those_of_the_files_at_the_root(hub: StandInHub, base: Path) -> None:
    folder = HubFolder(REPO)

    assert folder.names() == {"config.json", INDEX, "README.md", *SHARDS}
    assert folder.size(SHARDS[0]) == (base / SHARDS[0]).stat().st_size
    assert folder.digest(SHARDS[0]) == f"sha256:{sha256(base / SHARDS[0])}"
    assert folder.digest("config.json") == f"git-sha1:{git_sha1(base / 'config.json')}"


def test_reading_past_the_end_asks_nothing_of_the_server(hub: StandInHub) -> None:
    folder = HubFolder(REPO)
    with pytest.raises(InputChanged, match="ends at byte"):
        read(folder, "config.json", 20, 100)
    assert len(hub.log) == 1


def test_a_server_that_ignores_ranges_is_refused_without_reading_on(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    with (tmp_path / "big" / "model.safetensors").open("wb") as file:
        file.truncate(64_000_000)
    hub.push("maker/big", tmp_path / "big")
    hub.ignores_range = True

    with pytest.raises(HubFailed, match=r"model\.safetensors: .*status 200, expected 206.*HF_ENDPOINT"):
        read_header(HubFolder("maker/big"), "model.safetensors")

    (request,) = hub.asked("model.safetensors")
    assert request.sent < 32_000_000  # what the buffers between the two took in


def test_an_answer_for_another_range_is_refused(hub: StandInHub) -> None:
    folder = HubFolder(REPO)
    hub.failures, hub.failing_status = 1, 206
    with pytest.raises(HubFailed, match=rf"{SHARDS[0]}: the server sent '', asked for 'bytes=0-131071'"):
        read(folder, SHARDS[0], 0, 8)


@pytest.mark.parametrize(("text", "found"), [("{}", "sent 2 bytes, expected 23"), (" " * 99, "sent more than 23")])
def test_a_file_of_another_length_than_listed_is_refused(hub: StandInHub, base: Path, text: str, found: str) -> None:
    folder = HubFolder(REPO)
    (base / "config.json").write_text(text)
    with pytest.raises(HubFailed, match=rf"config\.json: the server {found}"):
        read(folder, "config.json", 0, 8)


def test_no_request_is_about_anything_but_the_repository(hub: StandInHub) -> None:
    HubFolder(REPO).fetch(["config.json"])
    assert {request.path.partition(REPO)[0] for request in hub.log} == {"/api/models/", "/"}


# Fetching


def test_fetch_downloads_only_the_named_files(hub: StandInHub, base: Path) -> None:
    local = HubFolder(REPO).fetch(["config.json", SHARDS[0]])

    assert local.names() == {"config.json", SHARDS[0]}
    assert read_bytes(local, SHARDS[0], limit=10**7) == (base / SHARDS[0]).read_bytes()
    assert not hub.asked(SHARDS[1])


def test_a_fetched_folder_opens_as_a_checkpoint_through_the_links_of_the_cache(hub: StandInHub) -> None:
    local = HubFolder(REPO).fetch(["config.json", INDEX, *SHARDS])

    assert (local.path / SHARDS[0]).is_symlink()
    with Checkpoint(local) as checkpoint:
        assert checkpoint.nbytes == len(SHARDS) * SHARD_BYTES


def test_a_fetched_folder_opens_through_the_store_that_repositories_share(hub: StandInHub, cache: Path) -> None:
    # With hf_xet, huggingface_hub 2 keeps a blob in <cache>/blobs/<2 digits>/<hash> and links to it from the
    # blobs of the repository.
    local = HubFolder(REPO).fetch([SHARDS[0]])
    blob = (local.path / SHARDS[0]).resolve()
    shared = cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))

    assert HubFolder(REPO).fetch([SHARDS[0]]).size(SHARDS[0]) > SHARD_BYTES


def test_what_the_cache_has_is_not_downloaded_again(hub: StandInHub) -> None:
    HubFolder(REPO).fetch([SHARDS[0]])
    hub.log.clear()
    HubFolder(REPO).fetch([SHARDS[0]])
    assert not hub.asked(SHARDS[0])


def test_progress_ends_at_the_size_of_each_file_downloaded_or_not(hub: StandInHub) -> None:
    folder = HubFolder(REPO)
    names = ["config.json", SHARDS[0]]
    for _ in ("downloaded", "cached"):
        seen: list[tuple[str, int]] = []
        folder.fetch(names, lambda name, done, seen=seen: seen.append((name, done)))  # type: ignore[misc]
        assert set(seen) == {(name, folder.size(name)) for name in names}


def test_a_download_prints_nothing(hub: StandInHub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.failures = 1
    HubFolder(REPO).fetch(["config.json", SHARDS[0]])
    assert capfd.readouterr() == ("", "")


def test_a_cached_file_of_another_size_is_refused(hub: StandInHub) -> None:
    folder = HubFolder(REPO)
    with (folder.fetch([SHARDS[0]]).path / SHARDS[0]).open("r+b") as file:
        file.truncate(1_000)
    with pytest.raises(HubFailed, match=rf"{SHARDS[0]} has 1,000 bytes in the cache, expected 1,000,\d+: remove"):
        folder.fetch([SHARDS[0]])


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_hub(hub: StandInHub, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(WriteFailed, match=r"config\.json: .*cache.*: Not a directory"):
        HubFolder(REPO).fetch(["config.json"])


# One commit


def test_the_commit_stays_the_same_when_the_branch_moves(hub: StandInHub, tmp_path: Path) -> None:
    folder = HubFolder(REPO, "main")
    moved = hub.push(REPO, write_base(tmp_path / "later", fill=b"\2"))

    assert read(folder, SHARDS[0], 500_000, 1) == b"\1"
    assert read_bytes(folder.fetch([SHARDS[0]]), SHARDS[0], limit=10**7)[-1:] == b"\1"
    assert HubFolder(REPO).commit == moved != folder.commit


def test_a_tag_and_a_commit_are_revisions_too(hub: StandInHub, base: Path) -> None:
    commit = hub.push(REPO, base, branch="v1.0")
    assert HubFolder(REPO, "v1.0").commit == HubFolder(REPO, commit).commit == commit


# What the Hub does not have for us


def test_a_missing_repository_is_named(hub: StandInHub) -> None:
    with pytest.raises(HubNotFound, match=r"maker/nothing: no such repository at http://127.*check the name"):
        HubFolder("maker/nothing")


def test_a_private_repository_is_not_found_without_a_token(hub: StandInHub) -> None:
    hub.private.add(REPO)
    with pytest.raises(HubNotFound, match=r"maker/base: .*or a private one.*hf auth login"):
        HubFolder(REPO)


def test_a_private_repository_is_read_with_the_token(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add(REPO)
    hub.tokens.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = HubFolder(REPO)
    read(folder, SHARDS[0], 0, 8)
    folder.fetch(["config.json"])
    assert {request.token for request in hub.log} == {TOKEN}


def test_the_token_does_not_follow_a_redirect_to_storage(
    hub: StandInHub, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stores_elsewhere = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = HubFolder(REPO)

    assert len(read_header(folder, SHARDS[0])) == 1
    assert read_bytes(folder.fetch([SHARDS[1]]), SHARDS[1], limit=10**7) == (base / SHARDS[1]).read_bytes()

    assert {request.token for request in hub.asked("/resolve/")} == {TOKEN}
    assert [(request.range, request.token) for request in hub.asked("/storage/")] == [
        (f"bytes=0-{HEAD_BYTES - 1}", None),
        (None, None),
    ]


def test_a_missing_revision_is_named(hub: StandInHub) -> None:
    with pytest.raises(HubNotFound, match="maker/base: no revision 'v9'"):
        HubFolder(REPO, "v9")


@pytest.mark.parametrize("revision", ["", "/etc/passwd", "../../other"])
def test_what_cannot_be_a_revision_reaches_neither_server_nor_cache(hub: StandInHub, revision: str) -> None:
    with pytest.raises(HubNotFound, match="is not a revision"):
        HubFolder(REPO, revision)
    assert not hub.log


def test_what_cannot_be_a_repository_reaches_no_server(hub: StandInHub) -> None:
    with pytest.raises(HubNotFound, match="not the name of a repository"):
        HubFolder("../maker/base")
    assert not hub.log


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "original/absent.json", "original/inner/params.json", "../config.json", ""]
)
def test_a_missing_file_is_named(hub: StandInHub, name: str) -> None:
    folder = HubFolder(REPO)
    for use in (lambda: folder.size(name), lambda: read(folder, name, 0, 1), lambda: folder.fetch([name])):
        with pytest.raises(HubNotFound, match=rf"maker/base@\w+: the repository has no file '{name}'"):
            use()


def test_a_file_that_vanished_from_the_server_is_named(hub: StandInHub, base: Path) -> None:
    folder = HubFolder(REPO)
    (base / SHARDS[0]).unlink()
    for use in (lambda: read(folder, SHARDS[0], 0, 1), lambda: folder.fetch([SHARDS[0]])):
        with pytest.raises(HubNotFound, match=f"{SHARDS[0]}: the repository has no such file"):
            use()


def test_a_gated_repository_says_where_to_accept_its_terms(hub: StandInHub) -> None:
    hub.gated.add(REPO)
    folder = HubFolder(REPO)  # the Hub lets everybody see the listing
    for use in (lambda: read(folder, SHARDS[0], 0, 8), lambda: folder.fetch([SHARDS[0]])):
        with pytest.raises(HubGated, match=rf"accept the terms at {hub.url}/maker/base and log in with `hf auth"):
            use()


@pytest.mark.parametrize(("status", "error"), [(401, HubGated), (403, HubGated), (404, HubNotFound)])
def test_other_refusals_are_told_with_the_servers_words(hub: StandInHub, status: int, error: type[HubRefused]) -> None:
    hub.failures, hub.failing_status, hub.failing_message = (
        1,
        status,
        "Invalid credentials in Authorization header",
    )
    with pytest.raises(error, match=rf"status {status} \(Invalid credentials"):
        HubFolder(REPO)


# What goes wrong on the way


def test_a_passing_503_is_tried_again(hub: StandInHub, base: Path) -> None:
    hub.failures = 3
    folder = HubFolder(REPO)
    hub.failures = 3
    assert len(read(folder, SHARDS[0], 0, 8)) == 8
    hub.failures = 3
    assert read_bytes(folder.fetch([SHARDS[1]]), SHARDS[1], limit=10**7) == (base / SHARDS[1]).read_bytes()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_error_that_does_not_pass_fails_after_four_tries(hub: StandInHub, status: int) -> None:
    hub.failures, hub.failing_status = 1_000, status
    with pytest.raises(HubFailed, match=rf"maker/base: .*status {status} \(try later\)"):
        HubFolder(REPO)
    assert len(hub.log) == 4


def test_a_download_that_does_not_get_through_fails_after_four_tries(hub: StandInHub, cache: Path) -> None:
    folder = HubFolder(REPO)
    hub.failures = 1_000
    with pytest.raises(HubFailed, match=rf"maker/base: {SHARDS[0]}: .*status 503"):
        folder.fetch([SHARDS[0]])
    assert [request.method for request in hub.asked(SHARDS[0])].count("GET") == 4
    assert not list(cache.rglob("*.incomplete"))


def test_the_librarys_own_tries_are_not_multiplied(hub: StandInHub) -> None:
    folder = HubFolder(REPO)
    hub.failures, hub.failing_method = 1_000, "HEAD"
    with pytest.raises(HubFailed, match=rf"maker/base: {SHARDS[0]}: .*status 503"):
        folder.fetch([SHARDS[0]])
    assert len(hub.asked(SHARDS[0])) <= 8


def test_an_unreachable_hub_fails_with_advice(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    with pytest.raises(HubFailed, match=f"not read from {closed}: .*refused.*HF_ENDPOINT.*offline"):
        HubFolder(REPO)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://huggingface.co", "http://[::", "https://"])
def test_an_endpoint_that_is_no_url_is_refused(hub: StandInHub, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(HubRefused, match=r"HF_ENDPOINT is .*, expected a URL"):
        HubFolder(REPO)


@pytest.mark.parametrize(
    "answer",
    [
        "<html>Please log in to the network.</html>",
        "[]",
        "{}",
        '{"id": "maker/base", "sha": "../../..", "siblings": []}',
        '{"id": "maker/base", "sha": "%s", "siblings": [{"rfilename": "without a size"}]}' % ("0" * 40),
        json.dumps({"id": REPO, "sha": 5, "siblings": []}),
        json.dumps({"id": REPO, "sha": ["0"], "siblings": []}),
    ],
)
def test_an_answer_that_is_not_a_hubs_is_recognized(hub: StandInHub, answer: str) -> None:
    hub.failures, hub.failing_status, hub.failing_body = 1, 200, answer
    with pytest.raises(HubFailed, match="does not answer as a Hub does"):
        HubFolder(REPO)


def test_another_commit_than_the_one_asked_for_is_refused(hub: StandInHub, base: Path) -> None:
    commit = "0" * 40
    hub.repositories[REPO].branches[commit] = hub.push(REPO, base)
    with pytest.raises(HubFailed, match="does not answer as a Hub does"):
        HubFolder(REPO, commit)


def test_names_that_lead_out_of_the_folder_are_not_seen(hub: StandInHub) -> None:
    names = ["..", "", "../up", "/etc/passwd", "a\\b", "LICENSE\x1b[2J", "LICENSE\n", "LICENSE\ud800", "fine.json"]
    files = [{"rfilename": name, "size": 1} for name in names]
    hub.failures, hub.failing_status = 1, 200
    hub.failing_body = json.dumps({"id": REPO, "sha": "0" * 40, "siblings": files})
    assert HubFolder(REPO).names() == {"fine.json"}


@pytest.mark.parametrize("etag", ["/{there}", "../../../{name}", "..", ".", ""])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag"])
def test_a_digest_that_is_a_path_does_not_lead_out_of_the_cache(
    header: str, etag: str, hub: StandInHub, cache: Path, tmp_path: Path
) -> None:
    folder = HubFolder(REPO)
    hub.headers = {header: f'"{etag.format(there=str(tmp_path / "there")[1:], name="there")}"'}
    before = set(tmp_path.iterdir())
    with pytest.raises(HubFailed, match="does not answer as a Hub does"):
        folder.fetch(["config.json"])
    assert set(tmp_path.iterdir()) - {cache} == before - {cache}
    assert not [path for path in cache.rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("commit", ["/{there}", "../../../../there", "0" * 40, "main"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_commit_that_is_a_path_or_another_does_not_lead_out_of_the_cache(
    commit: str, hub: StandInHub, base: Path, cache: Path, tmp_path: Path, *, is_there: bool
) -> None:
    folder = HubFolder(REPO)
    if not is_there:
        (base / "config.json").unlink()
    hub.headers = {"X-Repo-Commit": commit.format(there=str(tmp_path / "there")[1:])}
    before = set(tmp_path.iterdir())
    with pytest.raises((HubFailed, HubNotFound)):
        folder.fetch(["config.json"])
    assert set(tmp_path.iterdir()) - {cache} == before - {cache}


@pytest.mark.parametrize("what", ["listing", "failures"])
def test_an_answer_without_end_is_not_read_to_its_end(what: str, hub: StandInHub) -> None:
    hub.endless = what
    hub.failures = 4 if what == "failures" else 0
    with pytest.raises(HubFailed, match="try later" if what == "failures" else "list of files has more than"):
        HubFolder(REPO)
    assert hub.sent < MOST // 2


@pytest.mark.parametrize("name", ["config.json", SHARDS[0]])
def test_a_file_without_end_is_not_downloaded_to_its_end(name: str, hub: StandInHub, cache: Path) -> None:
    folder = HubFolder(REPO)
    hub.endless = "files"
    with pytest.raises(HubFailed, match="sent more than"):
        folder.fetch([name])
    assert hub.sent < MOST // 2
    assert not [path for path in cache.rglob("*") if path.suffix == ".incomplete"]


@pytest.mark.parametrize("what", ["listing", "files", "failures"])
def test_an_answer_that_comes_by_drips_is_not_waited_for(
    what: str, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = HubFolder(REPO)
    # By this clock each piece, of 64 kB at the most, takes a day.
    huggingface_hub.close_session()
    clients = checking(_http.default_client_factory, itertools.count(0.0, 86_400).__next__)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", clients)
    hub.endless = what
    hub.failures = 99 if what == "failures" else 0
    with pytest.raises(HubFailed, match="sends less than 1,000 bytes a second"):
        HubFolder(REPO) if what != "files" else folder.fetch([SHARDS[0]])
    assert hub.sent < MOST // 2


def test_a_failure_without_end_of_a_download_is_not_read_to_its_end(hub: StandInHub) -> None:
    folder = HubFolder(REPO)
    hub.endless, hub.failures, hub.failing_status = "failures", 4, 400
    with pytest.raises(HubFailed, match="status 400"):
        folder.fetch(["config.json"])
    assert hub.sent < MOST // 2


def test_a_token_never_gets_into_a_message(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    signed = "https://storage.example/file?X-Signature=0123456789abcdef"
    hub.failing_message = f"cannot serve Bearer {TOKEN} or '{TOKEN}' from https://me:secret@host/x or {signed}"
    for status in (400, 401, 403, 404, 429, 503):
        hub.failures, hub.failing_status = 4, status
        with pytest.raises((HubRefused, HubFailed), match="cannot serve") as caught:
            HubFolder(REPO)
        hub.failures = 0
        for secret in (TOKEN, "NotForYourEyes", "me:secret", "0123456789abcdef"):
            assert secret not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    assert hub.log[0].token == TOKEN


def test_a_token_of_another_form_that_the_server_repeats_does_not_get_into_a_message_either(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "api_org_ThisIsNotForYourEyes")
    hub.failing_message = "cannot serve api_org_ThisIsNotForYourEyes"
    hub.failures, hub.failing_status = 1, 403
    with pytest.raises(HubGated, match="cannot serve …"):
        HubFolder(REPO)


# Offline


def test_offline_asks_the_server_nothing(hub: StandInHub, base: Path) -> None:
    HubFolder(REPO).fetch(["config.json", INDEX, *SHARDS])
    hub.log.clear()

    with Checkpoint(HubFolder(REPO, offline=True)) as checkpoint:
        assert checkpoint.nbytes == len(SHARDS) * SHARD_BYTES
    assert HubFolder(REPO, offline=True).fetch([SHARDS[0]]).size(SHARDS[0]) == (base / SHARDS[0]).stat().st_size
    assert not hub.log


def test_the_environment_can_ask_for_offline(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = HubFolder(REPO)
    online.fetch(["config.json"])
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    folder = HubFolder(REPO)
    assert (folder.commit, folder.size("config.json")) == (online.commit, online.size("config.json"))
    assert not hub.log


def test_offline_knows_the_digests_too(hub: StandInHub) -> None:
    online = HubFolder(REPO)
    online.fetch(["config.json", SHARDS[0]])
    offline = HubFolder(REPO, offline=True)
    for name in ("config.json", SHARDS[0]):
        assert offline.digest(name) == online.digest(name)


def test_offline_finds_a_commit_and_a_branch_with_a_slash(hub: StandInHub, base: Path) -> None:
    commit = hub.push(REPO, base, branch="refs/pr/1")
    HubFolder(REPO, "refs/pr/1").fetch(["config.json"])
    assert HubFolder(REPO, "refs/pr/1", offline=True).commit == commit
    assert HubFolder(REPO, commit, offline=True).commit == commit


@pytest.mark.parametrize("revision", [None, "v1", "0" * 40])
def test_offline_without_the_repository_says_how_to_get_it(hub: StandInHub, revision: str | None) -> None:
    with pytest.raises(HubOffline, match=r"maker/base: revision .* is not in the cache .*hf download maker/base"):
        HubFolder(REPO, revision, offline=True)


def test_offline_without_a_shard_names_it_and_says_how_to_get_it(hub: StandInHub) -> None:
    HubFolder(REPO).fetch(["config.json", INDEX, SHARDS[0]])
    folder = HubFolder(REPO, offline=True)
    with pytest.raises(HubOffline, match=rf"maker/base@.*{SHARDS[1]}' is not in the cache.*hf download maker/base"):
        Checkpoint(folder)
    with pytest.raises(HubOffline, match=SHARDS[1]):
        folder.fetch([SHARDS[1]])


def test_offline_with_a_part_of_a_repository_says_that_it_is_the_cache(hub: StandInHub) -> None:
    HubFolder(REPO).fetch(["README.md"])
    with pytest.raises(BadCheckpoint, match=r"offline, from the cache\): no config\.json"):
        Checkpoint(HubFolder(REPO, offline=True))


def test_a_process_of_its_own_is_led_to_the_stand_in_by_its_environment(hub: StandInHub, cache: Path) -> None:
    program = f"from converter.read.hub.folder import HubFolder; print(HubFolder({REPO!r}).fetch(['config.json']).path)"
    environment = os.environ | hub.environment(cache)
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).parent.parent.parent == cache
    assert ran.stderr == ""

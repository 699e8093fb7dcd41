"""OUT in a repository on the Hub: shards one by one, then one commit, with the bytes of a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter import Gates, convert, plan_conversion, verify
from converter.errors import (
    BadOutput,
    ConverterError,
    GateFailed,
    HubGated,
    HubNotFound,
    NoEffect,
    OutputLocked,
    StoreRefused,
)
from converter.read.cache import cache_folder
from converter.write.stores.reading import as_folder
from tests.hub_uploads import TOKEN, UploadHub, upload_hub
from tests.test_effect import smaller
from tests.write.stores.settings import ONE_THREAD, SHARDS, SMALL_SHARDS

OUT = "hf://org/merged"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub(tmp_path, monkeypatch) as server:
        yield server


def model(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: raw for name, raw in files.items() if name != ".gitattributes"}


def puts(hub: UploadHub) -> int:
    return len([one for one in hub.log if one.method == "PUT"])


def test_an_output_on_the_hub_is_one_commit_with_the_bytes_of_a_folder(
    inputs: tuple[Path, Path], whole: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    assert "it will be made, and be private" in plan_conversion(*inputs, OUT, SMALL_SHARDS).plan.notes[-1]
    assert hub.made == []

    report = convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert model(hub.files("org/merged")) == whole
    assert len(hub.commits) == 1
    assert puts(hub) == SHARDS
    assert [made["visibility"] for made in hub.made] == ["private"]
    assert report.store is not None
    assert report.store.seen_at.startswith(f"{hub.url}/org/merged/tree/")
    assert list((tmp_path / "work").iterdir()) == []
    assert not [name for name, raw in hub.files("org/merged").items() if TOKEN.encode() in raw]
    assert convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work").nothing_to_do


def test_a_branch_is_made_and_main_is_left(
    inputs: tuple[Path, Path], whole: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    hub.commit("org/merged", {"README.md": b"hello"})

    convert(*inputs, f"{OUT}@v2", SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert hub.files("org/merged", "v2") == whole
    assert hub.files("org/merged") == {"README.md": b"hello"}


def test_a_pull_request_leaves_the_branch(
    inputs: tuple[Path, Path], whole: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    hub.commit("org/merged", {"README.md": b"hello"})

    report = convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", create_pr=True)

    assert hub.files("org/merged") == {"README.md": b"hello"}
    assert hub.files("org/merged", "refs/pr/1") == whole
    assert report.store is not None
    assert report.store.seen_at == f"{hub.url}/org/merged/discussions/1"


def test_a_missed_gate_commits_nothing_and_a_weaker_one_sends_no_shard_again(
    inputs: tuple[Path, Path], whole: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    with pytest.raises(GateFailed):
        convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", gates=Gates(max_error=0.01))
    assert hub.commits == []
    assert len(hub.stored) == SHARDS
    hub.log.clear()

    convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert puts(hub) == 0
    assert model(hub.files("org/merged")) == whole


def test_an_adapter_without_effect_is_an_error_and_nothing_is_committed(
    inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    adapter = smaller(inputs[1], tmp_path / "adapter", 1e-12)

    with pytest.raises(NoEffect, match="nothing shows that the adapter's change survives in any tensor"):
        convert(inputs[0], adapter, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert hub.commits == []
    assert list((tmp_path / "work").iterdir()) == []


def test_another_conversion_is_replaced_only_if_the_user_says_so(
    inputs: tuple[Path, Path], whole: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    convert(inputs[0], None, OUT, work=tmp_path / "work")
    with pytest.raises(BadOutput, match="holds another conversion; `overwrite` replaces it"):
        convert(*inputs, OUT, SMALL_SHARDS, work=tmp_path / "work")

    convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", overwrite=True)

    assert model(hub.files("org/merged")) == whole
    assert len(hub.commits) == 2


@pytest.mark.parametrize("fault", [500, 429, "drop"])
def test_a_hub_that_fails_for_a_while_is_asked_again(
    fault: int | str, inputs: tuple[Path, Path], whole: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    failed: set[str] = set()

    def fail(method: str, path: str) -> int | str | None:
        if method in ("PUT", "POST") and "/repos/create" not in path and path not in failed:
            failed.add(path)
            return fault
        return None

    hub.before = fail
    convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert len(failed) > SHARDS
    assert model(hub.files("org/merged")) == whole
    assert len(hub.commits) == 1


def test_a_killed_run_leaves_no_commit_and_the_next_one_sends_only_the_rest(
    inputs: tuple[Path, Path], whole: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    base, adapter = map(str, inputs)
    arguments = ["--base", base, "--adapter", adapter, "--out", OUT, "--work", str(tmp_path / "work"), "--threads", "1"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "converter", *arguments, "--max-shard-size", "1MB"],
        env={**os.environ, **hub.environment(tmp_path / "hub"), "HF_TOKEN": TOKEN},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def kill(method: str, path: str) -> str | None:
        if method == "PUT" and len(hub.stored) == 2:
            killed.send_signal(signal.SIGKILL)
            return "drop"
        return None

    hub.before = kill
    assert killed.wait(120) == -signal.SIGKILL
    hub.before = None
    assert hub.commits == []
    hub.log.clear()

    convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert model(hub.files("org/merged")) == whole
    assert puts(hub) == SHARDS - 2


def test_a_token_that_may_not_write_ends_the_run_keeps_the_work_and_is_never_repeated(
    inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    hub.before = lambda method, path: 403 if method == "POST" and "preupload" in path else None

    with pytest.raises(ConverterError, match="lacks the right to write there: it needs the role write") as failed:
        convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert failed.value.resumable
    assert TOKEN not in str(failed.value)


def test_without_a_login_nothing_is_begun(
    inputs: tuple[Path, Path], hub: UploadHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(HubGated, match="needs a login: log in with `hf auth login`, or set HF_TOKEN"):
        convert(*inputs, OUT, SMALL_SHARDS, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("place", ["hf://name", "hf://org/name@../x", f"hf://org/name@{'0' * 40}"])
def test_what_is_no_branch_of_a_repository_is_refused(place: str, inputs: tuple[Path, Path], hub: UploadHub) -> None:
    with pytest.raises(StoreRefused, match="give"):
        plan_conversion(*inputs, place)


# Reading what was published


def reading() -> Path:
    """Where what lies on the Hub comes while it is read."""
    return cache_folder() / "reading"


def test_what_was_published_is_verified_where_it_lies_and_nothing_stays_here(
    inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    convert(*inputs, f"{OUT}@v2", SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")
    stages: list[str] = []

    found = verify(f"{OUT}@v2", *inputs, require_receipt=True, progress=lambda progress: stages.append(progress.stage))

    assert found.is_good
    assert found.recomputed == len(list(plan_conversion(*inputs).plan.tensors()))
    assert {"fetching", "reading"} <= set(stages)
    assert list(reading().iterdir()) == []
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_file_that_was_changed_on_the_hub_is_found(inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path) -> None:
    convert(*inputs, OUT, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")
    files = hub.files("org/merged")
    name = max(files, key=lambda name: len(files[name]))
    hub.commit("org/merged", files | {name: files[name][:-1] + bytes([files[name][-1] ^ 1])})

    found = verify(OUT)

    assert [problem.partition("…")[0][:-13] for problem in found.problems] == [f"{name}: sha256"]


@pytest.mark.parametrize(("place", "said"), [("hf://org/other", "no such repository"), (f"{OUT}@v9", "no revision")])
def test_what_is_not_there_is_named(place: str, said: str, hub: UploadHub) -> None:
    hub.commit("org/merged", {"README.md": b"hello"})
    with pytest.raises(HubNotFound, match=said):
        verify(place)


def test_two_that_read_the_same_do_not_get_into_each_others_way(hub: UploadHub) -> None:
    hub.commit("org/merged", {"README.md": b"hello"})
    with as_folder(OUT) as folder:
        assert {path.name for path in folder.iterdir()} >= {"README.md"}
        with pytest.raises(OutputLocked, match="another process is reading it"), as_folder(OUT):
            pass
        lock = folder.parent / ".lock"
        assert lock.exists()
    assert not folder.exists()


def test_what_a_killed_reader_left_is_not_downloaded_again(hub: UploadHub) -> None:
    hub.commit("org/merged", {"README.md": b"hello", "model.safetensors": b"weights"})
    with as_folder(OUT) as folder:
        left = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        kept = folder.parent.with_name("kept")
        folder.parent.rename(kept)
    kept.rename(folder.parent)
    hub.log.clear()

    with as_folder(OUT) as again:
        assert {path.name: path.read_bytes() for path in again.rglob("*") if path.is_file()} == left
    assert [one for one in hub.log if "/resolve/" in one.path] == []


def test_offline_reaches_no_store(hub: UploadHub) -> None:
    with pytest.raises(StoreRefused, match="`offline` reaches no store"):
        verify(OUT, offline=True)
    assert hub.log == []

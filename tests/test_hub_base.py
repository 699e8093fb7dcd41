"""A base on the Hub: its files come while tensors are made of those that came before, on a small disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from converter import Recipe, Resources, convert, plan_conversion
from converter.errors import BadCheckpoint, BadOutput, HubFailed, InputChanged, Interrupted, NoEffect
from converter.observer import Progress
from converter.plan.estimate import DryRun
from converter.read.hub.folder import HubFolder
from tests.folders import contents
from tests.hub_uploads import TOKEN, UploadHub, upload_hub
from tests.models import save_large_pair
from tests.test_effect import smaller

RECIPE = Recipe(max_shard_size=1_000_000)
ONE_THREAD = Resources(threads=1)
OUT = "hf://org/merged"
BASE, LORA = "org/base", "org/lora"
ENOUGH = 10**9
LONG = 60.0
"""Seconds after which a test that hangs fails."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of several files, and an adapter."""
    return save_large_pair(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def local(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the conversion of the folders writes."""
    return weights(contents(convert(*inputs, tmp_path_factory.mktemp("folder") / "out", RECIPE, ONE_THREAD).out))


@pytest.fixture
def hub(inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub(tmp_path, monkeypatch, {BASE: inputs[0], LORA: inputs[1]}) as server:
        yield server


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: raw for name, raw in files.items() if name.endswith((".safetensors", ".index.json", "config.json"))}


def files_of(base: Path) -> list[str]:
    return sorted(path.name for path in base.glob("*.safetensors"))


def downloads(hub: UploadHub) -> list[str]:
    """The base's files that were downloaded, in order. Before it gets one, the Hub's library asks for its head."""
    asked = (one.path.rpartition("/")[2] for one in hub.asked(f"/{BASE}/resolve/") if one.method == "HEAD")
    return [name for name in asked if name.endswith(".safetensors")]


def held(folder: Path) -> int:
    """Bytes of the base's files in a work folder."""
    nbytes = 0
    for path in (*folder.glob("*/.base/*.safetensors"), *folder.glob("*/.base/.cache/**/*.incomplete")):
        with suppress(FileNotFoundError):  # it has gone, or has got its name
            nbytes += 0 if path.is_symlink() else path.stat().st_size
    return nbytes


def needed(**asked: Any) -> int:
    """The smallest disk that a conversion says it can do with."""
    with pytest.raises(BadOutput, match="for the base's files that are read at one time") as refused:
        plan_conversion(BASE, LORA, OUT, disk=1, **asked)
    found = re.search(r"give at least ([\d,]+), or a smaller `max_shard_size`", str(refused.value))
    assert found is not None
    return int(found[1].replace(",", ""))


def at_most(dry_run: DryRun) -> int:
    """Bytes of the base that a plan says are on the disk at one time."""
    (found,) = (found for note in dry_run.plan.notes if (found := re.search(r"at most ([\d,]+) bytes of it", note)))
    return int(found[1].replace(",", ""))


def nothing_of(base: Path, *folders: Path) -> bool:
    """Whether no file of a base lies in these folders, under any name."""
    sizes = {path.stat().st_size for path in base.glob("*.safetensors")}
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return not [path for path in files if path.stat().st_size in sizes]


# From Hub to Hub


@pytest.mark.parametrize("threads", [1, 2])
def test_from_hub_to_hub_on_a_small_disk_the_weights_are_those_of_folders_and_nothing_stays_here(
    threads: int, inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    hub.private |= {BASE, LORA}
    asked = {"recipe": RECIPE, "resources": Resources(threads=threads), "work": tmp_path / "work"}

    report = convert(BASE, LORA, OUT, **asked, disk=ENOUGH)

    assert weights(hub.files("org/merged")) == local
    assert downloads(hub) == files_of(inputs[0])
    assert report.checked["base"] == dict.fromkeys(files_of(inputs[0]), "the Hub")
    assert list((tmp_path / "work").iterdir()) == []
    assert nothing_of(inputs[0], tmp_path / "hub")
    assert not [raw for raw in hub.files("org/merged").values() if TOKEN.encode() in raw]
    assert convert(BASE, LORA, OUT, **asked, disk=ENOUGH).nothing_to_do


@pytest.mark.parametrize("disk", [ENOUGH, None])
def test_the_next_file_is_asked_for_before_what_is_made_of_this_one_is_finished(
    disk: int | None, inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    asked_for = {name: Event() for name in files_of(inputs[0])}
    first, second, *_ = asked_for

    def note(method: str, path: str) -> None:
        if method == "HEAD" and (name := path.rpartition("/")[2]) in asked_for:
            asked_for[name].set()

    def hold(progress: Progress) -> None:
        # The first tensor is made; nothing of its shard is in the store.
        if progress.stage == "converting" and first in asked_for:
            assert not hub.stored
            assert asked_for[second].wait(LONG)
            asked_for.pop(first)

    hub.before = note
    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=disk, progress=hold)

    assert first not in asked_for


@pytest.mark.parametrize("recipe", [RECIPE, Recipe()])
@pytest.mark.parametrize("more", [0, 60_000, ENOUGH])
def test_the_base_takes_no_more_of_the_disk_than_the_plan_says(
    more: int, recipe: Recipe, inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    disk = needed(recipe=recipe) + more
    dry_run = plan_conversion(BASE, LORA, OUT, recipe, disk=disk)
    most = at_most(dry_run)
    seen: list[int] = []

    def look() -> None:
        seen.append(held(tmp_path / "work"))

    hub.watch = look  # while a file arrives, and before each tile
    convert(BASE, LORA, OUT, recipe, ONE_THREAD, work=tmp_path / "work", disk=disk, stop=look)

    assert dry_run.disk is not None
    assert most < dry_run.disk <= disk
    largest = max(path.stat().st_size for path in inputs[0].glob("*.safetensors"))
    assert largest <= max(seen) <= most
    if recipe is RECIPE:
        assert weights(hub.files("org/merged")) == local


def test_what_can_not_fit_the_disk_is_refused_with_the_number_that_would_do(
    inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    enough = needed(recipe=RECIPE)
    with pytest.raises(BadOutput, match=f"`disk` is {enough - 1:,} bytes, and {enough:,} are needed"):
        convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=enough - 1)
    assert downloads(hub) == []
    assert not (tmp_path / "work").exists()

    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=enough)

    assert weights(hub.files("org/merged")) == local


# What the Hub's cache has


def test_without_a_limit_the_cache_keeps_the_base(
    inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    convert(BASE, LORA, tmp_path / "out", RECIPE, ONE_THREAD)
    hub.log.clear()

    again = convert(BASE, LORA, tmp_path / "again", RECIPE, ONE_THREAD, offline=True)

    assert hub.log == []
    assert contents(again.out) == contents(tmp_path / "out")
    assert weights(contents(again.out)) == local


def test_what_the_cache_had_before_is_read_there_and_stays(
    inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    names = files_of(inputs[0])
    snapshot = HubFolder(BASE).fetch(names[:2]).path
    before = {name: (snapshot / name).stat() for name in names[:2]}
    hub.log.clear()

    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)

    assert downloads(hub) == names[2:]
    assert {path.name for path in snapshot.glob("*.safetensors")} == set(names[:2])
    assert {name: (snapshot / name).stat().st_mtime_ns for name in before} == {
        n: s.st_mtime_ns for n, s in before.items()
    }
    assert weights(hub.files("org/merged")) == local


def test_a_folder_as_out_holds_nothing_of_the_base(
    inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    kept = convert(BASE, LORA, tmp_path / "kept", RECIPE, ONE_THREAD, disk=ENOUGH).out
    assert nothing_of(inputs[0], tmp_path / "hub")

    assert contents(kept) == contents(convert(BASE, LORA, tmp_path / "out", RECIPE, ONE_THREAD).out)
    assert weights(contents(kept)) == local
    assert sorted(path.name for path in tmp_path.iterdir() if "kept" in path.name) == ["kept"]


def test_a_quantized_base_comes_file_by_file_too(inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path) -> None:
    quantized = convert(inputs[0], None, tmp_path / "quantized", RECIPE, ONE_THREAD).out
    hub.push("org/quantized", quantized)
    expected = convert(quantized, inputs[1], tmp_path / "expected", RECIPE, ONE_THREAD).out

    convert("org/quantized", LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)

    assert weights(hub.files("org/merged")) == weights(contents(expected))
    assert len(files_of(quantized)) > 2


def test_tensors_that_share_a_scale_wait_for_each_others_files(
    inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    recipe = Recipe(quant_type="nvfp4a16")
    expected = convert(*inputs, tmp_path / "expected", recipe, ONE_THREAD).out
    disk = needed(recipe=recipe)

    convert(BASE, LORA, OUT, recipe, ONE_THREAD, work=tmp_path / "work", disk=disk)

    assert weights(hub.files("org/merged")) == weights(contents(expected))


@pytest.mark.parametrize("disk", [ENOUGH, None])
def test_an_adapter_without_effect_is_found_though_the_base_is_gone(
    disk: int | None, inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    hub.push(LORA, smaller(inputs[1], tmp_path / "adapter", 1e-12))

    with pytest.raises(NoEffect, match="the output would equal the base"):
        convert(BASE, LORA, tmp_path / "out", RECIPE, ONE_THREAD, disk=disk)

    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_base_whose_hub_does_not_say_what_its_files_are_comes_whole_and_not_on_a_small_disk(
    inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    hub.states_digests = False
    with pytest.raises(
        BadOutput, match="the Hub does not say what its files are, so they come all at once: omit `disk`"
    ):
        convert(BASE, LORA, tmp_path / "out", RECIPE, ONE_THREAD, disk=ENOUGH)
    assert downloads(hub) == []

    assert weights(contents(convert(BASE, LORA, tmp_path / "out", RECIPE, ONE_THREAD).out)) == local


# Faults


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("fault", [500, 429, "drop", "cut", "expired"])
def test_a_hub_that_fails_for_a_while_is_asked_again(
    fault: int | str,
    elsewhere: bool,
    monkeypatch: pytest.MonkeyPatch,
    inputs: tuple[Path, Path],
    local: dict[str, bytes],
    hub: UploadHub,
    tmp_path: Path,
) -> None:
    hub.stores_elsewhere = elsewhere
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    failed: set[tuple[str, str]] = set()

    def fail(method: str, path: str) -> int | str | None:
        if path.endswith(".safetensors") and BASE in path and (method, path) not in failed:
            failed.add((method, path))
            return fault
        return None

    if fault == "cut":
        hub.cuts = {path.name: path.stat().st_size // 2 for path in inputs[0].glob("*.safetensors")}
    elif fault == "expired":
        hub.expired = 2
    else:
        hub.before = fail
    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)

    assert len(failed) == 2 * len(files_of(inputs[0])) or isinstance(fault, str)
    assert hub.cuts == {}
    # What has come before the connection was cut does not come again.
    assert any((one.range or "").endswith("-") for one in hub.log) == (fault == "cut")
    assert hub.expired == (2 if fault == "expired" and not elsewhere else 0)
    assert weights(hub.files("org/merged")) == local


def test_a_file_that_arrives_damaged_gets_into_no_shard_and_the_same_command_fetches_it_again(
    inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    names = files_of(inputs[0])
    hub.flips[names[2]] = (inputs[0] / names[2]).stat().st_size - 1
    with pytest.raises(BadCheckpoint, match=f"{names[2]}: its sha256 is not .* it was damaged on the way") as refused:
        convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)
    assert "the same command resumes it" in str(refused.value)
    assert hub.commits == []
    assert set(hub.stored.values()) <= set(local.values())
    hub.flips.clear()
    hub.log.clear()

    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)

    assert set(downloads(hub)) <= set(names[2:])
    assert weights(hub.files("org/merged")) == local


def test_a_hub_that_goes_on_failing_ends_the_run_which_the_same_command_resumes(
    inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    names = files_of(inputs[0])
    hub.before = lambda method, path: 500 if method == "HEAD" and path.endswith(names[3]) else None
    with pytest.raises(HubFailed, match="the same command resumes it") as failed:
        convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)
    assert TOKEN not in str(failed.value)
    hub.before = None
    hub.log.clear()

    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)

    assert downloads(hub) == [names[3]]
    assert weights(hub.files("org/merged")) == local


def test_a_file_that_somebody_changes_while_it_is_read_ends_the_run(
    inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    def change(progress: Progress) -> None:
        for path in (tmp_path / "work").glob("*/.base/*.safetensors"):
            os.utime(path, (1, 1))

    with pytest.raises(InputChanged, match="changed while it was being read"):
        convert(BASE, LORA, OUT, Recipe(), ONE_THREAD, work=tmp_path / "work", disk=ENOUGH, progress=change)
    assert hub.commits == []
    assert list((tmp_path / "work").iterdir()) == []


def test_a_header_that_was_read_otherwise_than_it_arrives_ends_the_run(
    inputs: tuple[Path, Path], hub: UploadHub, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(inputs[0], base)
    name = files_of(base)[0]
    save_file(load_file(base / name) | {"extra.a": torch.zeros(2)}, base / name, {"format": "pt"})
    hub.push(BASE, base)
    hub.flips[name] = (base / name).read_bytes().index(b"extra.a") + len("extra.")

    def heal(method: str, path: str) -> None:
        if method == "HEAD" and path.endswith(name):
            hub.flips.clear()

    hub.before = heal
    with pytest.raises(InputChanged, match="its header is another than a moment ago"):
        convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)
    assert hub.commits == []


# Ended in the middle


@pytest.mark.parametrize("disk", [ENOUGH, None])
def test_a_signal_ends_a_wait_for_a_file_and_the_same_command_resumes(
    disk: int | None, inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    reached, ended = Event(), Event()

    def hang(method: str, path: str) -> str | None:
        if method == "GET" and BASE in path and path.endswith(files_of(inputs[0])[2]) and reached.is_set():
            ended.wait(LONG)
            return "drop"
        reached_second = method == "HEAD" and path.endswith(files_of(inputs[0])[2])
        if reached_second:
            reached.set()
        return None

    hub.before = hang
    with pytest.raises(Interrupted, match=r"SIGTERM while .* was fetched"):
        convert(
            *(BASE, LORA, OUT, RECIPE, ONE_THREAD),
            work=tmp_path / "work",
            disk=disk,
            progress=lambda progress: ended.set() if progress.name == files_of(inputs[0])[2] else None,
            stop=lambda: signal.SIGTERM if ended.is_set() else None,
        )
    hub.before = None
    hub.log.clear()

    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=disk)

    assert not set(downloads(hub)) & set(files_of(inputs[0])[:1])
    assert weights(hub.files("org/merged")) == local
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("ask", 1),
        pytest.param("send", 2, marks=pytest.mark.slow),
        ("send", 3),
        pytest.param("store", 1, marks=pytest.mark.slow),
        ("store", 3),
    ],
)
def test_a_killed_run_is_resumed_with_the_files_that_are_left(
    moment: str, number: int, inputs: tuple[Path, Path], local: dict[str, bytes], hub: UploadHub, tmp_path: Path
) -> None:
    arguments = ["--base", BASE, "--adapter", LORA, "--out", OUT, "--work", str(tmp_path / "work"), "--threads", "1"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "converter", *arguments, "--max-shard-size", "1MB", "--disk", "1GB"],
        env={**os.environ, **hub.environment(tmp_path / "hub"), "HF_TOKEN": TOKEN},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    name = files_of(inputs[0])[number]

    def kill(method: str, path: str) -> str | None:
        at = {"ask": method == "HEAD" and path.endswith(name), "store": method == "PUT" and len(hub.stored) == number}
        if at.get(moment):
            killed.send_signal(signal.SIGKILL)
            return "drop"
        return None

    def kill_on_the_way() -> None:
        # Look at all requests, not only the last one: an upload runs at the same time and may be logged after it.
        sent = (one for one in hub.asked(f"/{BASE}/resolve/") if (one.method, one.range) == ("GET", None))
        if moment == "send" and any(one.path.endswith(name) for one in sent):
            killed.send_signal(signal.SIGKILL)

    hub.before, hub.watch = kill, kill_on_the_way
    assert killed.wait(120) == -signal.SIGKILL
    hub.before, hub.watch = None, lambda: None
    before = downloads(hub)
    assert hub.commits == []
    hub.log.clear()

    convert(BASE, LORA, OUT, RECIPE, ONE_THREAD, work=tmp_path / "work", disk=ENOUGH)

    # All but the one that was on its way, and what an instant of the disk may cost.
    assert len(set(before) & set(downloads(hub))) <= 1
    assert weights(hub.files("org/merged")) == local
    assert list((tmp_path / "work").iterdir()) == []
    assert nothing_of(inputs[0], tmp_path / "hub")

"""An interrupted conversion is resumed where it was, and its output is that of one that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from converter import ConversionFailed, Recipe, Report, Resources, convert
from converter.errors import BadOutput, Interrupted, NotFinite, ReadFailed
from converter.observer import Progress
from tests.disks import name_of
from tests.folders import change_tensor, contents, copy
from tests.limits import HANG
from tests.models import save_adapter, save_base

SMALL_SHARDS = Recipe(max_shard_size=1_000_000)
ONE_THREAD = Resources(threads=1, journal_seconds=0.0)
"""Every tensor is noted at once."""
SHARDS = 4
SOME_MEMORY = 65_400_000
"""Enough, if large tensors are cut into more tiles than else."""
KILLS = 4
"""How often a process is killed, at instants drawn by chance."""

DRIVER = """
import os, sys, time
from converter.cli.main import console

pwrite = os.pwrite
seconds = float(sys.argv.pop(1))

def slowly(*arguments):
    os.write(1, b"write\\n")
    time.sleep(seconds)
    return pwrite(*arguments)

os.pwrite = slowly
console()
"""
"""The command line on a slow disk: it says "write" and waits before it writes any bytes of a shard."""


HANGING = """
import os, threading
from converter.cli.main import console

fdatasync = os.fdatasync

def hang(descriptor):
    if threading.current_thread().name.startswith("sync"):
        os.write(1, b"sync\\n")
        threading.Event().wait()
    fdatasync(descriptor)

os.fdatasync = hang
console()
"""
"""The command line on a disk that never ends a sync in the background: it says "sync" when that begins."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose conversion makes four shards, and an adapter."""
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", sharded=True, num_hidden_layers=1, vocab_size=9000)
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    report = convert(*inputs, tmp_path_factory.mktemp("undisturbed") / "out", SMALL_SHARDS, ONE_THREAD)
    assert len(report.plan.shards) == SHARDS
    return report


@pytest.fixture(scope="module")
def whole(undisturbed: Report) -> dict[str, bytes]:
    return contents(undisturbed.out)


class Watch:
    """Hears what a conversion makes, and ends it before a tile: by a signal, or by a failure."""

    def __init__(self, end_before: int | None = None, failure: Any = None) -> None:
        self.tiles = 0
        """Tiles that were begun."""
        self.made: list[str] = []
        """Tensors that were made and noted, in order."""
        self._end_before, self._failure = end_before, failure

    def stop(self) -> int | None:
        if self.tiles == self._end_before:
            if self._failure is not None:
                raise self._failure
            return signal.SIGTERM
        self.tiles += 1
        return None

    def progress(self, told: Progress) -> None:
        if told.stage == "converting":
            self.made.append(told.name)


def tiles_of(report: Report) -> list[str]:
    """The tensor of every tile, in the order in which they are made."""
    return [tensor.name for tensor in report.plan.tensors() for _ in tensor.spans()]


def run(inputs: tuple[Path, Path], out: Path, watch: Watch, resources: Resources = ONE_THREAD) -> Report:
    return convert(*inputs, out, SMALL_SHARDS, resources, progress=watch.progress, stop=watch.stop)


def interrupt(inputs: tuple[Path, Path], out: Path, tile: int, resources: Resources = ONE_THREAD) -> Watch:
    """A conversion that a signal ends before a tile."""
    watch = Watch(tile)
    with pytest.raises(Interrupted):
        run(inputs, out, watch, resources)
    return watch


def made_by_resuming(inputs: tuple[Path, Path], out: Path) -> list[str]:
    """Resume a conversion; the tensors that were left to be made."""
    watch = Watch()
    run(inputs, out, watch)
    return watch.made


# Stopped, or failing


def test_stopped_before_any_tile_it_makes_the_tensors_that_are_left_and_the_same_bytes(
    inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    tiles = tiles_of(undisturbed)
    for number in range(len(tiles)):
        out, watch = tmp_path / str(number), Watch(number)
        with pytest.raises(Interrupted) as stopped:
            run(inputs, out, watch)
        assert watch.made == tiles[:number]
        assert stopped.value.exit_code == 143
        assert not out.exists()
        assert out.with_name(f"{number}.partial").exists() == (number > 0)

        assert made_by_resuming(inputs, out) == tiles[number:]

        assert contents(out) == whole
        assert not out.with_name(f"{number}.partial").exists()


def test_stopped_again_and_again_it_comes_to_the_same_bytes(
    inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    tiles, made = tiles_of(undisturbed), []
    for _ in range(0, len(tiles) - 2, 2):
        made += interrupt(inputs, tmp_path / "out", tile=2).made
        assert not (tmp_path / "out").exists()
    made += made_by_resuming(inputs, tmp_path / "out")

    assert contents(tmp_path / "out") == whole
    assert made == tiles


@pytest.mark.parametrize(
    "failure", [MemoryError, RuntimeError, KeyboardInterrupt, ReadFailed("it failed")], ids=lambda f: str(f)
)
def test_what_fails_at_any_tensor_costs_that_tensor_and_no_other(
    failure: Any, inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    tiles = tiles_of(undisturbed)
    for number in range(len(tiles)):
        out = tmp_path / str(number)
        with pytest.raises(failure if isinstance(failure, type) else type(failure)):
            run(inputs, out, Watch(number, failure))
        assert not out.exists()

        assert made_by_resuming(inputs, out) == tiles[number:]

        assert contents(out) == whole


@pytest.mark.parametrize(
    "file", ["model.safetensors.index.json", "README.md", "config.json", "conversion.json", "SHA256SUMS"]
)
def test_what_fails_while_it_is_sealed_costs_no_tensor(
    file: str, inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise MemoryError
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(MemoryError):
            run(inputs, tmp_path / "out", Watch())
    shards = {path.name: path.stat() for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(shards) == SHARDS

    assert made_by_resuming(inputs, tmp_path / "out") == []

    assert contents(tmp_path / "out") == whole
    for name, before in shards.items():
        after = (tmp_path / "out" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_was_made_of_inputs_that_are_at_fault_is_not_kept(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    file = next(path for path in base.glob("*.safetensors") if b'"model.norm.weight"' in path.read_bytes()[:9999])
    change_tensor(file, "model.norm.weight", lambda tensor: tensor.fill_(float("nan")))

    with pytest.raises(NotFinite):
        convert(base, inputs[1], tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert not (tmp_path / "out.partial").exists()


def test_work_on_another_base_of_the_same_shapes_sizes_and_times_is_not_resumed(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = copy(inputs[0], tmp_path / "first"), copy(inputs[0], tmp_path / "second")
    for file in second.glob("*.safetensors"):
        for name in load_file(file):
            change_tensor(file, name, lambda tensor: tensor.mul_(2))
    for path in (*first.iterdir(), *second.iterdir()):
        os.utime(path, (1, 1))  # as in the image of a container
    (tmp_path / "base").symlink_to(first)
    interrupt((tmp_path / "base", inputs[1]), tmp_path / "out", 6)
    (tmp_path / "base").unlink()
    (tmp_path / "base").symlink_to(second)

    with pytest.raises(BadOutput, match="the unfinished work of another conversion, of which base differ"):
        convert(tmp_path / "base", inputs[1], tmp_path / "out", SMALL_SHARDS, ONE_THREAD)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Resources(threads=1), Resources(threads=3)),
        (Resources(threads=3), Resources(threads=1)),
        (Resources(threads=1, memory=SOME_MEMORY), Resources(threads=2)),
        (Resources(threads=2), Resources(threads=1, memory=SOME_MEMORY)),
        (Resources(threads=1), Resources(threads=1, kernels=False)),
    ],
    ids=["more threads", "fewer threads", "more memory", "less memory", "other kernels"],
)
def test_it_is_resumed_with_other_resources_to_the_same_bytes(
    before: Resources, after: Resources, inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt(inputs, tmp_path / "out", 6, replace(before, journal_seconds=0.0))

    convert(*inputs, tmp_path / "out", SMALL_SHARDS, after)

    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("file", [".journal", ".unfinished", ".safetensors"])
def test_after_any_damage_to_what_was_left_it_comes_to_the_same_bytes(
    file: str, inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    staging = tmp_path / "out.partial"
    chance = random.Random(file)
    for number in range(12):
        tile = chance.randrange(4, len(tiles_of(undisturbed)))
        interrupt(inputs, tmp_path / "out", tile)
        for path in [path for path in staging.iterdir() if path.name.endswith(file)]:
            raw = bytearray(path.read_bytes())
            if number % 3 == 0:
                path.write_bytes(raw[: chance.randrange(len(raw))])
            elif number % 3 == 1:
                for _ in range(5):
                    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
                path.write_bytes(raw)
            else:
                path.unlink()

        out = convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD).out

        assert contents(out) == whole
        out.rename(tmp_path / str(number))


def test_the_message_of_a_stop_says_how_to_resume(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as stopped:
        run(inputs, tmp_path / "out", Watch(3))
    with pytest.raises(Interrupted) as at_once:
        run(inputs, tmp_path / "other", Watch(0))

    end = f"; what is done is kept in {tmp_path / 'out.partial'}: the same command resumes it"
    assert str(stopped.value).startswith("SIGTERM while ")
    assert str(stopped.value).endswith(end)
    assert str(at_once.value).isprintable()
    assert "kept" not in str(at_once.value)
    assert list(tmp_path.glob("other*")) == []


def test_a_file_that_is_lost_costs_itself_and_not_those_before_it(
    inputs: tuple[Path, Path],
    undisturbed: Report,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fdatasync = os.fdatasync
    second = undisturbed.plan.shards[1]

    def fail_at_the_second(descriptor: int) -> None:
        if name_of(descriptor).startswith(second.file):
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail_at_the_second)
        with pytest.raises(ConversionFailed, match="Input/output error; what is done is kept in"):
            convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {
        ".lock", ".journal", undisturbed.plan.shards[0].file
    }  # fmt: skip

    left = [tensor.name for shard in undisturbed.plan.shards[1:] for tensor in shard.tensors]
    assert made_by_resuming(inputs, tmp_path / "out") == left
    assert contents(tmp_path / "out") == whole


# Processes that are killed


def start(
    inputs: tuple[Path, Path], out: Path, *driver: str, seconds: float = 0.02, threads: int = 2
) -> subprocess.Popen[str]:
    """A conversion in a process of its own, which notes every tensor at once and says "write" before each write."""
    options = ["--base", *inputs[:1], "--adapter", *inputs[1:], "--out", out, "--max-shard-size", "1MB", "--quiet"]
    options += ["--journal-seconds", "0", "--threads", str(threads)]
    command = [sys.executable, "-c", *(driver or (DRIVER, str(seconds))), *map(os.fspath, options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(process: subprocess.Popen[str], said: str, count: int = 1) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == f"{said}\n"


def said_at_the_second(process: subprocess.Popen[str], signum: signal.Signals) -> str:
    """Send a signal twice: the first is not heard, the second ends the process. What it says."""
    process.send_signal(signum)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signum)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == 128 + signum
    return said


def test_killed_at_any_instant_it_is_resumed_to_the_same_bytes(
    inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random()
    out = tmp_path / "out"
    tiles = len(tiles_of(undisturbed))
    for _ in range(KILLS):
        process = start(inputs, out)
        assert process.stdout is not None
        process.stdout.readline()  # a write; nothing, where one was killed that had made all and not yet sealed it
        time.sleep(chance.uniform(0, 0.06 * tiles))
        process.kill()
        process.communicate()
        if out.exists():
            assert contents(out).items() >= whole.items()
            convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)  # takes away what is left of staging
            assert contents(out) == whole
            out.rename(tmp_path / f"done{len(list(tmp_path.iterdir()))}")

    convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)

    assert contents(out) == whole


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_between_tiles_with_one_line_that_says_how_to_resume(
    signum: signal.Signals, inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(inputs, out, seconds=0.1)
    wait_for(process, "write", 4)
    process.send_signal(signum)
    _, said = process.communicate(timeout=HANG)

    assert process.returncode == 128 + signum
    assert said.startswith(f"error: {signum.name} while ")
    assert said.endswith(f"; what is done is kept in {out}.partial: the same command resumes it\n")
    assert said.count("\n") == 1
    assert not out.exists()
    assert 0 < len(made_by_resuming(inputs, out)) < len(tiles_of(undisturbed))
    assert contents(out) == whole


def test_a_second_signal_ends_it_at_once(inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(inputs, out, threads=1)
    wait_for(process, "write", 6)
    process.kill()
    process.communicate()
    process = start(inputs, out, seconds=1_000 * HANG, threads=1)  # a write takes longer than anybody waits
    wait_for(process, "write")
    said = said_at_the_second(process, signal.SIGINT)

    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not out.exists()
    convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)
    assert contents(out) == whole


def test_a_second_signal_ends_it_at_once_though_the_disk_never_ends_a_sync(
    inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(inputs, tmp_path / "out", HANGING)
    wait_for(process, "sync")
    said = said_at_the_second(process, signal.SIGTERM)

    assert said == "error: SIGTERM: nothing was written to OUT\n"
    convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    assert contents(tmp_path / "out") == whole

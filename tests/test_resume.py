"""A conversion that died goes on where it was, and its output is that of one that never did."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import converter.pipeline
import converter.write.journal
from converter import ConversionFailed, Recipe, Report, Resources, convert
from converter.errors import BadOutput, Interrupted, NotFinite, ReadFailed
from tests.folders import change_tensor, contents, copy
from tests.limits import HANG
from tests.models import save_adapter, save_base

SMALL_SHARDS = Recipe(max_shard_size=1_000_000)
ONE_THREAD = Resources(threads=1)
SHARDS = 4
SOME_MEMORY = 65_400_000
"""Enough, if large tensors are cut into more tiles than else."""
KILLS = 8
"""How often a process is killed, at instants drawn by chance."""

DRIVER = """
import sys, time
import converter.write.journal, converter.pipeline
from converter.cli.main import console

converter.write.journal.SECONDS = 0.0
read_tile = converter.pipeline.read_tile
seconds = float(sys.argv.pop(1))

def slowly(*arguments):
    print("tile", flush=True)
    time.sleep(seconds)
    return read_tile(*arguments)

converter.pipeline.read_tile = slowly
console()
"""
"""The command line, with every tensor noted at once, and tiles that take their time."""


HANGING = """
import os, threading
import converter.write.journal
from converter.cli.main import console
from converter.seal.production import Production

converter.write.journal.SECONDS = 0.0
fdatasync, finish = os.fdatasync, Production._finish

def hang(descriptor):
    if threading.current_thread().name.startswith("sync"):
        threading.Event().wait()
    fdatasync(descriptor)

def wait(production, file):
    if production._syncing is not None:
        print("tile", flush=True)
    finish(production, file)

os.fdatasync, Production._finish = hang, wait
console()
"""
"""The command line, on a disk that never ends a sync behind its back, which it waits for at the end of a shard."""


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


@pytest.fixture
def every_tensor_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.write.journal, "SECONDS", 0.0)


@contextmanager
def tiles_read() -> Iterator[list[str]]:
    """The tensors of the tiles that are read."""
    read: list[str] = []
    read_tile = converter.pipeline.read_tile

    def watched(tensor: Any, *arguments: Any) -> Any:
        read.append(tensor.name)
        return read_tile(tensor, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter.pipeline, "read_tile", watched)
        yield read


def stop_at(tile: int) -> Callable[[], int | None]:
    asked = iter(range(10_000))
    return lambda: signal.SIGTERM if next(asked) >= tile else None


def tiles_of(report: Report) -> list[str]:
    """The tensor of every tile, in the order in which they are made."""
    return [tensor.name for tensor in report.plan.tensors() for _ in tensor.spans()]


# Stopped, or failing


@pytest.mark.usefixtures("every_tensor_is_noted")
def test_stopped_before_any_tile_it_goes_on_with_the_tensors_that_are_left_to_the_same_bytes(
    inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    tiles = tiles_of(undisturbed)
    for number in range(len(tiles)):
        out = tmp_path / str(number)
        with tiles_read() as before, pytest.raises(Interrupted) as stopped:
            convert(*inputs, out, SMALL_SHARDS, ONE_THREAD, stop=stop_at(number))
        assert before == tiles[:number]
        assert stopped.value.exit_code == 143
        assert not out.exists()
        assert out.with_name(f"{number}.partial").exists() == (number > 0)

        with tiles_read() as after:
            convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)

        assert after == tiles[number:]
        assert contents(out) == whole
        assert not out.with_name(f"{number}.partial").exists()


@pytest.mark.usefixtures("every_tensor_is_noted")
def test_stopped_again_and_again_it_comes_to_the_same_bytes(
    inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with tiles_read() as read:
        for _ in range(100):
            try:
                convert(*inputs, out, SMALL_SHARDS, ONE_THREAD, stop=stop_at(2))
                break
            except Interrupted:
                assert not out.exists()

    assert contents(out) == whole
    assert read == tiles_of(undisturbed)


@pytest.mark.usefixtures("every_tensor_is_noted")
@pytest.mark.parametrize(
    "failure", [MemoryError, RuntimeError, KeyboardInterrupt, ReadFailed], ids=lambda f: f.__name__
)
def test_what_fails_at_any_tensor_costs_that_tensor_and_no_other(
    failure: type[BaseException],
    inputs: tuple[Path, Path],
    undisturbed: Report,
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    names = [tensor.name for tensor in undisturbed.plan.tensors()]
    read_tile = converter.pipeline.read_tile
    for number, name in enumerate(names):
        out = tmp_path / str(number)

        def fail(tensor: Any, *arguments: Any, name: str = name) -> Any:
            if tensor.name == name:
                raise failure("it failed")
            return read_tile(tensor, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(converter.pipeline, "read_tile", fail)
            with pytest.raises(failure):
                convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)
        assert not out.exists()

        with tiles_read() as read:
            convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)

        assert list(dict.fromkeys(read)) == names[number:]
        assert contents(out) == whole


@pytest.mark.parametrize("stage", ["check_written", "model_card", "write_receipt", "read_side_files"])
def test_what_fails_while_it_is_sealed_costs_no_tensor(
    stage: str, inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    module = "converter.pipeline" if stage == "read_side_files" else "converter.seal.staging"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{stage}", fail)
        with pytest.raises(MemoryError):
            convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    shards = {path.name: path.stat() for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(shards) == SHARDS

    with tiles_read() as read:
        convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert read == []
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


@pytest.mark.usefixtures("every_tensor_is_noted")
def test_another_base_of_the_same_shapes_sizes_and_times_is_not_gone_on_with(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = copy(inputs[0], tmp_path / "first"), copy(inputs[0], tmp_path / "second")
    for file in second.glob("*.safetensors"):
        for name in load_file(file):
            change_tensor(file, name, lambda tensor: tensor.mul_(2))
    for path in (*first.iterdir(), *second.iterdir()):
        os.utime(path, (1, 1))  # as in the image of a container
    (tmp_path / "base").symlink_to(first)
    command = (tmp_path / "base", inputs[1], tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    with pytest.raises(Interrupted):
        convert(*command, stop=stop_at(6))
    (tmp_path / "base").unlink()
    (tmp_path / "base").symlink_to(second)

    with pytest.raises(BadOutput, match="the unfinished work of another conversion, of which base differ"):
        convert(*command)


@pytest.mark.usefixtures("every_tensor_is_noted")
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
def test_it_goes_on_with_other_resources_to_the_same_bytes(
    before: Resources, after: Resources, inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        convert(*inputs, tmp_path / "out", SMALL_SHARDS, before, stop=stop_at(6))

    convert(*inputs, tmp_path / "out", SMALL_SHARDS, after)

    assert contents(tmp_path / "out") == whole


@pytest.mark.usefixtures("every_tensor_is_noted")
@pytest.mark.parametrize("file", [".journal", ".unfinished", ".safetensors"])
def test_after_any_damage_to_what_was_left_it_comes_to_the_same_bytes(
    file: str, inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    staging = tmp_path / "out.partial"
    chance = random.Random(file)
    for number in range(12):
        tile = chance.randrange(4, len(tiles_of(undisturbed)))
        with pytest.raises(Interrupted):
            convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD, stop=stop_at(tile))
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


def test_the_message_of_a_stop_says_how_to_go_on(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as stopped:
        convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD, stop=stop_at(3))
    with pytest.raises(Interrupted) as at_once:
        convert(*inputs, tmp_path / "other", SMALL_SHARDS, ONE_THREAD, stop=stop_at(0))

    end = f"; what is done is kept in {tmp_path / 'out.partial'}: the same command goes on with it"
    assert str(stopped.value).startswith("SIGTERM while ")
    assert str(stopped.value).endswith(end)
    assert str(at_once.value).isprintable()
    assert "kept" not in str(at_once.value)
    assert list(tmp_path.glob("other*")) == []


@pytest.mark.usefixtures("every_tensor_is_noted")
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
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(second.file):
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail_at_the_second)
        with pytest.raises(ConversionFailed, match="Input/output error; what is done is kept in"):
            convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {
        ".lock", ".journal", undisturbed.plan.shards[0].file
    }  # fmt: skip

    with tiles_read() as read:
        convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert set(read) == {tensor.name for shard in undisturbed.plan.shards[1:] for tensor in shard.tensors}
    assert contents(tmp_path / "out") == whole


# Processes that are killed


def start(inputs: tuple[Path, Path], out: Path, *driver: str, seconds: float = 0.02) -> subprocess.Popen[str]:
    """A conversion in a process of its own, which says "tile" before each one."""
    options = ["--base", *inputs[:1], "--adapter", *inputs[1:], "--out", out, "--max-shard-size", "1MB", "--quiet"]
    command = [sys.executable, "-c", *(driver or (DRIVER, str(seconds))), *map(os.fspath, options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for_tiles(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == "tile\n"


def said_at_the_second(process: subprocess.Popen[str], signum: signal.Signals) -> str:
    """Send a signal twice: the first is not heard, the second ends the process. What it says."""
    process.send_signal(signum)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signum)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == 128 + signum
    return said


def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(
    inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random()
    out = tmp_path / "out"
    tiles = len(tiles_of(undisturbed))
    for _ in range(KILLS):
        process = start(inputs, out)
        assert process.stdout is not None
        process.stdout.readline()  # a tile; nothing, where one was killed that had made all and not yet sealed it
        time.sleep(chance.uniform(0, 0.03 * tiles))
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
def test_a_signal_ends_it_between_tiles_with_one_line_that_says_how_to_go_on(
    signum: signal.Signals, inputs: tuple[Path, Path], undisturbed: Report, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(inputs, out, seconds=0.1)
    wait_for_tiles(process, 4)
    process.send_signal(signum)
    _, said = process.communicate(timeout=HANG)

    assert process.returncode == 128 + signum
    assert said.startswith(f"error: {signum.name} while ")
    assert said.endswith(f"; what is done is kept in {out}.partial: the same command goes on with it\n")
    assert said.count("\n") == 1
    assert not out.exists()
    with tiles_read() as read:
        convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)
    assert 0 < len(read) < len(tiles_of(undisturbed))
    assert contents(out) == whole


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_it_at_once(
    signum: signal.Signals, inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(inputs, out, seconds=0.0)
    wait_for_tiles(process, 6)
    process.kill()
    process.communicate()
    process = start(inputs, out, seconds=1_000 * HANG)  # a tile takes longer than anybody waits
    wait_for_tiles(process, 1)
    said = said_at_the_second(process, signum)

    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not out.exists()
    convert(*inputs, out, SMALL_SHARDS, ONE_THREAD)
    assert contents(out) == whole


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_it_at_once_though_the_disk_never_ends_a_sync(
    signum: signal.Signals, inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(inputs, tmp_path / "out", HANGING, "--threads", "2")
    wait_for_tiles(process, 1)
    said = said_at_the_second(process, signum)

    assert said == f"error: {signum.name}: nothing was written to OUT\n"
    convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    assert contents(tmp_path / "out") == whole

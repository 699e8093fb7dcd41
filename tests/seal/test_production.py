"""An output in the making: what is made becomes durable while more is made, and a failing disk is heard."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from converter import Resources, convert
from converter.errors import Interrupted, WriteFailed
from converter.observer import Progress
from tests.disks import name_of
from tests.folders import contents
from tests.models import save_adapter, save_base

ONE_THREAD = Resources(threads=1, journal_seconds=0.0)
TWO_THREADS = Resources(threads=2, journal_seconds=0.0)
"""Every tensor is noted at once."""
SHARD = "model.safetensors.unfinished"
LONG = 60.0
"""Seconds after which something that is waited for won't come."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", num_hidden_layers=1)
    return base, save_adapter(folder / "adapter", base, "llama")


def test_while_the_disk_syncs_more_is_made(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, waited = threading.Event(), []
    made: list[str] = []
    fdatasync = os.fdatasync

    def note(progress: Progress) -> None:
        made.append(progress.name)
        if len(made) == 4:
            more.set()

    def slow(descriptor: int) -> None:
        if name_of(descriptor) == SHARD and not waited:
            waited.append(more.wait(LONG))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)

    convert(*inputs, tmp_path / "out", resources=TWO_THREADS, progress=note)

    assert waited == [True]


def test_with_one_thread_no_other_one_syncs(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync, threads = os.fdatasync, set()

    def watched(descriptor: int) -> None:
        threads.add(threading.current_thread())
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", watched)

    convert(*inputs, tmp_path / "out", resources=ONE_THREAD)

    assert threads == {threading.main_thread()}


def test_a_sync_that_fails_in_the_background_ends_the_conversion_and_the_next_run_makes_the_same_bytes(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fdatasync = tmp_path / "out", os.fdatasync
    failed: list[str] = []

    def sync(descriptor: int) -> None:
        if name_of(descriptor) == SHARD and not failed:
            failed.append(threading.current_thread().name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fdatasync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", sync)
        with pytest.raises(WriteFailed, match=r"model\.safetensors\.unfinished: Input/output error"):
            convert(*inputs, out, resources=TWO_THREADS)
    assert failed[0].startswith("sync")
    assert not out.exists()

    convert(*inputs, out, resources=TWO_THREADS)

    assert contents(out) == contents(convert(*inputs, tmp_path / "fresh", resources=TWO_THREADS).out)


def test_a_failure_of_a_sync_in_the_background_hides_no_signal_and_leaves_no_lock(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun, asked = tmp_path / "out", threading.Event(), threading.Event()
    fdatasync = os.fdatasync

    def sync(descriptor: int) -> None:
        if name_of(descriptor) != SHARD:
            return fdatasync(descriptor)
        begun.set()
        asked.wait(LONG)
        raise MemoryError

    def stop() -> int | None:
        if not begun.wait(1.0):  # time for a tensor to be made and noted
            return None
        asked.set()
        return signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", sync)
        with pytest.raises(Interrupted):
            convert(*inputs, out, resources=TWO_THREADS, stop=stop)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sync")]
    convert(*inputs, out, resources=TWO_THREADS)

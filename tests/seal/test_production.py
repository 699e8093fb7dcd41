"""An output on its way: what is made becomes durable while more is made, and what the disk says is heard."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

import converter.write.journal
from converter import Resources, convert
from converter.errors import Interrupted, WriteFailed
from converter.threads import Crew
from converter.write.journal import Entry, Journal
from converter.write.shard import ShardWriter
from tests.folders import contents
from tests.models import save_adapter, save_base

TWO_THREADS = Resources(threads=2)
LONG = 60.0
"""Seconds after which something that is waited for won't come."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", num_hidden_layers=1)
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture(autouse=True)
def _always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.write.journal, "SECONDS", 0.0)


def test_while_the_disk_syncs_more_is_made(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, waited = threading.Event(), []
    noted: list[str] = []
    add, sync = Journal.add, ShardWriter.sync

    def note(journal: Journal, entry: Entry) -> None:
        noted.append(entry.tensor)
        if len(noted) == 4:
            more.set()
        add(journal, entry)

    def slow(writer: ShardWriter) -> None:
        if not waited:
            waited.append(more.wait(LONG))
        sync(writer)

    monkeypatch.setattr(Journal, "add", note)
    monkeypatch.setattr(ShardWriter, "sync", slow)

    convert(*inputs, tmp_path / "out", resources=TWO_THREADS)

    assert waited == [True]


def test_with_one_thread_no_other_one_syncs(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, threads = ShardWriter.sync, set()

    def watched(writer: ShardWriter) -> None:
        threads.add(threading.current_thread())
        sync(writer)

    monkeypatch.setattr(ShardWriter, "sync", watched)

    convert(*inputs, tmp_path / "out", resources=Resources(threads=1))

    assert threads == {threading.main_thread()}


def test_a_sync_that_fails_behind_the_back_ends_the_conversion_and_the_next_run_makes_the_same_bytes(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fdatasync = tmp_path / "out", os.fdatasync
    failed: list[str] = []

    def sync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name == "model.safetensors.unfinished" and not failed:
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


def test_what_a_sync_behind_meets_with_hides_no_signal_and_leaves_no_lock(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun, asked = tmp_path / "out", threading.Event(), threading.Event()
    submit = Crew.submit

    def at_once(*arguments: Any) -> Future[Any]:
        done = submit(*arguments)
        wait([done])
        return done

    def sync(_writer: ShardWriter) -> None:
        begun.set()
        asked.wait(LONG)
        raise MemoryError

    def stop() -> int | None:
        if next(tiles) == 0 or not begun.wait(LONG):
            return None
        asked.set()
        return signal.SIGTERM

    tiles = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(Crew, "submit", at_once)  # so that the first tensor is noted before the second is begun
        patch.setattr(ShardWriter, "sync", sync)
        with pytest.raises(Interrupted):
            convert(*inputs, out, resources=TWO_THREADS, stop=stop)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sync")]
    convert(*inputs, out, resources=TWO_THREADS)

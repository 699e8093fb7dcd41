"""Threads run before there is work for them, or are refused; in a conversion, before anything is read."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from converter import BatchOptions, Job, Resources, convert, convert_batch
from converter.errors import NoThread
from converter.threads import pool
from tests.folders import contents
from tests.models import save_adapter, save_base

TWO_THREADS = Resources(threads=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", num_hidden_layers=1)
    return base, save_adapter(folder / "adapter", base, "llama")


def ours() -> list[str]:
    """The threads of pools that run."""
    known = ("tile", "sync", "digest", "mine")
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(known))


def none_after(count: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Have the system give so many threads and no more; the names of those that were asked for."""
    asked: list[str] = []
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        asked.append(thread.name)
        if len(asked) > count:
            raise RuntimeError("can't start new thread")
        start(thread)

    patch.setattr(threading.Thread, "start", limited)
    return asked


@pytest.mark.parametrize("count", [1, 2, 7])
def test_all_threads_of_a_pool_run_before_it_has_work(count: int) -> None:
    with pool(count, "mine"):
        assert ours() == [f"mine_{number}" for number in range(count)]
    assert ours() == []


@pytest.mark.parametrize("given", [0, 1, 2])
def test_where_the_system_has_too_few_threads_there_is_no_pool_and_none_is_left(
    given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        none_after(given, patch)
        with pytest.raises(NoThread, match=r"starts no thread \(mine: can't start new thread\); try fewer `threads`"):
            pool(3, "mine")

    for thread in set(threading.enumerate()) - before:
        thread.join()


def test_where_a_thread_has_no_memory_for_its_beginning_there_is_no_pool() -> None:
    def begin() -> None:
        raise MemoryError

    with pytest.raises(NoThread, match="mine: A thread initializer failed"):
        pool(1, "mine", begin)


def test_whichever_thread_the_system_does_not_have_nothing_is_read_and_the_same_command_goes_on(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(convert(*inputs, tmp_path / "whole", resources=TWO_THREADS).out)
    read: list[None] = []
    for count in range(10):
        with monkeypatch.context() as patch:
            asked = none_after(count, patch)
            try:
                convert(*inputs, tmp_path / "out", resources=TWO_THREADS, stop=lambda: read.append(None))
            except NoThread:
                assert read == []
                assert not (tmp_path / "out").exists()
                continue
        assert len(asked) == count
        assert {name.partition("_")[0] for name in asked} == {"digest", "sync", "tile"}
        break
    assert ours() == []
    assert contents(tmp_path / "out") == whole


def test_whichever_thread_the_system_does_not_have_for_a_batch_it_is_told_of_each_output_and_the_batch_goes_on(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    other = save_adapter(tmp_path / "adapter", base, "llama", scale=0.2)
    jobs = [Job(tmp_path / "out" / "a", adapter, base), Job(tmp_path / "out" / "b", other, base)]
    for count in range(20):
        with monkeypatch.context() as patch:
            none_after(count, patch)
            outcomes = convert_batch(jobs, BatchOptions(TWO_THREADS))
        assert len(outcomes) == 2
        for outcome in outcomes:
            assert outcome.is_good or "starts no thread" in outcome.message
        if all(outcome.is_good for outcome in outcomes):
            break
    assert ours() == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]

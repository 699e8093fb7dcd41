"""An object comes in parts, a few at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from converter.errors import StoreFailed
from converter.read.bucket.parts import AT_ONCE, PART, download


class Source:
    """Gives parts of an object of so many bytes, and counts those that are on their way or not yet taken."""

    def __init__(self, size: int, fails_at: int | None = None) -> None:
        self.size, self.fails_at = size, fails_at
        self.asked: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def read(self, start: int, end: int) -> memoryview:
        with self._lock:
            self.asked.append((start, end))
        if start == self.fails_at:
            raise StoreFailed("broken off")
        return memoryview((start // PART).to_bytes(1, "little") * (end - start))


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, (AT_ONCE + 3) * PART - 1])
def test_all_bytes_lie_where_they_belong(size: int, tmp_path: Path) -> None:
    source, heard = Source(size), [0]
    with (tmp_path / "file").open("wb") as file:
        download(source.read, size, file.fileno(), heard.append)

    raw = (tmp_path / "file").read_bytes()
    assert raw == b"".join(bytes([start // PART]) * (min(start + PART, size) - start) for start in range(0, size, PART))
    assert sorted(set(heard)) == [0, *(min(start + PART, size) for start in range(0, size, PART))]
    assert heard == sorted(heard)
    assert sum(end - start for start, end in source.asked) == size


def test_after_an_error_no_further_part_is_asked_for(tmp_path: Path) -> None:
    source = Source(100 * PART, fails_at=0)

    with (tmp_path / "file").open("wb") as file, pytest.raises(StoreFailed, match="broken off"):
        download(source.read, source.size, file.fileno(), lambda _: None)

    assert len(source.asked) <= AT_ONCE


def test_no_part_is_asked_for_before_earlier_ones_are_taken(tmp_path: Path) -> None:
    source, ahead = Source(20 * PART), []

    def take(done: int) -> None:
        ahead.append(len(source.asked) - done // PART)

    with (tmp_path / "file").open("wb") as file:
        download(source.read, source.size, file.fileno(), take)

    assert max(ahead) < AT_ONCE


def test_who_is_told_can_end_it_while_a_server_does_not_answer(tmp_path: Path) -> None:
    answers = threading.Event()

    def read(start: int, end: int) -> memoryview:
        assert answers.wait(60)
        return memoryview(bytes(end - start))

    def end(done: int) -> None:
        raise StoreFailed(f"ended at {done}")

    try:
        with (tmp_path / "file").open("wb") as file, pytest.raises(StoreFailed, match="ended at 0"):
            download(read, PART, file.fileno(), end)
        assert not answers.is_set()
        assert (tmp_path / "file").read_bytes() == b""
    finally:
        answers.set()

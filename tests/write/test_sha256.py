"""The sha256 of a shard that is taken while it is written: it is the file's, whatever the order in which bytes come."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.plan.layout import lay_out
from converter.plan.plan import ShardPlan
from converter.quantize.format import Output
from converter.write.durable import LOCAL_DISK, Disk
from converter.write.sha256 import Begun, GrowingSha256, sha256_of
from converter.write.shard import ShardWriter
from tests.disks import failing
from tests.write.test_shard import FILE, STATE, WEIGHT, shard_plan, tensor_plan

ONE, TWO = Output("one", "U8", (3_000,)), Output("two", "U8", (50_000,))
PLAN = ShardPlan(FILE, (tensor_plan(ONE), tensor_plan(TWO)), lay_out([ONE, TWO]))
RAW = {ONE.name: bytes(range(250)) * 12, TWO.name: bytes(range(200)) * 250}


class Held(Disk):
    """A file of which the disk knows what was synced, and what the file cache was to forget."""

    def __init__(self) -> None:
        self.durable: set[int] = set()
        self.written: set[int] = set()
        self.forgotten: list[tuple[int, int]] = []

    def write(self, descriptor: int, raw: bytes | memoryview, offset: int) -> None:
        super().write(descriptor, raw, offset)
        self.written |= set(range(offset, offset + len(raw)))

    def sync_bytes(self, descriptor: int) -> None:
        before = set(self.written)
        super().sync_bytes(descriptor)
        self.durable |= before

    def forget(self, descriptor: int, start: int, count: int) -> None:
        super().forget(descriptor, start, count)
        self.forgotten.append((start, start + count))
        assert set(range(start, start + count)) <= self.durable


def write_both(writer: ShardWriter) -> None:
    """Write both tensors, and make each durable before the next step."""
    for output in (ONE, TWO):
        write(writer, output)
        writer.sync()


def write(writer: ShardWriter, output: Output, *, cut: int = 1_000) -> None:
    for start in range(0, output.nbytes, cut):
        writer.write(output.name, start, RAW[output.name][start : start + cut])


@given(st.data())
def test_bytes_may_come_in_any_order_and_be_hashed_at_any_time(data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=1, max_size=300))
    cuts = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw)), max_size=6))})
    head, *pieces = itertools.pairwise(cuts)
    with os.fdopen(os.memfd_create("file"), "r+b", buffering=0) as file:
        descriptor = file.fileno()
        file.write(raw[slice(*head)])
        growing = GrowingSha256(LOCAL_DISK, raw[slice(*head)], forget=False)
        for first, last in data.draw(st.permutations(pieces)):
            os.pwrite(descriptor, raw[first:last], first)
            growing.wrote(first, last - first)
            growing.wrote(last, 0)
            if data.draw(st.booleans()):
                growing.follow(descriptor, growing.whole)

        assert growing.whole == len(raw)
        assert sha256_of(Path(f"/proc/self/fd/{descriptor}"), None, growing.begun()) == hashlib.sha256(raw).hexdigest()


def test_a_shard_without_quant_states_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    disk = Held()
    with ShardWriter(tmp_path, PLAN, disk=disk, flush_bytes=10_000) as writer:
        write_both(writer)
        writer.finish()
        begun = writer.hashed

    whole = (tmp_path / FILE).read_bytes()
    assert begun is not None
    assert begun.nbytes == len(whole)
    assert begun.digest.hexdigest() == hashlib.sha256(whole).hexdigest()


def test_the_file_cache_forgets_what_is_hashed_and_durable(tmp_path: Path) -> None:
    disk = Held()
    with ShardWriter(tmp_path, PLAN, disk=disk, flush_bytes=10_000) as writer:
        write_both(writer)
        end = writer.finish()

    header = PLAN.layout.header_bytes + 8
    forgotten = {byte for first, last in disk.forgotten for byte in range(first, last)}
    assert forgotten == set(range(header, end))


def test_the_file_cache_keeps_what_is_read_again(tmp_path: Path) -> None:
    disk = Held()
    with ShardWriter(tmp_path, PLAN, disk=disk, flush_bytes=10_000, read_again=True) as writer:
        write(writer, ONE)
        write(writer, TWO)
        writer.sync()
        writer.finish()
        assert writer.hashed is not None

    assert disk.forgotten == []


def test_a_resumed_shard_is_hashed_with_what_the_earlier_run_wrote(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, PLAN) as writer:
        write(writer, TWO)
        writer.sync()
        written = {TWO.name: (writer.pieces(TWO.name), {})}
    with ShardWriter(tmp_path, PLAN, written, flush_bytes=10_000) as writer:
        assert writer.resumed == {TWO.name}
        write(writer, ONE)
        writer.sync()
        writer.finish()
        begun = writer.hashed

    assert begun is not None
    assert begun.digest.hexdigest() == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()


@pytest.mark.parametrize("outputs", [(WEIGHT, STATE), (WEIGHT,)], ids=["a header known last", "a short file"])
def test_other_shards_are_hashed_when_they_are_finished(outputs: tuple[Output, ...], tmp_path: Path) -> None:
    with ShardWriter(tmp_path, shard_plan(*outputs), flush_bytes=40 if STATE in outputs else 1_000) as writer:
        for output in outputs:
            writer.write(output.name, 0, bytes(output.nbytes))
        writer.sync()
        writer.finish()

        assert writer.hashed is None


@pytest.mark.parametrize(
    ("disk", "begins"),
    [(failing("read"), False), (failing("forget", code=errno.EINVAL), True)],
    ids=["of what can't be read", "by a filesystem that takes no hints"],
)
def test_a_shard_is_written_all_the_same(disk: Disk, *, begins: bool, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, PLAN, disk=disk, flush_bytes=10_000) as writer:
        write(writer, ONE)
        write(writer, TWO)
        writer.sync()
        writer.finish()
        begun = writer.hashed

    assert (begun is not None) is begins
    assert sha256_of(tmp_path / FILE, None, begun) == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()


def test_a_file_that_somebody_cut_is_hashed_from_its_beginning_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(b"header, and less than there was")
    growing = GrowingSha256(LOCAL_DISK, b"header", forget=False)
    growing.wrote(len("header"), 1_000)
    with path.open("rb") as file:
        growing.follow(file.fileno(), growing.whole)

    assert growing.begun() is None


@pytest.mark.parametrize("begun", [lambda: None, lambda: Begun(hashlib.sha256(b"ab"), 2)], ids=["whole", "the rest"])
def test_hashing_ends_when_nobody_wants_it_any_more(begun: Callable[[], Begun | None], tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"abcd")
    ended = threading.Event()
    assert sha256_of(tmp_path / FILE, ended, begun()) == hashlib.sha256(b"abcd").hexdigest()

    ended.set()
    with pytest.raises(CancelledError):
        sha256_of(tmp_path / FILE, ended, begun())

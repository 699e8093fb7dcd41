"""The journal: what it keeps, what it believes, and in which order it and the data reach the disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import Recipe, Resources, convert
from converter.errors import BadOutput, Interrupted, WriteFailed
from converter.observer import Progress
from converter.seal.staging import ANEW
from converter.write.durable import LOCAL_DISK, Disk
from converter.write.journal import FORMAT, JOURNAL, Entry, Journal
from converter.write.shard import Piece
from tests.disks import FailingOnce, failing, name_of
from tests.folders import contents, copy
from tests.models import save_adapter, save_base

ONE_THREAD = Resources(threads=1)
EVERY_TENSOR_IS_NOTED = Resources(threads=1, journal_seconds=0.0)
JOB = {"plan": "p", "layout": "l", "base": "b", "adapter": None, "device": "cpu", "versions": {"torch": "2"}}
SHARD = "model.safetensors"


def entry(name: str, shard: str = SHARD) -> Entry:
    pieces = (Piece(name, 0, 10, "ab"), Piece(f"{name}.absmax", 4, 3, "cd"))
    return Entry(name, shard, pieces, {f"{name}.state": '{"é": 1}'}, 0.1, 1 / 3, "digest")


def line(value: object) -> bytes:
    """A line as the format has it: xxh3-64 of all that follows the space, and the newline is part of that."""
    raw = json.dumps(value).encode() + b"\n"
    return xxhash.xxh3_64_hexdigest(raw).encode() + b" " + raw


def value_of(raw: bytes) -> dict[str, Any]:
    """What a line says."""
    return dict(json.loads(raw.partition(b" ")[2]))


def keep(folder: Path, *entries: Entry) -> None:
    """A journal of these, a commit each."""
    journal = Journal(folder, JOB)
    for one in entries:
        journal.add(one)
        journal.commit(journal.take())
    journal.close()


def names(folder: Path, job: dict[str, Any] = JOB) -> list[str]:
    """The tensors that a journal tells of."""
    journal = Journal(folder, job)
    journal.close()
    return list(journal.entries)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with a journal of tensors a, b and c."""
    keep(tmp_path, entry("a"), entry("b"), entry("c"))
    return tmp_path


# What it keeps

texts = st.text(max_size=12)
numbers = st.floats(allow_nan=False)
entries = st.builds(
    Entry,
    tensor=texts,
    shard=texts,
    pieces=st.lists(st.builds(Piece, texts, st.integers(0, 2**50), st.integers(0, 2**50), texts), max_size=3).map(
        tuple
    ),
    states=st.dictionaries(texts, texts, max_size=3),
    error=numbers,
    survival=st.none() | numbers,
    digest=texts,
)


@settings(deadline=None, max_examples=60)
@given(drawn=st.lists(entries, max_size=5, unique_by=lambda one: one.tensor))
def test_entries_come_back_as_they_were(drawn: list[Entry], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("journal")
    keep(folder, *drawn)

    for _ in range(2):  # the second reads what the first has written anew
        journal = Journal(folder, JOB)
        journal.close()
        assert list(journal.entries.values()) == drawn


def test_what_is_written_of_a_shard_is_its_own_tensors_alone(tmp_path: Path) -> None:
    keep(tmp_path, entry("a"), entry("b", "other.safetensors"), entry("c"))

    journal = Journal(tmp_path, JOB)
    journal.close()

    assert journal.written(SHARD) == {name: (entry(name).pieces, entry(name).states) for name in "ac"}
    assert journal.written("third.safetensors") == {}
    journal.forget(SHARD)
    assert list(journal.entries) == ["b"]


def test_what_is_written_of_a_shard_can_be_asked_for_while_more_is_committed(tmp_path: Path) -> None:
    """As the thread that syncs does between any two steps of this one."""

    class Shard(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            journal.commit([entry("b")])
            return str(self) == other

    keep(tmp_path, entry("a"))
    journal = Journal(tmp_path, JOB)

    assert list(journal.written(Shard(SHARD))) == ["a"]
    journal.close()
    assert list(journal.entries) == ["a", "b"]


def test_of_a_tensor_that_was_made_twice_the_later_is_known(tmp_path: Path) -> None:
    later = replace(entry("a"), error=0.5, pieces=())
    keep(tmp_path, entry("a"), entry("b"), later)

    journal = Journal(tmp_path, JOB)
    journal.close()

    assert journal.entries == {"a": later, "b": entry("b")}


def test_what_is_noted_but_not_committed_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, JOB)
    journal.add(entry("a"))
    journal.close()

    assert journal.entries == {}
    assert names(tmp_path) == []


def test_it_is_due_after_some_seconds_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    journal = Journal(tmp_path, JOB)
    assert not journal.is_due(3.0)

    now[0] += 3.0
    assert journal.is_due(3.0)

    journal.commit(journal.take())
    assert not journal.is_due(3.0)
    assert journal.is_due(0.0)
    journal.close()


# Its format: an earlier version's work must be resumed, or refused by another number


OF_FORMAT_2 = (
    b'299c6d699301da43 {"journal": 2, "job": {"plan": "p", "layout": "l", "base": "b", "adapter": null, '
    b'"device": "cpu", "versions": {"torch": "2"}}}' + b"\n"
    b'a68cb4e9a3e61e15 {"tensor": "a", "shard": "model.safetensors", "pieces": [{"output": "a", "start": 0, '
    b'"length": 10, "digest": "ab"}, {"output": "a.absmax", "start": 4, "length": 3, "digest": "cd"}], '
    b'"states": {"a.state": "{\\"\\u00e9\\": 1}"}, "error": 0.1, "survival": 0.3333333333333333, '
    b'"digest": "digest"}' + b"\n"
    b'80faecd5e81e002a {"tensor": "norm", "shard": "other", "pieces": [{"output": "norm", "start": 0, "length": 6, '
    b'"digest": "00"}], "states": {}, "error": Infinity, "survival": null, "digest": "digest"}' + b"\n"
)
"""As the first version with this format wrote it."""


def test_a_journal_of_the_format_is_understood_and_written_to_the_last_byte(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(OF_FORMAT_2)

    assert names(tmp_path) == ["a", "norm"]
    journal = Journal(tmp_path, JOB)
    journal.close()

    assert FORMAT == 2
    assert journal.entries == {
        "a": entry("a"),
        "norm": Entry("norm", "other", (Piece("norm", 0, 6, "00"),), {}, float("inf"), None, "digest"),
    }
    assert (tmp_path / JOURNAL).read_bytes() == OF_FORMAT_2


def test_what_is_added_has_the_lines_of_the_format(tmp_path: Path) -> None:
    keep(tmp_path, entry("a"))

    first, second = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)

    assert first == line({"journal": 2, "job": JOB})
    assert second == line(value_of(OF_FORMAT_2.splitlines()[1]))


# What it believes


def test_of_a_last_line_that_was_torn_nothing_is_believed_and_what_comes_after_is_kept(three: Path) -> None:
    whole = (three / JOURNAL).read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for size in range(last, len(whole), 3):
        (three / JOURNAL).write_bytes(whole[:size])
        keep(three, entry("d"))
        assert names(three) == ["a", "b", "d"]


def test_with_a_first_line_that_was_torn_it_is_begun_anew(three: Path) -> None:
    whole = (three / JOURNAL).read_bytes()
    for size in range(0, whole.find(b"\n") + 1, 3):
        (three / JOURNAL).write_bytes(whole[:size])
        assert names(three) == []
        keep(three, entry("d"))
        assert names(three) == ["d"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\n",
        b"\n",
        b"\0" * 512 + b"\n",
        b"{}\n",
        b"\xff\xfe \n",
        b"0123456789abcdef {}\n",
        b" \n",
        b"[" * 9999 + b"\n",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_follows_a_line_that_cannot_be_read_is_not_relied_on(garbage: bytes, three: Path) -> None:
    lines = (three / JOURNAL).read_bytes().splitlines(keepends=True)
    (three / JOURNAL).write_bytes(b"".join([*lines[:2], garbage, *lines[2:]]))

    assert names(three) == ["a"]


@pytest.mark.parametrize("change", [{"survival": 10**400}, {"error": 10**400}, {"error": "x"}, {"pieces": [{}]}])
def test_what_follows_a_forged_line_with_a_value_that_no_line_of_ours_has_is_not_relied_on(
    change: dict[str, object], three: Path
) -> None:
    lines = (three / JOURNAL).read_bytes().splitlines(keepends=True)
    forged = line(value_of(lines[2]) | change)
    (three / JOURNAL).write_bytes(b"".join([*lines[:2], forged, *lines[2:]]))

    assert names(three) == ["a"]


def test_no_flipped_bit_is_believed(three: Path) -> None:
    whole = (three / JOURNAL).read_bytes()
    known = {name: entry(name) for name in "abc"}
    for at in range(0, len(whole), 5):
        raw = bytearray(whole)
        raw[at] ^= 1 << at % 8
        (three / JOURNAL).write_bytes(raw)

        journal = Journal(three, JOB)
        journal.close()

        number = whole[:at].count(b"\n")  # of the line that is hit, the first being the job's
        assert journal.entries == {name: known[name] for name in "abc"[: max(number - 1, 0)]}


def test_the_same_job_in_another_layout_is_begun_anew_and_says_so(three: Path) -> None:
    for said in (True, False):
        journal = Journal(three, JOB | {"layout": "other"})
        journal.close()
        assert journal.is_begun_anew == said
        assert journal.entries == {}


@pytest.mark.parametrize("key", ["plan", "base", "adapter", "device", "versions"])
def test_another_job_is_refused_with_what_differs(key: str, three: Path) -> None:
    before = contents(three)

    with pytest.raises(BadOutput, match=rf"another conversion, of which {key} differ; `resume=False` discards it"):
        Journal(three, JOB | {key: "other", "layout": "other"})

    assert contents(three) == before


def test_a_journal_of_another_format_is_refused(three: Path) -> None:
    lines = (three / JOURNAL).read_bytes().splitlines(keepends=True)
    (three / JOURNAL).write_bytes(b"".join([line(value_of(lines[0]) | {"journal": FORMAT + 1}), *lines[1:]]))

    with pytest.raises(BadOutput, match="plan, base, device, versions differ"):
        Journal(three, JOB)


def test_a_link_in_its_place_is_neither_read_nor_written(three: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    elsewhere.write_bytes((three / JOURNAL).read_bytes())
    before = elsewhere.read_bytes()
    (three / JOURNAL).unlink()
    (three / JOURNAL).symlink_to(elsewhere)

    with pytest.raises(BadOutput, match=r"\.journal: Too many levels of symbolic links"):
        Journal(three, JOB)

    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_something_that_is_no_file_in_its_place_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / JOURNAL)

    with pytest.raises(BadOutput, match=r"\.journal: (not a plain file|Is a directory)"):
        Journal(tmp_path, JOB)


# When the disk fails


class Filling(Disk):
    """Has room for a new file, but only for twenty bytes that are added to it later."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, path: Path, raw: bytes) -> None:
        LOCAL_DISK.put(path, raw)

    def append(self, descriptor: int, raw: bytes) -> None:
        self.calls += 1
        super().append(descriptor, raw[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_after_a_line_that_was_written_in_part_none_is_written(three: Path) -> None:
    disk = Filling()
    journal = Journal(three, JOB, disk=disk)
    journal.add(entry("d"))
    for _ in range(3):
        with pytest.raises(WriteFailed, match=r"\.journal: No space left on device: .*; make room there$"):
            journal.commit(journal.take())
    journal.close()

    assert disk.calls == 1
    assert list(journal.entries) == ["a", "b", "c"]
    keep(three, entry("e"))
    assert names(three) == ["a", "b", "c", "e"]


def test_after_a_failed_sync_it_is_not_synced_again_and_the_next_run_takes_a_new_file(three: Path) -> None:
    disk = FailingOnce("sync_bytes")
    journal = Journal(three, JOB, disk=disk)
    journal.add(entry("d"))
    for _ in range(3):
        with pytest.raises(WriteFailed, match=r"\.journal: Input/output error"):
            journal.commit(journal.take())
    journal.close()
    inode = (three / JOURNAL).stat().st_ino

    assert disk.asked == [JOURNAL]
    assert "d" not in journal.entries
    names(three)
    assert (three / JOURNAL).stat().st_ino != inode


def test_a_journal_that_cannot_be_begun_leaves_the_old_one(three: Path) -> None:
    with pytest.raises(WriteFailed, match=r"\.journal: Input/output error"):
        Journal(three, JOB, disk=failing("sync"))

    assert names(three) == ["a", "b", "c"]


# In a conversion


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", num_hidden_layers=1, vocab_size=6000)
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture
def left(inputs: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, adapter and OUT of a conversion that was stopped half way."""
    base, adapter = copy(inputs[0], tmp_path / "base"), copy(inputs[1], tmp_path / "adapter")
    stopped = stop_after(6)
    with pytest.raises(Interrupted):
        convert(base, adapter, tmp_path / "out", resources=ONE_THREAD, stop=stopped)
    return base, adapter, tmp_path / "out"


def stop_after(tiles: int) -> Callable[[], int | None]:
    asked = iter(range(1000))
    return lambda: 15 if next(asked) >= tiles else None


def touch(base: Path, adapter: Path) -> Recipe:
    os.utime(base / "model.safetensors", (1, 1))
    return Recipe()


def train_on(base: Path, adapter: Path) -> Recipe:
    weights = adapter / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    return Recipe()


def choose_otherwise(base: Path, adapter: Path) -> Recipe:
    return Recipe(double_quant=False)


@pytest.mark.parametrize(
    ("change", "differing"),
    [(touch, "base"), (train_on, "adapter"), (choose_otherwise, "plan")],
    ids=lambda v: str(v)[:9],
)
def test_the_work_of_another_job_is_refused_and_kept_and_no_resume_discards_it(
    change: Callable[[Path, Path], Recipe], differing: str, left: tuple[Path, Path, Path]
) -> None:
    base, adapter, out = left
    staging = out.with_name("out.partial")
    recipe = change(base, adapter)
    before = contents(staging)

    with pytest.raises(BadOutput) as refused:
        convert(base, adapter, out, recipe, ONE_THREAD)

    assert str(refused.value) == (
        f"{staging}: holds the unfinished work of another conversion, of which {differing} differ; "
        "`resume=False` discards it"
    )
    assert contents(staging) == before
    convert(base, adapter, out, recipe, ONE_THREAD, resume=False)
    fresh = convert(base, adapter, out.with_name("fresh"), recipe, ONE_THREAD).out
    assert contents(out) == contents(fresh)
    assert not staging.exists()


def test_the_work_of_another_job_is_kept_to_the_last_file_where_its_shards_have_other_names(
    left: tuple[Path, Path, Path],
) -> None:
    base, adapter, out = left
    before = contents(out.with_name("out.partial"))

    with pytest.raises(BadOutput, match="of which plan differ"):
        convert(base, adapter, out, Recipe(max_shard_size=1_000_000, double_quant=False), ONE_THREAD)

    assert contents(out.with_name("out.partial")) == before
    assert convert(base, adapter, out, resources=ONE_THREAD).out == out


def test_the_same_tensors_in_other_shards_are_begun_anew_with_a_note(left: tuple[Path, Path, Path]) -> None:
    base, adapter, out = left
    recipe = Recipe(max_shard_size=1_000_000)

    report = convert(base, adapter, out, recipe, ONE_THREAD)

    fresh = convert(base, adapter, out.with_name("fresh"), recipe, ONE_THREAD)
    assert contents(out) == contents(fresh.out)
    assert set(report.plan.notes) - set(fresh.plan.notes) == {ANEW}


def test_without_resume_nothing_that_was_left_is_taken(left: tuple[Path, Path, Path]) -> None:
    base, adapter, out = left
    made: list[Progress] = []

    report = convert(base, adapter, out, resources=ONE_THREAD, resume=False, progress=made.append)

    names = [tensor.name for tensor in report.plan.tensors()]
    assert [told.name for told in made if told.stage == "converting"] == names


def test_a_journal_whose_data_is_gone_costs_no_more_than_the_data(left: tuple[Path, Path, Path]) -> None:
    base, adapter, out = left
    for path in out.with_name("out.partial").glob("*.unfinished"):
        path.unlink()

    convert(base, adapter, out, resources=ONE_THREAD)

    fresh = convert(base, adapter, out.with_name("fresh"), resources=ONE_THREAD).out
    assert contents(out) == contents(fresh)


def test_data_is_durable_before_the_journal_tells_of_it_and_the_journal_before_more_is_told(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []

    def watch(call: str) -> None:
        function = getattr(os, call)

        def watched(descriptor: int, *arguments: Any) -> Any:
            result = function(descriptor, *arguments)
            name = name_of(descriptor)
            if name == JOURNAL or name.startswith("model"):
                events.append((call, "journal" if name == JOURNAL else "data"))
            return result

        monkeypatch.setattr(os, call, watched)

    for call in ("write", "pwrite", "fdatasync", "fsync"):
        watch(call)

    report = convert(*inputs, tmp_path / "out", resources=EVERY_TENSOR_IS_NOTED)

    told = 0
    unsynced = {"data": False, "journal": False}
    for call, what in events:
        if call == "write":
            assert unsynced == {"data": False, "journal": False}
            told += 1
        unsynced[what] = call in ("write", "pwrite")
    assert unsynced == {"data": False, "journal": False}
    assert told >= len(list(report.plan.tensors()))


def test_no_line_is_written_of_data_whose_sync_failed(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    journal = out.with_name("out.partial") / JOURNAL
    fdatasync, unlink = os.fdatasync, os.unlink
    synced: list[str] = []
    kept: list[bytes] = []

    def sync(descriptor: int) -> None:
        synced.append(name_of(descriptor))
        if synced.count("model.safetensors.unfinished") == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fdatasync(descriptor)

    def watched(path: Any, **settings: Any) -> None:
        if Path(path) == journal:
            kept.append(journal.read_bytes())
        unlink(path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", sync)
        patch.setattr(os, "unlink", watched)
        with pytest.raises(WriteFailed, match=r"model\.safetensors\.unfinished: Input/output error$"):
            convert(*inputs, out, resources=EVERY_TENSOR_IS_NOTED)

    # Three tensors were durable, but with the file they are lost, and so is what the journal told of them.
    assert synced.count("model.safetensors.unfinished") == 4
    assert [len(raw.splitlines()) for raw in kept] == [1 + 3]
    assert not out.with_name("out.partial").exists()
    assert json.loads((convert(*inputs, out, resources=ONE_THREAD).out / "conversion.json").read_text())

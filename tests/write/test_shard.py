"""Writing a shard: what a reader finds in it, when it has its name, what is left when the disk fails, and what a later
run makes of that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from converter.errors import WriteFailed
from converter.plan.layout import lay_out
from converter.plan.plan import ShardPlan, TensorPlan
from converter.quantize.format import Output
from converter.read.folder import LocalFolder
from converter.read.header import DTYPE_BYTES, TensorHeader, read_header
from converter.write.durable import LOCAL_DISK, UNFINISHED, Disk
from converter.write.shard import ShardWriter, Written
from tests.disks import FailingOnce, failing, failing_with
from tests.limits import files_of_at_most, no_hang

FILE = "model.safetensors"
WEIGHT = Output("a.weight", "U8", (32, 1))
SCALES = Output("a.weight.absmax", "F32", (2,))
STATE = Output("a.weight.quant_state.bitsandbytes__nf4", "U8", (40,), is_state=True)
NORM = Output("norm.weight", "BF16", (3,))
OUTPUTS = (WEIGHT, SCALES, STATE, NORM)
NUMPY = {
    "F32": "float32",
    "F64": "float64",
    "F16": "float16",
    "I64": "int64",
    "I16": "int16",
    "U8": "uint8",
    "BOOL": "bool",
}


def tensor_plan(*outputs: Output) -> TensorPlan:
    """Of one tensor that becomes `outputs`; the writer looks at nothing else."""
    first = outputs[0]
    return TensorPlan(
        name=first.name,
        source=TensorHeader(first.name, first.dtype, first.shape, FILE, 0, first.nbytes),
        action="quantize" if len(outputs) > 1 else "keep",
        change=None,
        transpose=False,
        shape=first.shape,
        dtype=first.dtype,
        tiles=(0, first.shape[0] if first.shape else 1),
        outputs=outputs,
        checked=True,
    )


def shard_plan(*outputs: Output) -> ShardPlan:
    return ShardPlan(FILE, (tensor_plan(*outputs),) if outputs else (), lay_out(outputs))


def write_all(writer: ShardWriter, *, but: Output | None = None) -> dict[str, bytes]:
    """Write something to each of OUTPUTS; what was written."""
    written = {output.name: os.urandom(output.nbytes) for output in OUTPUTS if output is not but}
    for name, raw in written.items():
        writer.write(name, 0, raw)
    return written


def write_shard(
    folder: Path,
    disk: Disk = LOCAL_DISK,
    *,
    but: Output | None = None,
    end: Callable[[ShardWriter], object] = ShardWriter.finish,
) -> None:
    """A shard of OUTPUTS; `end` is what happens when they are written."""
    with ShardWriter(folder, shard_plan(*OUTPUTS), disk=disk) as writer:
        write_all(writer, but=but)
        end(writer)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def assert_one_line(error: WriteFailed, path: Path) -> None:
    """That names the file."""
    assert str(error).isprintable()
    assert str(path) in str(error)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples of a property write to in turn."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


class ClosingFails(Disk):
    """Closing a file reports an error, as NFS does when bytes could not be stored."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self.closed += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))


# What a reader finds


@st.composite
def outputs_and_bytes(draw: st.DrawFn) -> list[tuple[Output, bytes]]:
    """Tensors, and quant states that turn out shorter than their longest."""
    name = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=9)
    drawn = []
    for key in draw(st.lists(name.filter(lambda n: n != "__metadata__"), min_size=1, max_size=7, unique=True)):
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        if draw(st.booleans()):
            longest = draw(st.integers(1, 120))
            drawn.append((Output(key, "U8", (longest,), is_state=True), rng.bytes(draw(st.integers(0, longest)))))
        else:
            shape, dtype = draw(st.lists(st.integers(0, 6), max_size=3)), draw(st.sampled_from(list(NUMPY)))
            values = rng.integers(0, 100, shape).astype(NUMPY[dtype])
            drawn.append((Output(key, dtype, tuple(shape)), values.tobytes()))
    return drawn


@settings(deadline=None)
@given(drawn=outputs_and_bytes(), data=st.data())
def test_safetensors_reads_what_was_written_in_whatever_order(
    drawn: list[tuple[Output, bytes]], data: st.DataObject, scratch: Path
) -> None:
    with ShardWriter(scratch, shard_plan(*(output for output, _ in drawn))) as writer:
        for output, raw in data.draw(st.permutations(drawn)):
            writer.write(output.name, 0, raw)
        size = writer.finish()

    assert (scratch / FILE).stat().st_size == size
    with safe_open(scratch / FILE, "numpy") as shard:
        assert set(shard.keys()) == {output.name for output, _ in drawn}
        assert shard.metadata() == {"format": "pt"}
        for output, raw in drawn:
            found = shard.get_tensor(output.name)
            assert found.dtype == NUMPY[output.dtype]
            assert found.shape == ((len(raw),) if output.is_state else output.shape)
            assert found.tobytes() == raw


@settings(deadline=None)
@given(drawn=outputs_and_bytes())
def test_we_read_what_we_wrote_with_every_tensor_aligned(drawn: list[tuple[Output, bytes]], scratch: Path) -> None:
    with ShardWriter(scratch, shard_plan(*(output for output, _ in drawn))) as writer:
        for output, raw in drawn:
            writer.write(output.name, 0, raw)
        writer.finish()

    with closing(LocalFolder(scratch)) as folder:
        header = read_header(folder, FILE)
    assert {name: tensor.nbytes for name, tensor in header.items()} == {o.name: len(raw) for o, raw in drawn}
    assert all(tensor.offset % DTYPE_BYTES[tensor.dtype] == 0 for tensor in header.values())


def test_a_tensor_may_be_written_in_parts_in_any_order(tmp_path: Path) -> None:
    raw = os.urandom(NORM.nbytes)

    with ShardWriter(tmp_path, shard_plan(NORM)) as writer:
        counts = [writer.write(NORM.name, start, raw[start:end]) for start, end in ((4, 6), (0, 3), (3, 4))]
        writer.finish()

    assert counts == [2, 3, 1]
    assert dict(deserialize((tmp_path / FILE).read_bytes()))[NORM.name]["data"] == raw


def test_the_header_is_padded_with_spaces_up_to_the_room_it_has(tmp_path: Path) -> None:
    plan = shard_plan(*OUTPUTS)
    with ShardWriter(tmp_path, plan) as writer:
        write_all(writer, but=STATE)
        writer.write(STATE.name, 0, b"{}")
        writer.finish()

    raw = (tmp_path / FILE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length]
    assert length == plan.layout.header_bytes
    assert header.endswith(b"} ")
    assert header.rstrip(b" ").endswith(b"}")


def test_a_file_of_no_tensors_is_a_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, shard_plan()) as writer:
        writer.finish()

    assert deserialize((tmp_path / FILE).read_bytes()) == []


# When the file has its name


def test_a_file_has_no_name_but_the_unfinished_one_before_it_is_finished(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, shard_plan(*OUTPUTS)) as writer:
        write_all(writer)
        before = names(tmp_path)
        writer.finish()

    assert before == {FILE + UNFINISHED}
    assert names(tmp_path) == {FILE}


def test_a_file_is_durable_before_it_has_its_name_and_its_name_after(tmp_path: Path) -> None:
    seen = []

    class Watched(Disk):
        def sync(self, descriptor: int) -> None:
            seen.append(("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file", names(tmp_path)))
            super().sync(descriptor)

    write_shard(tmp_path, Watched())

    assert seen == [("folder", {FILE + UNFINISHED}), ("file", {FILE + UNFINISHED}), ("folder", {FILE})]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_a_file_whose_writing_was_interrupted_stays_without_its_name(
    interruption: type[BaseException], tmp_path: Path
) -> None:
    def interrupt(writer: ShardWriter) -> None:
        raise interruption

    with pytest.raises(interruption):
        write_shard(tmp_path, end=interrupt)

    assert names(tmp_path) == {FILE + UNFINISHED}


def test_a_file_that_was_not_finished_stays_without_its_name(tmp_path: Path) -> None:
    write_shard(tmp_path, end=lambda _: None)

    assert names(tmp_path) == {FILE + UNFINISHED}


def test_what_a_dead_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / (FILE + UNFINISHED)).write_bytes(b"x" * 10_000)

    write_shard(tmp_path)

    assert names(tmp_path) == {FILE}
    assert len(deserialize((tmp_path / FILE).read_bytes())) == len(OUTPUTS)


def test_no_file_stays_open(tmp_path: Path) -> None:
    write_shard(tmp_path)
    write_shard(tmp_path, end=lambda _: None)

    assert not any(file.path.startswith(str(tmp_path)) for file in psutil.Process().open_files())


@pytest.mark.parametrize("absent", OUTPUTS, ids=lambda output: output.name)
def test_a_file_of_which_a_tensor_was_not_written_is_not_finished(absent: Output, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"model\.safetensors: {absent.name} was not written"):
        write_shard(tmp_path, but=absent)

    assert names(tmp_path) == {FILE + UNFINISHED}


def test_a_file_of_which_a_tensor_was_written_in_part_is_not_finished(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, shard_plan(NORM)) as writer:
        writer.write(NORM.name, 0, b"12345")

        with pytest.raises(AssertionError, match=r"norm\.weight was not written"):
            writer.finish()


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 7), (6, 1), (100, 1)])
def test_no_bytes_are_written_outside_a_tensor(start: int, length: int, tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path, shard_plan(*OUTPUTS)) as writer,
        pytest.raises(AssertionError, match=rf"norm\.weight: bytes {start} to {start + length} of 6"),
    ):
        writer.write(NORM.name, start, bytes(length))


def test_a_quant_state_longer_than_its_room_is_not_written(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path, shard_plan(*OUTPUTS)) as writer,
        pytest.raises(AssertionError, match="bytes 0 to 41 of 40"),
    ):
        writer.write(STATE.name, 0, bytes(41))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_what_the_umask_leaves(
    mask: int, mode: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)

    write_shard(tmp_path)
    LOCAL_DISK.put(tmp_path / "config.json", b"{}")

    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (FILE, "config.json")] == [mode, mode]


# When the disk fails


@pytest.mark.parametrize(
    ("call", "code", "left"),
    [
        ("create", errno.EROFS, set()),
        ("reserve", errno.ENOSPC, set()),
        ("write", errno.ENOSPC, {FILE + UNFINISHED}),
        ("write", errno.EIO, {FILE + UNFINISHED}),
        ("cut", errno.EIO, {FILE + UNFINISHED}),
        ("sync", errno.EIO, set()),
        ("sync", errno.EDQUOT, set()),
        ("rename", errno.EIO, {FILE + UNFINISHED}),
        ("sync_folder", errno.EIO, set()),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value if isinstance(value, str) else "",
)
def test_a_failing_disk_is_an_error_that_names_the_file_which_gets_no_name(
    call: str, code: int, left: set[str], tmp_path: Path
) -> None:
    with pytest.raises(WriteFailed, match=os.strerror(code)) as caught:
        write_shard(tmp_path, failing(call, code=code))

    assert_one_line(caught.value, tmp_path / FILE)
    assert names(tmp_path) == left


def test_a_file_that_fails_while_it_is_closed_is_closed_once_and_left_without_its_name(
    tmp_path: Path,
) -> None:
    disk = ClosingFails()
    with pytest.raises(WriteFailed, match="Input/output error"):
        write_shard(tmp_path, disk)

    assert disk.closed == 1
    assert names(tmp_path) == {FILE + UNFINISHED}


def test_a_failure_to_close_does_not_hide_what_went_wrong_before(tmp_path: Path) -> None:
    disk = ClosingFails()
    with pytest.raises(AssertionError, match="was not written"):
        write_shard(tmp_path, disk, but=NORM)

    assert disk.closed == 1
    assert names(tmp_path) == {FILE + UNFINISHED}


@pytest.mark.parametrize(("call", "end"), [("sync_bytes", ShardWriter.sync), ("sync", ShardWriter.finish)])
def test_a_file_of_which_a_sync_failed_is_never_synced_again_and_is_gone(
    call: str, end: Callable[[ShardWriter], object], tmp_path: Path
) -> None:
    disk = FailingOnce(call)
    with ShardWriter(tmp_path, shard_plan(*OUTPUTS), disk=disk) as writer:
        write_all(writer)
        for attempt in (end, ShardWriter.sync, ShardWriter.finish, end):
            with pytest.raises(WriteFailed) as caught:
                attempt(writer)
            assert_one_line(caught.value, tmp_path / FILE)

        assert writer.is_lost

    assert disk.asked == [FILE + UNFINISHED]
    assert names(tmp_path) == set()


@pytest.mark.parametrize("end", [ShardWriter.sync, ShardWriter.finish])
def test_a_sync_that_fails_in_the_background_is_told_by_the_next_one(
    end: Callable[[ShardWriter], object], tmp_path: Path
) -> None:
    disk = FailingOnce("sync_bytes")

    def write_and_end() -> None:
        write_all(writer)  # may be told already
        while not disk.asked:
            time.sleep(0.001)
        end(writer)

    with (
        no_hang(),
        ShardWriter(tmp_path, shard_plan(*OUTPUTS), disk=disk, flush_bytes=40) as writer,
        pytest.raises(WriteFailed, match="Input/output error"),
    ):
        write_and_end()

    assert disk.asked == [FILE + UNFINISHED]
    assert names(tmp_path) == set()


def test_a_file_of_which_an_unasked_sync_failed_is_gone_too(tmp_path: Path) -> None:
    disk = FailingOnce("sync_bytes")
    with (
        no_hang(),
        ShardWriter(tmp_path, shard_plan(*OUTPUTS), disk=disk, flush_bytes=40) as writer,
        contextlib.suppress(WriteFailed),
    ):
        write_all(writer)
        while not disk.asked:
            time.sleep(0.001)

    assert names(tmp_path) == set()


def test_a_full_disk_is_known_before_the_first_tensor_is_converted(tmp_path: Path) -> None:
    plan = shard_plan(Output("large", "F32", (1 << 20,)))

    with files_of_at_most(1 << 20), pytest.raises(WriteFailed, match="File too large") as caught:
        ShardWriter(tmp_path, plan)

    assert_one_line(caught.value, tmp_path / FILE)
    assert names(tmp_path) == set()


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="No such file or directory") as caught:
        ShardWriter(tmp_path / "gone", shard_plan(*OUTPUTS))

    assert_one_line(caught.value, tmp_path / "gone" / FILE)


# What a later run makes of it

TWO = ShardPlan(FILE, (tensor_plan(WEIGHT, SCALES, STATE), tensor_plan(NORM)), lay_out(OUTPUTS))
BYTES = {output.name: bytes(range(7, 7 + output.nbytes)) for output in (WEIGHT, SCALES, NORM)}
BYTES[STATE.name] = b'{"shape": [8, 8]}'
BOTH = {WEIGHT.name, NORM.name}


def pieces_of(cut: int, *names: str) -> Iterator[tuple[str, int, bytes]]:
    for name in names:
        if name == STATE.name:
            yield name, 0, BYTES[name]
        else:
            for start in range(0, len(BYTES[name]), cut):
                yield name, start, BYTES[name][start : start + cut]


def notes(writer: ShardWriter) -> Written:
    """What the journal would know of the tensors of TWO."""
    return {tensor.name: (writer.pieces(tensor.name), writer.states(tensor.name)) for tensor in TWO.tensors}


def leave(folder: Path, *, cut: int = 100, finish: bool = False) -> Written:
    """A shard with both tensors, left by a run that died; what the journal knows of it."""
    with ShardWriter(folder, TWO) as writer:
        for piece in pieces_of(cut, *BYTES):
            writer.write(*piece)
        writer.sync()
        if finish:
            writer.finish()
        return notes(writer)


def finish(folder: Path, written: Written, disk: Disk = LOCAL_DISK) -> set[str]:
    """Resume what was left, as a conversion does; the tensors that were there."""
    with ShardWriter(folder, TWO, written, disk=disk) as writer:
        for tensor in TWO.tensors:
            if tensor.name not in writer.resumed:
                for piece in pieces_of(100, *(output.name for output in tensor.outputs)):
                    writer.write(*piece)
        writer.finish()
        return writer.resumed


def change_byte(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 16
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    leave(folder, finish=True)
    return (folder / FILE).read_bytes()


@pytest.mark.parametrize("cut", [1, 3, 7, 100])
def test_what_was_written_in_whatever_cuts_is_not_made_again(cut: int, tmp_path: Path, undisturbed: bytes) -> None:
    written = leave(tmp_path, cut=cut)

    assert len(written[WEIGHT.name][0]) == -(32 // -cut) + -(8 // -cut)
    assert finish(tmp_path, written) == BOTH
    assert (tmp_path / FILE).read_bytes() == undisturbed


def test_quant_states_can_be_asked_for_while_another_tensor_gets_its_own(tmp_path: Path) -> None:
    """As other threads do between any two steps of this one."""

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            writer.write(later.name, 0, b"{}")
            return super().__eq__(other)

    other = replace(WEIGHT, name="b.weight")
    later = replace(STATE, name="b.weight.quant_state.bitsandbytes__nf4")
    tensors = (tensor_plan(WEIGHT, SCALES, STATE), tensor_plan(other, later))
    with ShardWriter(tmp_path, ShardPlan(FILE, tensors, lay_out([WEIGHT, SCALES, STATE, other, later]))) as writer:
        writer.write(STATE.name, 0, b'{"a": 1}')

        assert writer.states(Name(WEIGHT.name)) == {STATE.name: '{"a": 1}'}


def test_pieces_and_quant_states_come_back(tmp_path: Path) -> None:
    written = leave(tmp_path, cut=10)

    with ShardWriter(tmp_path, TWO, written) as writer:
        assert notes(writer) == written
        assert writer.states(WEIGHT.name) == {STATE.name: BYTES[STATE.name].decode()}
        assert writer.states(NORM.name) == {}


@pytest.mark.parametrize(
    ("spoiled", "kept"),
    [(WEIGHT, {NORM.name}), (SCALES, {NORM.name}), (NORM, {WEIGHT.name})],
    ids=lambda v: str(v)[:30],
)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_a_tensor_with_a_byte_that_is_not_as_it_was_written_is_made_anew_and_the_others_are_kept(
    spoiled: Output, kept: set[str], finished: bool, tmp_path: Path, undisturbed: bytes
) -> None:
    written = leave(tmp_path, finish=finished)
    change_byte(tmp_path / (FILE if finished else FILE + UNFINISHED), TWO.layout.offsets[spoiled.name])

    assert finish(tmp_path, written) == kept
    assert names(tmp_path) == {FILE}
    assert (tmp_path / FILE).read_bytes() == undisturbed


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_of_a_file_that_was_cut_short_what_is_there_is_kept(finished: bool, tmp_path: Path, undisturbed: bytes) -> None:
    for size in range(0, len(undisturbed) + 1, 3):
        (tmp_path / FILE).unlink(missing_ok=True)
        written = leave(tmp_path, finish=finished)
        os.truncate(tmp_path / (FILE if finished else FILE + UNFINISHED), size)
        there = {
            tensor.name
            for tensor in TWO.tensors
            if all(TWO.layout.offsets[o.name] + o.nbytes <= size for o in tensor.outputs if not o.is_state)
        }

        assert finish(tmp_path, written) == there
        assert (tmp_path / FILE).read_bytes() == undisturbed


def test_no_changed_byte_of_a_finished_file_stays(tmp_path: Path, undisturbed: bytes) -> None:
    for at in range(0, len(undisturbed), 3):
        written = leave(tmp_path, finish=True)
        change_byte(tmp_path / FILE, at)

        finish(tmp_path, written)

        assert (tmp_path / FILE).read_bytes() == undisturbed


def test_what_follows_the_end_of_a_finished_file_does_not_stay(tmp_path: Path, undisturbed: bytes) -> None:
    written = leave(tmp_path, finish=True)
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"more")

    assert finish(tmp_path, written) == BOTH
    assert (tmp_path / FILE).read_bytes() == undisturbed


def test_a_missing_file_is_made_anew(tmp_path: Path, undisturbed: bytes) -> None:
    written = leave(tmp_path)
    (tmp_path / (FILE + UNFINISHED)).unlink()

    assert finish(tmp_path, written) == set()
    assert (tmp_path / FILE).read_bytes() == undisturbed


def test_a_file_of_which_nothing_is_known_is_made_anew(tmp_path: Path, undisturbed: bytes) -> None:
    leave(tmp_path, finish=True)
    leave(tmp_path)

    assert finish(tmp_path, {}) == set()
    assert (tmp_path / FILE).read_bytes() == undisturbed


def test_a_finished_file_is_not_written_again(tmp_path: Path) -> None:
    written = leave(tmp_path, finish=True)
    before = (tmp_path / FILE).stat()
    disk = failing("write", "cut", "reserve", "rename", "sync", "sync_bytes", "create", code=errno.EROFS)

    with ShardWriter(tmp_path, TWO, written, disk=disk) as writer:
        assert writer.is_finished
        assert writer.finish() == before.st_size

    after = (tmp_path / FILE).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_a_file_that_is_not_whole_after_all_loses_its_name_before_it_is_written(tmp_path: Path) -> None:
    written = leave(tmp_path, finish=True)
    change_byte(tmp_path / FILE, 0)

    with ShardWriter(tmp_path, TWO, written) as writer:
        assert not writer.is_finished
        assert writer.resumed == BOTH
        assert names(tmp_path) == {FILE + UNFINISHED}


@pytest.mark.parametrize(
    "change",
    [
        lambda pieces, states: (pieces[:-1], states),
        lambda _, states: ((), states),
        lambda pieces, _: (pieces, {}),
        lambda pieces, _: (pieces, {NORM.name: ""}),
        lambda pieces, states: ((replace(pieces[0], output="another"), *pieces[1:]), states),
        lambda pieces, states: ((replace(pieces[0], output=STATE.name), *pieces[1:]), states),
        lambda pieces, states: ((replace(pieces[0], start=1), *pieces[1:]), states),
        lambda pieces, states: ((replace(pieces[0], length=31), *pieces[1:]), states),
    ],
    ids=["a piece less", "no pieces", "no state", "another state", "a stranger's", "a state's", "shifted", "shorter"],
)
def test_notes_that_do_not_account_for_a_whole_tensor_are_not_relied_on(
    change: Callable[..., Any], tmp_path: Path, undisturbed: bytes
) -> None:
    written = dict(leave(tmp_path))
    written[WEIGHT.name] = change(*written[WEIGHT.name])

    assert finish(tmp_path, written) == {NORM.name}
    assert (tmp_path / FILE).read_bytes() == undisturbed


def test_what_the_disk_cannot_give_back_is_made_anew(tmp_path: Path, undisturbed: bytes) -> None:
    written = leave(tmp_path, finish=True)

    assert finish(tmp_path, written, failing("read")) == set()
    assert (tmp_path / FILE).read_bytes() == undisturbed


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_what_an_earlier_run_left_stays_when_looking_at_it_is_interrupted(
    interruption: type[BaseException], tmp_path: Path, undisturbed: bytes
) -> None:
    written = leave(tmp_path)

    def interrupt(*_: object) -> bytes:
        raise interruption

    with pytest.raises(interruption):
        ShardWriter(tmp_path, TWO, written, disk=failing_with(interrupt, "read"))

    assert finish(tmp_path, written) == BOTH
    assert (tmp_path / FILE).read_bytes() == undisturbed


def test_what_an_earlier_run_left_stays_on_a_disk_that_is_full_meanwhile(tmp_path: Path, undisturbed: bytes) -> None:
    written = leave(tmp_path)

    with pytest.raises(WriteFailed, match="No space left"):
        ShardWriter(tmp_path, TWO, written, disk=failing("reserve", code=errno.ENOSPC))

    assert finish(tmp_path, written) == BOTH
    assert (tmp_path / FILE).read_bytes() == undisturbed


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_a_damaged_file_that_others_have_too_is_left_to_them_and_made_anew(
    finished: bool, tmp_path: Path, undisturbed: bytes
) -> None:
    folder, other = tmp_path / "staging", tmp_path / "other"
    folder.mkdir()
    written = leave(folder, finish=finished)
    left = folder / (FILE if finished else FILE + UNFINISHED)
    other.hardlink_to(left)
    change_byte(left, TWO.layout.offsets[WEIGHT.name])
    before = other.read_bytes()

    with ShardWriter(folder, TWO, written) as writer:
        assert writer.resumed == set()
        assert names(folder) == {FILE + UNFINISHED}  # should this run die, the next one resumes it
    assert finish(folder, written) == set()

    assert (folder / FILE).read_bytes() == undisturbed
    assert other.read_bytes() == before


def test_a_whole_file_that_others_have_too_stays_theirs_and_ours(tmp_path: Path) -> None:
    folder, other = tmp_path / "staging", tmp_path / "other"
    folder.mkdir()
    written = leave(folder, finish=True)
    other.hardlink_to(folder / FILE)

    assert finish(folder, written) == BOTH
    assert other.samefile(folder / FILE)


def test_a_new_file_in_the_place_of_one_that_others_have_is_not_left_where_the_disk_is_full(
    tmp_path: Path, undisturbed: bytes
) -> None:
    folder = tmp_path / "staging"
    folder.mkdir()
    written = leave(folder, finish=True)
    (tmp_path / "other").hardlink_to(folder / FILE)
    change_byte(folder / FILE, 0)

    with pytest.raises(WriteFailed, match="No space left"):
        ShardWriter(folder, TWO, written, disk=failing("reserve", code=errno.ENOSPC))

    assert names(folder) == set()
    assert finish(folder, written) == set()
    assert (folder / FILE).read_bytes() == undisturbed


def test_a_file_is_not_closed_under_a_write_whose_number_could_by_then_be_another_files(tmp_path: Path) -> None:
    """A batch drops an output while its tiles are on their way, and opens other files at once."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Disk):
        def write(self, descriptor: int, raw: bytes | memoryview, offset: int) -> None:
            begun.set()
            assert go_on.wait(20)
            super().write(descriptor, raw, offset)

    writer = ShardWriter(tmp_path, TWO, disk=Slow())
    failures: list[BaseException] = []

    def write() -> None:
        try:
            writer.write(WEIGHT.name, 0, BYTES[WEIGHT.name])
        except BaseException as exc:
            failures.append(exc)

    writing, closing = threading.Thread(target=write), threading.Thread(target=writer.close)
    writing.start()
    assert begun.wait(20)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    with (tmp_path / "another").open("wb"):
        go_on.set()
        writing.join(20)
        closing.join(20)

    assert failures == []
    assert (tmp_path / "another").read_bytes() == b""
    with pytest.raises(WriteFailed, match="Bad file descriptor"):
        writer.write(WEIGHT.name, 0, BYTES[WEIGHT.name])


@pytest.mark.parametrize("name", [FILE, FILE + UNFINISHED])
def test_a_link_in_a_files_place_is_not_followed(name: str, tmp_path: Path) -> None:
    folder, victim = tmp_path / "staging", tmp_path / "victim"
    folder.mkdir()
    written = leave(folder)
    victim.write_bytes(b"precious")
    (folder / (FILE + UNFINISHED)).unlink()
    (folder / name).symlink_to(victim)

    with pytest.raises(WriteFailed, match="symbolic links"):
        ShardWriter(folder, TWO, written)

    assert victim.read_bytes() == b"precious"


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 17), min_size=1, max_size=9),
    data=st.data(),
)
@settings(deadline=None)
def test_after_any_damage_the_file_is_what_it_would_have_been(
    lengths: list[int], cuts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    outputs = [Output(f"t{number}", "U8", (length,)) for number, length in enumerate(lengths)]
    plan = ShardPlan(FILE, tuple(tensor_plan(output) for output in outputs), lay_out(outputs))
    rng = np.random.default_rng(sum(lengths))
    wanted = {output.name: rng.bytes(output.nbytes) for output in outputs}

    def write(writer: ShardWriter) -> None:
        for number, output in enumerate(outputs):
            if output.name not in writer.resumed:
                cut = cuts[number % len(cuts)]
                for start in range(0, output.nbytes, cut):
                    writer.write(output.name, start, wanted[output.name][start : start + cut])

    with ShardWriter(folder, plan) as writer:
        write(writer)
        written = {output.name: (writer.pieces(output.name), writer.states(output.name)) for output in outputs}
        if whole := data.draw(st.booleans()):
            writer.finish()
    path = folder / (FILE if whole else FILE + UNFINISHED)
    raw = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[at] ^= 255
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    for name in data.draw(st.lists(st.sampled_from([output.name for output in outputs]), unique=True)):
        del written[name]

    with ShardWriter(folder, plan, written) as writer:
        write(writer)
        writer.finish()

    assert {n: bytes(t["data"]) for n, t in deserialize((folder / FILE).read_bytes())} == wanted

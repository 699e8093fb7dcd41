"""Writing a shard: what a reader finds in it, when it has its name, and what is left when the disk fails."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

import converter.write
from converter.errors import WriteFailed
from converter.layout import Output, lay_out
from converter.plan import ShardPlan, TensorPlan
from converter.read import DTYPE_BYTES, LocalFolder, TensorHeader, read_header
from converter.write import UNFINISHED, ShardWriter, write_file

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
        origin="base",
        source=TensorHeader(first.name, first.dtype, first.shape, FILE, 0, first.nbytes),
        action="quantize" if len(outputs) > 1 else "keep",
        pair=None,
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
    folder: Path, *, but: Output | None = None, end: Callable[[ShardWriter], object] = ShardWriter.finish
) -> None:
    """A shard of OUTPUTS; `end` is what happens when they are written."""
    with ShardWriter(folder, shard_plan(*OUTPUTS)) as writer:
        write_all(writer, but=but)
        end(writer)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def fail(code: int) -> Callable[..., Any]:
    """A system call that fails."""

    def call(*arguments: object) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def assert_one_line(error: WriteFailed, path: Path) -> None:
    """That names the file."""
    assert str(error).isprintable()
    assert str(path) in str(error)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to make this process's files longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples of a property write to in turn."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def closing_fails(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Closing a file reports an error, as NFS does when bytes could not be stored. The descriptors of those closed."""
    closed: list[int] = []
    close = os.close

    def close_and_fail(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close_and_fail)
    return closed


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


def test_a_write_that_the_system_cuts_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, raw, at: whole(fd, raw[:5], at))

    with ShardWriter(tmp_path, shard_plan(*OUTPUTS)) as writer:
        written = write_all(writer)
        writer.finish()

    assert {n: bytes(t["data"]) for n, t in deserialize((tmp_path / FILE).read_bytes())} == written


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


def test_a_file_is_durable_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        seen.append(("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file", names(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)

    write_shard(tmp_path)

    assert seen == [("file", {FILE + UNFINISHED}), ("folder", {FILE})]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_a_file_whose_writing_was_interrupted(
    interruption: type[BaseException], tmp_path: Path
) -> None:
    def interrupt(writer: ShardWriter) -> None:
        raise interruption

    with pytest.raises(interruption):
        write_shard(tmp_path, end=interrupt)

    assert names(tmp_path) == set()


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    write_shard(tmp_path, end=lambda _: None)

    assert names(tmp_path) == set()


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

    assert names(tmp_path) == set()


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
    write_file(tmp_path / "config.json", b"{}")

    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (FILE, "config.json")] == [mode, mode]


# When the disk fails


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("open", errno.EROFS),
        ("posix_fallocate", errno.ENOSPC),
        ("pwrite", errno.ENOSPC),
        ("pwrite", errno.EIO),
        ("ftruncate", errno.EIO),
        ("fsync", errno.EIO),
        ("fsync", errno.EDQUOT),
        ("rename", errno.EIO),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_a_failing_disk_is_an_error_that_names_the_file_and_nothing_is_left(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, fail(code))

    with pytest.raises(WriteFailed, match=os.strerror(code)) as caught:
        write_shard(tmp_path)

    assert_one_line(caught.value, tmp_path / FILE)
    assert names(tmp_path) == set()


def test_a_file_that_fails_while_it_is_closed_is_closed_once_and_left_without_its_name(
    tmp_path: Path, closing_fails: list[int]
) -> None:
    with pytest.raises(WriteFailed, match="Input/output error"):
        write_shard(tmp_path)

    assert len(closing_fails) == 1
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("closing_fails")
def test_a_failure_to_close_does_not_hide_what_went_wrong_before(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was not written"):
        write_shard(tmp_path, but=NORM)

    assert names(tmp_path) == set()


def test_a_file_whose_name_could_not_be_made_durable_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter.write, "sync_folder", fail(errno.EIO))

    with pytest.raises(WriteFailed, match="Input/output error") as caught:
        write_shard(tmp_path)

    assert_one_line(caught.value, tmp_path / FILE)


def test_a_full_disk_is_known_before_the_first_tensor_is_converted(tmp_path: Path) -> None:
    plan = shard_plan(Output("large", "F32", (1 << 20,)))

    with files_of_at_most(1 << 20), pytest.raises(WriteFailed, match="File too large") as caught:
        ShardWriter(tmp_path, plan)

    assert_one_line(caught.value, tmp_path / FILE)
    assert names(tmp_path) == set()


def test_a_disk_without_room_for_small_files_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with files_of_at_most(4096), pytest.raises(WriteFailed, match="File too large") as caught:
        write_file(tmp_path / "config.json", bytes(5000))

    assert_one_line(caught.value, tmp_path / "config.json")
    assert "config.json" not in names(tmp_path)


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="No such file or directory") as caught:
        ShardWriter(tmp_path / "gone", shard_plan(*OUTPUTS))

    assert_one_line(caught.value, tmp_path / "gone" / FILE)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_filesystem_that_cannot_reserve_room_is_written_to_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fail(code))

    write_shard(tmp_path)

    assert len(deserialize((tmp_path / FILE).read_bytes())) == len(OUTPUTS)


# Small files


def test_a_small_file_holds_its_bytes_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_file(tmp_path / "config.json", b"{}\n")

    assert (tmp_path / "config.json").read_bytes() == b"{}\n"
    assert names(tmp_path) == {"config.json"}


def test_a_small_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_bytes(b"old")
    held = []
    commit = converter.write.commit

    def watch(temporary: Path, path: Path) -> None:
        held.append((temporary.read_bytes(), path.read_bytes()))
        commit(temporary, path)

    monkeypatch.setattr(converter.write, "commit", watch)

    write_file(tmp_path / "config.json", b"new")

    assert held == [(b"new", b"old")]
    assert (tmp_path / "config.json").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_small_file_that_cannot_be_replaced_stays_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_bytes(b"old")
    monkeypatch.setattr(os, call, fail(errno.EIO))

    with pytest.raises(WriteFailed, match="Input/output error") as caught:
        write_file(tmp_path / "config.json", b"new")

    assert_one_line(caught.value, tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == b"old"

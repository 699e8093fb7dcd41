"""OUT appears only whole, only where it may, and is what its receipt says."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import safe_open
from transformers import AutoTokenizer

from converter import ConversionRefused, Recipe, Report, Resources, convert, plan_conversion
from converter.errors import AdapterMismatch, BadOutput, ConverterError, InputChanged, VerificationFailed, WriteFailed
from converter.observer import Progress
from converter.read.folder import LocalFolder
from converter.seal.destination import Destination
from converter.seal.staging import Staging
from tests.folders import change_json, change_tensor, contents, copy
from tests.limits import no_hang
from tests.models import load, save_adapter, save_base
from tests.reference import tensors_of
from tests.seal.trouble import path_of, trouble

ONE_THREAD = Resources(threads=1)
OTHER = Recipe(double_quant=False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in one shard and an adapter, with as few files as can be."""
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", num_hidden_layers=1)
    (base / "generation_config.json").unlink()
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed conversion leaves."""
    return contents(convert(*inputs, tmp_path_factory.mktemp("whole") / "out", resources=ONE_THREAD).out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


# Only whole


def each_trouble(
    inputs: tuple[Path, Path], prepare: Callable[[Path], Path], tmp_path: Path, *, killed: bool, overwrite: bool
) -> Iterator[Path]:
    """OUT after a conversion during which the first, the second, … change to the disk failed; until none did."""
    for number in range(1, 200):
        out = prepare(tmp_path / f"place{number}")
        with trouble(out.parent, number, killed=killed) as met:
            convert(*inputs, out, resources=ONE_THREAD, overwrite=overwrite)
        if not met.happened:
            assert number > 15
            return
        yield out
    raise AssertionError("there was no end to it")


def visible(out: Path) -> dict[str, bytes]:
    """What OUT holds but for hidden files: the lock, and a staging folder inside."""
    return {name: raw for name, raw in contents(out).items() if not name.startswith(".")} if out.exists() else {}


both = pytest.mark.parametrize("killed", [False, True], ids=["an error", "a kill"])
a_kill = pytest.mark.parametrize(
    "killed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["an error", "a kill"]
)
"""Of OUTs that are rarer, `make check` tries what leaves more behind."""


def nothing(place: Path) -> Path:
    place.mkdir()
    return place / "out"


def empty_folder(place: Path) -> Path:
    (place / "out").mkdir(parents=True)
    return place / "out"


@both
def test_a_new_out_is_absent_or_whole_whatever_fails(
    inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path, killed: bool
) -> None:
    for out in each_trouble(inputs, nothing, tmp_path, killed=killed, overwrite=False):
        assert not out.exists() or visible(out) == whole

        convert(*inputs, out, resources=ONE_THREAD)

        assert visible(out) == whole
        assert not out.with_name("out.partial").exists()


@both
def test_an_empty_folder_becomes_a_checkpoint_at_once_whatever_fails(
    inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path, killed: bool
) -> None:
    for out in each_trouble(inputs, empty_folder, tmp_path, killed=killed, overwrite=False):
        assert "config.json" not in visible(out) or visible(out) == whole
        assert killed or visible(out) in ({}, whole)

        convert(*inputs, out, resources=ONE_THREAD)

        assert visible(out) == whole


@both
def test_an_earlier_conversion_stays_as_it_was_until_the_new_one_is_whole_whatever_fails(
    inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path, killed: bool
) -> None:
    earlier = convert(*inputs, tmp_path / "earlier", OTHER, ONE_THREAD).out

    def an_earlier_conversion(place: Path) -> Path:
        place.mkdir()
        return copy(earlier, place / "out")

    for out in each_trouble(inputs, an_earlier_conversion, tmp_path, killed=killed, overwrite=True):
        assert visible(out) in (contents(earlier), whole)

        convert(*inputs, out, resources=ONE_THREAD, overwrite=True)

        assert visible(out) == whole
        assert killed or not out.with_name("out.partial").exists()

        # What a killed run may have left beside a whole OUT is known as ours, and in nobody's way.
        convert(*inputs, out, OTHER, ONE_THREAD, overwrite=True)

        assert contents(out) == contents(earlier)
        assert not out.with_name("out.partial").exists()


@a_kill
def test_a_volume_with_an_earlier_conversion_is_never_a_mixture_whatever_fails(
    inputs: tuple[Path, Path],
    whole: dict[str, bytes],
    tmp_path: Path,
    killed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    earlier = convert(*inputs, tmp_path / "earlier", OTHER, ONE_THREAD).out

    def a_volume(place: Path) -> Path:
        place.mkdir()
        (copy(earlier, place / "out") / "lost+found").mkdir()
        return place / "out"

    found = {"lost+found": b""}
    for out in each_trouble(inputs, a_volume, tmp_path, killed=killed, overwrite=True):
        states = [contents(earlier) | found, whole | found]
        assert visible(out) in states or (killed and "config.json" not in visible(out))

        convert(*inputs, out, resources=ONE_THREAD, overwrite=True)

        assert visible(out) == whole | found


def no_swap(code: int) -> Any:
    """A C library whose `renameat2` fails."""

    class Libc:
        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(code)
            return -1

    return Libc()


@a_kill
def test_a_folder_that_turns_out_to_keep_its_name_is_never_a_mixture_whatever_fails(
    inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = convert(*inputs, tmp_path / "earlier", OTHER, ONE_THREAD).out
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: no_swap(errno.EXDEV))

    def an_earlier_conversion(place: Path) -> Path:
        place.mkdir()
        return copy(earlier, place / "out")

    for out in each_trouble(inputs, an_earlier_conversion, tmp_path, killed=killed, overwrite=True):
        assert visible(out) in (contents(earlier), whole) or (killed and "config.json" not in visible(out))

        convert(*inputs, out, resources=ONE_THREAD, overwrite=True)

        assert visible(out) == whole
        assert not out.with_name("out.partial").exists()


def when_config_arrives(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object]) -> None:
    """Do something in staging when everything but the receipt is there, before the last look at it."""
    rename = os.rename

    def watched(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).name == "config.json":
            act(Path(target).parent)

    monkeypatch.setattr(os, "rename", watched)


@pytest.mark.parametrize("reason", [RuntimeError, KeyboardInterrupt])
def test_what_goes_wrong_at_the_last_look_leaves_no_out(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path, reason: type[BaseException]
) -> None:
    def fail(_: Path) -> None:
        raise reason

    with pytest.MonkeyPatch.context() as monkeypatch:
        when_config_arrives(monkeypatch, fail)
        with pytest.raises(reason):
            convert(base, adapter, out)

    assert not out.exists()

    convert(base, adapter, out)

    assert contents(out) == whole


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"model.norm.weight"', b'"model.morm.weight"', "not (written|planned)"),
        (b'"U8"', b'"I8"', "I8 .*, planned"),
        (b'"shape": [', b'"shape": [9', "the output would not load: "),
    ],
    ids=["another name", "another dtype", "another shape in a quant state"],
)
def test_a_shard_that_is_not_as_planned_at_the_last_look_is_thrown_away(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path, old: bytes, new: bytes, message: str
) -> None:
    def damage(staging: Path) -> None:
        shard = staging / "model.safetensors"
        raw = shard.read_bytes()
        assert old in raw
        # Of the same length: spaces end a header, and digits a shape.
        at = raw.index(old)
        shard.write_bytes(raw[:at] + (new + raw[at + len(old) :])[: len(raw) - at])

    with pytest.MonkeyPatch.context() as monkeypatch:
        when_config_arrives(monkeypatch, damage)
        with pytest.raises(VerificationFailed, match=message):
            convert(base, adapter, out)

    assert list(out.parent.iterdir()) == []

    convert(base, adapter, out)

    assert contents(out) == whole


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_input_that_changes_while_it_is_read_leaves_nothing(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path, which: str
) -> None:
    base, adapter = copy(inputs[0], tmp_path / "base"), copy(inputs[1], tmp_path / "adapter")
    weights = {"base": base / "model.safetensors", "adapter": adapter / "adapter_model.safetensors"}[which]

    with pytest.raises(InputChanged) as failed:
        convert(base, adapter, out, progress=lambda progress: progress.done < 50_000 or os.utime(weights, (1, 1)))

    assert message(failed) == f"{weights}: changed while it was being read"
    assert list(out.parent.iterdir()) == []


def test_config_json_is_the_last_to_come_into_an_empty_folder(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir(parents=True)
    arrived: list[str] = []
    rename = os.rename

    def watched(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).parent == out:
            arrived.append(Path(target).name)

    monkeypatch.setattr(os, "rename", watched)

    convert(base, adapter, out)

    assert arrived[-1] == "config.json"
    assert sorted(arrived) == sorted(contents(out))


def test_a_mounted_volume_is_filled_in_place(base: Path, adapter: Path, whole: dict[str, bytes], out: Path) -> None:
    out.mkdir(parents=True)
    if os.system(f"mount -t tmpfs -o size=4m tmpfs '{out}' 2>/dev/null"):
        pytest.skip("mounting needs a privilege that this machine does not give")
    try:
        for recipe, overwrite in ((OTHER, False), (Recipe(), True)):
            convert(base, adapter, out, recipe, overwrite=overwrite)

        assert contents(out) == whole
    finally:
        os.system(f"umount '{out}'")


def test_a_folder_in_a_place_that_is_not_ours_to_write_is_filled_in_place(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(base, adapter, out, OTHER)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != out.parent)
    inode = out.stat().st_ino

    convert(base, adapter, out, overwrite=True)

    assert contents(out) == whole
    assert out.stat().st_ino == inode


def test_a_folder_of_the_same_disk_that_is_mounted_there_is_filled_in_place(
    base: Path, adapter: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = convert(base, adapter, tmp_path / "a place" / "out", OTHER).out
    elsewhere = copy(out, tmp_path / "elsewhere")
    if os.system(f"mount --bind '{elsewhere}' '{out}' 2>/dev/null"):
        pytest.skip("mounting needs a privilege that this machine does not give")
    try:
        convert(base, adapter, out, overwrite=True)
    finally:
        os.system(f"umount '{out}'")

    assert contents(elsewhere) == whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_of_a_lower_layer_of_an_overlay_is_filled_in_place(
    base: Path, adapter: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    lower, upper, merged = tmp_path / "lower", tmp_path / "upper", tmp_path / "merged"
    earlier = contents(convert(base, adapter, lower / "out", OTHER).out)
    for folder in (upper, merged):
        folder.mkdir()
    if os.system(f"mount -t tmpfs tmpfs '{upper}' 2>/dev/null"):
        pytest.skip("mounting needs a privilege that this machine does not give")
    try:
        (upper / "files").mkdir()
        (upper / "work").mkdir()
        layers = f"lowerdir={lower},upperdir={upper}/files,workdir={upper}/work"
        if os.system(f"mount -t overlay -o '{layers}' overlay '{merged}' 2>/dev/null"):
            pytest.skip("this machine has no overlays")
        try:
            convert(base, adapter, merged / "out", overwrite=True)

            assert contents(merged / "out") == whole
            assert [path.name for path in merged.iterdir()] == ["out"]
        finally:
            os.system(f"umount '{merged}'")
    finally:
        os.system(f"umount '{upper}'")
    assert contents(lower / "out") == earlier


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY], ids=errno.errorcode.get)
def test_a_folder_that_turns_out_to_keep_its_name_is_filled_in_place(
    code: int, base: Path, adapter: Path, whole: dict[str, bytes], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a lower layer of an overlay, or with something mounted on it that no list of mounts shows."""
    convert(base, adapter, out, OTHER)
    inode = out.stat().st_ino
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: no_swap(code))

    convert(base, adapter, out, overwrite=True)

    assert contents(out) == whole
    assert out.stat().st_ino == inode


def test_somebody_elses_folder_in_a_sticky_one_is_filled_in_place(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(base, adapter, out, OTHER)
    out.parent.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    inode = out.stat().st_ino

    convert(base, adapter, out, overwrite=True)

    assert contents(out) == whole
    assert out.stat().st_ino == inode


def test_where_names_cannot_be_swapped_the_earlier_conversion_is_put_aside_first(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(base, adapter, out, OTHER)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())

    convert(base, adapter, out, overwrite=True)

    assert contents(out) == whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# Only where it may


def message(refused: pytest.ExceptionInfo[ConverterError]) -> str:
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_of_the_earlier_conversion_is_not_removed_with_it(
    kind: str, base: Path, adapter: Path, out: Path
) -> None:
    convert(base, adapter, out, OTHER)
    other = out / "notes"
    other.mkdir() if kind == "folder" else other.write_text("mine")
    before = contents(out)

    with pytest.raises(BadOutput, match="also holds 'notes', which is not of that conversion") as refused:
        convert(base, adapter, out, overwrite=True)

    assert message(refused).endswith("which `overwrite` would remove with it; move it away")
    assert contents(out) == before
    assert other.exists()
    other.rmdir() if kind == "folder" else other.unlink()
    convert(base, adapter, out, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_anything_else_in_it_is_refused(base: Path, adapter: Path, out: Path, overwrite: bool) -> None:
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")

    with pytest.raises(BadOutput) as refused:
        convert(base, adapter, out, overwrite=overwrite)

    assert message(refused) == f"{out}: not empty, and not made by this tool; choose another folder"
    assert contents(out) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    "receipt",
    ["", "{}", "[]", "null", '{"format": 2, "fingerprint": "x", "files": {"a": 1}}', '{"format": 99, "files": {}}'],
)
def test_a_receipt_that_is_not_ours_does_not_make_a_folder_ours(
    base: Path, adapter: Path, out: Path, receipt: str
) -> None:
    out.mkdir(parents=True)
    (out / "conversion.json").write_text(receipt)

    with pytest.raises(BadOutput, match="not made by this tool"):
        convert(base, adapter, out, overwrite=True)


def test_a_file_in_the_place_of_out_is_refused(base: Path, adapter: Path, out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")

    with pytest.raises(BadOutput, match="exists and is not a folder"):
        convert(base, adapter, out, overwrite=True)

    assert out.read_text() == "mine"


def test_another_conversion_is_replaced_only_when_asked(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path
) -> None:
    earlier = contents(convert(base, adapter, out, OTHER).out)

    with pytest.raises(BadOutput) as refused:
        convert(base, adapter, out)

    assert message(refused) == f"{out}: holds another conversion; `overwrite` replaces it"
    assert contents(out) == earlier

    convert(base, adapter, out, overwrite=True)

    assert contents(out) == whole


def test_a_dry_run_refuses_a_taken_out_as_a_conversion_would(base: Path, adapter: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")

    with pytest.raises(BadOutput, match="not empty"):
        plan_conversion(base, adapter, out)


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("place", ["equal", "inside", "around"])
@pytest.mark.parametrize("way", ["straight", "link", "dots"])
def test_an_out_that_is_in_or_around_an_input_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path, which: str, place: str, way: str
) -> None:
    base, adapter = (copy(folder, tmp_path / "around" / folder.name) for folder in inputs)
    folder = base if which == "base" else adapter
    out = {"equal": folder, "inside": folder / "out", "around": folder.parent}[place]
    if way == "link":
        (tmp_path / "link").symlink_to(folder.parent)
        out = {"equal": tmp_path / "link" / folder.name, "inside": tmp_path / "link" / folder.name / "out"}.get(
            place, tmp_path / "link"
        )
    elif way == "dots":
        out = folder / ".." / out.relative_to(folder.parent)
    before = contents(base), contents(adapter)

    with pytest.raises(BadOutput, match="is, holds or lies inside the input"):
        convert(base, adapter, out, overwrite=True)

    assert (contents(base), contents(adapter)) == before


def test_an_input_that_is_a_link_into_out_is_seen_through(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    copy(inputs[0], tmp_path / "out" / "base")
    (tmp_path / "link").symlink_to(tmp_path / "out" / "base")

    with pytest.raises(BadOutput, match="is, holds or lies inside the input"):
        convert(tmp_path / "link", inputs[1], tmp_path / "out")


def test_a_second_run_for_the_same_out_is_refused(base: Path, adapter: Path, out: Path) -> None:
    second: list[str] = []

    def start_another(progress: object) -> None:
        if not second:
            with pytest.raises(BadOutput) as refused:
                convert(base, adapter, out)
            second.append(message(refused))

    convert(base, adapter, out, progress=start_another)

    assert second == [f"{out}.partial: another conversion is writing it"]
    assert (out / "conversion.json").exists()


def hold(staging: Path, *, journal: bool = True) -> None:
    """Make a staging folder as another run does that lives, in the place of the one that is there."""
    staging.rename(staging.with_name("aside"))
    staging.mkdir()
    for name in (".lock", ".journal") if journal else (".lock",):
        (staging / name).write_text("another's")


def test_a_lock_whose_folder_another_run_took_away_meanwhile_gives_no_right_to_the_one_that_is_there_now(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        hold(out.with_name("out.partial"))
        flock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(BadOutput, match="another conversion is writing it"):
            convert(base, adapter, out)

    assert contents(out.with_name("out.partial")) == dict.fromkeys([".lock", ".journal"], b"another's")


def test_where_nothing_is_to_be_done_a_folder_that_another_run_makes_meanwhile_stays(
    inputs: tuple[Path, Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(*inputs, out, resources=ONE_THREAD)
    staging, flock = out.with_name("out.partial"), fcntl.flock
    staging.mkdir()
    (staging / ".lock").touch()

    def late(descriptor: int, how: int) -> None:
        hold(staging)
        flock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        assert convert(*inputs, out, resources=ONE_THREAD).nothing_to_do

    assert len(contents(staging)) == 2


def test_a_run_whose_staging_folder_is_taken_away_neither_gives_the_next_ones_its_name_nor_removes_it(
    base: Path, adapter: Path, out: Path
) -> None:
    staging = out.with_name("out.partial")

    def take_away(progress: Progress) -> None:
        if progress.stage == "sealing":
            shards = {name: raw for name, raw in contents(staging).items() if name.endswith(".safetensors")}
            hold(staging)
            for name, raw in shards.items():
                (staging / name).write_bytes(raw)

    with pytest.raises(WriteFailed, match=r"out\.partial: was moved or deleted while this run was") as failed:
        convert(base, adapter, out, progress=take_away)

    assert "is kept" not in message(failed)
    assert not out.exists()
    assert (staging / ".lock").read_text() == "another's"


def test_what_a_dead_run_left_is_used_again_but_not_while_it_lives(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path
) -> None:
    staging = out.with_name("out.partial")
    (staging / "folder").mkdir(parents=True)
    (staging / "folder" / "deep").write_text("")
    (staging / "model.safetensors.unfinished").write_text("half")

    with (staging / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadOutput, match="another conversion is writing it"):
            convert(base, adapter, out)
        assert len(contents(staging)) == 3
    convert(base, adapter, out)

    assert contents(out) == whole
    assert not staging.exists()


def test_a_run_that_dies_while_it_takes_its_staging_folder_away_leaves_one_that_the_next_run_takes(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = dict.fromkeys(("plan", "layout", "base"), "it")
    destination = Destination(out, inputs=(), overwrite=False)
    unlink, left = os.unlink, 0

    def dying(*arguments: Any, **settings: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        unlink(*arguments, **settings)

    for count in range(4):
        staging = Staging(destination, job, ["a", "b"], resume=True)
        for name in ("a", "b"):
            (staging.folder / name).write_text(name)
        left = count
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", dying)
            with pytest.raises(KeyboardInterrupt), staging:
                staging.spend()

        assert (staging.folder / ".lock").exists()
        with Staging(destination, job, ["a", "b"], resume=True) as again:
            assert again.journal.entries == {}
        assert not again.folder.exists()


@pytest.mark.parametrize("act", [os.rmdir, lambda staging: (staging / ".lock").touch()], ids=["removes it", "takes it"])
def test_a_run_that_is_done_is_done_though_another_finds_its_empty_staging_folder_first(
    act: Callable[[Path], None], base: Path, adapter: Path, whole: dict[str, bytes], out: Path, tmp_path: Path
) -> None:
    convert(base, adapter, out, OTHER, resources=ONE_THREAD)
    staging, unlink = out.with_name("out.partial"), os.unlink

    def unlinked(path: Any, **settings: Any) -> None:
        unlink(path, **settings)
        if Path(path) == staging / ".lock":
            act(staging)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", unlinked)
        convert(base, adapter, out, resources=ONE_THREAD, overwrite=True)

    assert contents(out) == whole


def test_an_end_does_not_wait_for_the_sha256_of_a_shard_that_nobody_wants_any_more(out: Path) -> None:
    staging = Staging(Destination(out, inputs=(), overwrite=False), {}, ["shard"], resume=True)
    with (staging.folder / "shard").open("wb") as shard:
        shard.truncate(4 << 40)  # an hour's work

    staging.finish_soon("shard")

    with no_hang():
        while staging.folder / "shard" not in map(path_of, map(int, os.listdir("/proc/self/fd"))):
            pass
        staging.close()

    assert not staging.folder.exists()


def test_a_folder_that_happens_to_be_called_as_our_staging_folder_is_left_alone(
    base: Path, adapter: Path, out: Path
) -> None:
    staging = out.with_name("out.partial")
    staging.mkdir(parents=True)
    (staging / "notes.txt").write_text("mine")

    with pytest.raises(BadOutput, match=r"out\.partial: exists, is not empty and not a staging folder of this tool"):
        convert(base, adapter, out)

    assert contents(staging) == {"notes.txt": b"mine"}


def test_a_link_called_as_our_staging_folder_is_not_followed(base: Path, adapter: Path, out: Path) -> None:
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir(parents=True)
    out.with_name("out.partial").symlink_to(elsewhere)

    with pytest.raises(BadOutput, match="not a staging folder"):
        convert(base, adapter, out)

    assert list(elsewhere.iterdir()) == []


# Nothing to do


def is_done(base: Path, adapter: Path | None, out: Path, recipe: Recipe = Recipe()) -> bool:
    """Whether a second conversion finds nothing to do; if it does not, it must ask for --overwrite."""
    before = contents(out)
    try:
        report = convert(base, adapter, out, recipe)
    except BadOutput as refused:
        if "`overwrite` replaces it" not in str(refused):
            raise
        return False
    finally:
        assert contents(out) == before
    assert report.nothing_to_do
    assert report.fidelity == {}
    assert report.fingerprint == json.loads((out / "conversion.json").read_text())["fingerprint"]
    return True


@pytest.fixture(params=["with", "without"])
def remembered(request: pytest.FixtureRequest) -> bool:
    """Whether digests of the base are remembered from an earlier run."""
    return bool(request.param == "with")


def forget() -> None:
    for file in (Path(os.environ["XDG_CACHE_HOME"]) / "nf4-converter").rglob("*.json"):
        file.unlink()


def test_equal_inputs_and_recipe_leave_nothing_to_do(
    base: Path, adapter: Path, out: Path, tmp_path: Path, remembered: bool
) -> None:
    convert(base, adapter, out)
    if not remembered:
        forget()

    assert is_done(base, adapter, out)


def test_with_digests_remembered_an_unchanged_base_is_not_read_again(
    base: Path, adapter: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(base, adapter, out)
    read: list[int] = []
    preadv = os.preadv

    def watched(descriptor: int, buffers: Any, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        if path_of(descriptor) == base / "model.safetensors":
            read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", watched)
    size = (base / "model.safetensors").stat().st_size

    assert is_done(base, adapter, out)
    assert sum(read) < size / 10  # the header, and a few bytes that tell one base from another

    read.clear()
    forget()
    assert is_done(base, adapter, out)
    assert sum(read) > size * 0.9


def test_inputs_that_moved_are_still_the_same(base: Path, adapter: Path, out: Path, tmp_path: Path) -> None:
    convert(base, adapter, out)

    assert is_done(copy(base, tmp_path / "other" / "name"), copy(adapter, tmp_path / "another"), out)


def test_one_value_of_the_base_that_changed_is_noticed(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path, remembered: bool
) -> None:
    base = copy(inputs[0], tmp_path / "base")
    convert(base, inputs[1], out)
    shard = base / "model.safetensors"
    change_tensor(shard, "model.layers.0.mlp.up_proj.weight", lambda weight: weight[3, 5].add_(1))
    if remembered:
        os.utime(shard)  # a file that changed has another time: that is how what is remembered is known to be stale
    else:
        forget()

    assert not is_done(base, inputs[1], out)


def test_a_base_whose_file_was_replaced_under_the_same_time_is_noticed(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    base = copy(inputs[0], tmp_path / "base")
    convert(base, inputs[1], out)
    shard = base / "model.safetensors"
    other = base / "other"
    other.write_bytes(shard.read_bytes())
    change_tensor(other, "model.norm.weight", lambda weight: weight[0].add_(1))
    os.utime(other, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
    other.replace(shard)

    assert not is_done(base, inputs[1], out)


def test_a_base_that_was_written_to_in_place_under_the_same_time_is_noticed(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    base = copy(inputs[0], tmp_path / "base")
    convert(base, inputs[1], out)
    file = base / "model.safetensors"
    identity = LocalFolder(base).identity(file.name)

    change_tensor(file, "model.norm.weight", lambda tensor: tensor.add_(1))

    assert LocalFolder(base).identity(file.name) == identity
    assert not is_done(base, inputs[1], out)


def test_memory_that_cannot_be_understood_is_no_memory(base: Path, adapter: Path, out: Path, cold_cache: Path) -> None:
    convert(base, adapter, out)
    files = list((cold_cache / "nf4-converter").rglob("*.json"))
    assert files

    for nonsense in ("", "[]", "{}", '{"model.safetensors": 3}', '{"model.safetensors": {"file": null}}'):
        for file in files:
            file.write_text(nonsense)
        assert is_done(base, adapter, out)


def test_a_cache_that_cannot_be_written_stops_nobody(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    convert(base, adapter, out)

    assert contents(out) == whole
    assert is_done(base, adapter, out)


def test_a_user_without_a_home_converts_and_nothing_is_kept(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.chdir(tmp_path)

    convert(base, adapter, out)

    assert contents(out) == whole
    assert is_done(base, adapter, out)
    assert list(tmp_path.iterdir()) == [out.parent]


def test_a_full_disk_where_the_cache_is_gathers_no_files(
    base: Path, adapter: Path, out: Path, cold_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, _: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fail)

    convert(base, adapter, out)

    assert [path for path in cold_cache.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("what", ["weights", "config"])
def test_an_adapter_that_changed_is_noticed(inputs: tuple[Path, Path], out: Path, tmp_path: Path, what: str) -> None:
    adapter = copy(inputs[1], tmp_path / "adapter")
    convert(inputs[0], adapter, out)
    if what == "weights":
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
        change_tensor(adapter / "adapter_model.safetensors", name, lambda weight: weight[0, 0].add_(1))
    else:
        change_json(adapter / "adapter_config.json", lora_alpha=17)

    assert not is_done(inputs[0], adapter, out)


def test_an_adapter_that_is_left_out_is_noticed(base: Path, adapter: Path, out: Path) -> None:
    convert(base, adapter, out)

    assert not is_done(base, None, out)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(double_quant=False),
        Recipe(block_size=128),
        Recipe(quant_type="fp4"),
        Recipe(quant_type="none"),
        Recipe(dtype="float16"),
        Recipe(merge_precision="reference"),
        Recipe(keep=("o_proj",)),
        Recipe(max_shard_size=2_000_000),
    ],
    ids=str,
)
def test_another_recipe_is_noticed(base: Path, adapter: Path, out: Path, recipe: Recipe) -> None:
    convert(base, adapter, out)

    assert not is_done(base, adapter, out, recipe)


def test_memory_and_threads_are_no_part_of_it(base: Path, adapter: Path, out: Path) -> None:
    convert(base, adapter, out, resources=ONE_THREAD)

    report = convert(base, adapter, out, resources=Resources(memory=200_000_000, threads=3, kernels=False))

    assert report.nothing_to_do


def test_a_side_file_of_the_base_that_changed_is_noticed(inputs: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    (base / "generation_config.json").write_text("{}")
    convert(base, inputs[1], out)
    (base / "generation_config.json").write_text('{"top_k": 5}')

    assert not is_done(base, inputs[1], out)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_an_out_that_is_not_whole_is_not_done(base: Path, adapter: Path, out: Path, name: str, damage: str) -> None:
    convert(base, adapter, out)
    if damage == "missing":
        (out / name).unlink()
    else:
        os.truncate(out / name, 10)

    with pytest.raises(BadOutput) as refused:
        convert(base, adapter, out)

    assert message(refused) == f"{out}: holds a conversion with missing or changed files; `overwrite` replaces it"


def test_a_receipt_of_other_versions_is_not_done(base: Path, adapter: Path, out: Path) -> None:
    convert(base, adapter, out)
    change_json(out / "conversion.json", fingerprint="0" * 64)

    assert not is_done(base, adapter, out)


# What OUT holds


def test_equal_inputs_give_equal_folders_wherever_they_are(
    inputs: tuple[Path, Path], whole: dict[str, bytes], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = copy(inputs[0], tmp_path / "elsewhere" / "model"), copy(inputs[1], tmp_path / "lora")
    monkeypatch.chdir(tmp_path)

    convert("elsewhere/../elsewhere/model", "./lora", "place/out", device="cpu", resources=Resources(threads=3))

    assert contents(out) == whole
    assert base.exists()
    assert adapter.exists()


def test_the_number_of_threads_that_torch_has_changes_nothing(
    base: Path, adapter: Path, whole: dict[str, bytes], out: Path
) -> None:
    # The mean of many absmax depends on how many threads share them, so that it must be one.
    seen: set[int] = set()

    def watch(progress: Progress) -> None:
        if progress.stage == "converting":
            seen.add(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        convert(base, adapter, out, resources=Resources(threads=1), progress=watch)

        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert seen == {1}
    assert contents(out) == whole


def test_no_file_of_out_tells_a_place_or_a_time(base: Path, adapter: Path, whole: dict[str, bytes]) -> None:
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    for name, raw in whole.items():
        for place in (str(base.parent.parent), f"{Path.home()}/", os.uname().nodename):
            assert place.encode() not in raw, (name, place)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_the_umask_gives(base: Path, adapter: Path, out: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        convert(base, adapter, out)
    finally:
        os.umask(before)

    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~umask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


def test_the_receipt_knows_size_and_sha256_of_every_file_but_the_card(whole: dict[str, bytes]) -> None:
    receipt = json.loads(whole["conversion.json"])

    others = {name: raw for name, raw in whole.items() if name not in ("conversion.json", "SHA256SUMS", "README.md")}
    assert receipt["files"] == {
        name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in others.items()
    }


def test_the_usual_tool_can_check_the_files(whole: dict[str, bytes]) -> None:
    others = {name: raw for name, raw in sorted(whole.items()) if name not in ("SHA256SUMS", "README.md")}

    # One line a file, as `sha256sum --check SHA256SUMS` reads them.
    lines = [f"{hashlib.sha256(raw).hexdigest()}  {name}\n" for name, raw in others.items()]
    assert whole["SHA256SUMS"].decode() == "".join(lines)


@pytest.mark.parametrize("merge_precision", ["float32", "reference"])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bitsandbytes"])
def test_the_figures_in_the_receipt_are_those_of_a_plain_computation(
    inputs: tuple[Path, Path], out: Path, quant_type: Any, merge_precision: Any, kernels: bool
) -> None:
    base, adapter = inputs
    recipe = Recipe(quant_type=quant_type, double_quant=False, merge_precision=merge_precision, keep=("o_proj",))

    convert(base, adapter, out, recipe, Resources(kernels=kernels))

    source, factors, written = tensors_of(base), tensors_of(adapter), tensors_of(out)
    entries = json.loads((out / "conversion.json").read_text())["tensors"]
    assert entries.keys() == source.keys()
    for name, weight in source.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        exact, delta = weight.float(), None
        if f"{module}.lora_A.weight" in factors:
            delta = (factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]) * 2.0
            exact = exact + delta
        found = restored(written, name).double()
        error = float((found - exact.double()).norm() / exact.double().norm())
        assert entries[name]["error"] == pytest.approx(error, rel=6e-6, abs=1e-12), name  # six digits are given
        assert (delta is not None) == ("survival" in entries[name]) == ("lora" in entries[name])
        if delta is not None:
            moved, along = found - weight.double(), delta.double()
            survival = float((moved * along).sum() / (along * along).sum())
            assert entries[name]["survival"] == pytest.approx(survival, rel=6e-6), name


def restored(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a written weight stands for, in float32."""
    module = name.removesuffix(".weight")
    if f"{module}.SCB" in tensors:
        return tensors[name].float() * (tensors[f"{module}.SCB"][:, None] / 127)
    if f"{name}.absmax" not in tensors:
        return tensors[name].float()
    parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    return dequantize_4bit(tensors[name], state)


def test_a_report_and_its_receipt_agree(base: Path, adapter: Path, out: Path) -> None:
    report: Report = convert(base, adapter, out)

    receipt = json.loads((out / "conversion.json").read_text())
    assert report.out == out
    assert receipt["fingerprint"] == report.fingerprint
    assert receipt["recipe"]["dtype"] == "bfloat16"
    for name, fidelity in report.fidelity.items():
        assert receipt["tensors"][name]["error"] == fidelity.error


def test_several_shards_have_an_index_and_keep_each_weight_in_one(tmp_path: Path, out: Path) -> None:
    base = save_base(tmp_path / "base", "llama", vocab_size=8192, sharded=True)

    convert(base, None, out, Recipe(max_shard_size=1_000_000))

    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    found: dict[str, str] = {}
    for shard in shards:
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), shard)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    for name, shard in found.items():
        weight, dot, _ = name.partition(".weight.")
        assert not dot or shard == found[f"{weight}.weight"]
    assert load(out).model.layers[1].mlp.up_proj.weight.quant_state is not None


# Side files


def with_side_files(base: Path, target: Path) -> Path:
    target = copy(base, target)
    for name in (
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "LICENSE",
        "USE_POLICY.md",
        "README.md",
        "pytorch_model.bin",
        "training_args.bin",
        "model.safetensors.bak",
        "modeling_own.py",
        ".gitattributes",
        "notes.txt",
    ):
        (target / name).write_text("{}")
    (target / "original").mkdir()
    return target


def save_tokenizer(source: Path, target: Path, **changes: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    change_json(target / "tokenizer_config.json", **changes)


def test_all_that_is_no_weights_is_copied_and_nothing_else(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    base = with_side_files(inputs[0], tmp_path / "base")

    convert(base, inputs[1], out)

    assert contents(out).keys() == {
        *(
            "SHA256SUMS",
            "LICENSE",
            "README.md",
            "USE_POLICY.md",
            "chat_template.jinja",
            "config.json",
            "conversion.json",
        ),
        *("generation_config.json", "model.safetensors", "notes.txt", "preprocessor_config.json"),
    }
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_the_bases_tokenizer_is_taken_where_the_adapter_has_no_vocabulary(
    inputs: tuple[Path, Path], tiny_base: Path, out: Path, tmp_path: Path
) -> None:
    base, adapter = copy(inputs[0], tmp_path / "base"), copy(inputs[1], tmp_path / "adapter")
    save_tokenizer(tiny_base, base, model_max_length=11)
    # A vocabulary makes a tokenizer; its config alone, or a chat template, belongs to one that isn't there.
    (adapter / "tokenizer_config.json").write_text('{"model_max_length": 22}')
    (adapter / "chat_template.jinja").write_text("theirs")

    convert(base, adapter, out)

    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(out).model_max_length == 11
    assert not (out / "chat_template.jinja").exists()


def test_the_adapters_tokenizer_is_taken_as_one_set(tiny_base: Path, out: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", vocab_size=8192)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    save_tokenizer(tiny_base, base, model_max_length=11)
    save_tokenizer(tiny_base, adapter, model_max_length=22)
    (base / "special_tokens_map.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("theirs")

    convert(base, adapter, out)

    assert AutoTokenizer.from_pretrained(out).model_max_length == 22
    assert (out / "chat_template.jinja").read_text() == "theirs"
    assert not (out / "special_tokens_map.json").exists()


def test_an_adapters_tokenizer_with_tokens_that_the_embedding_lacks_is_refused(
    inputs: tuple[Path, Path], tiny_base: Path, out: Path, tmp_path: Path
) -> None:
    adapter = copy(inputs[1], tmp_path / "adapter")
    save_tokenizer(tiny_base, adapter)

    with pytest.raises(AdapterMismatch, match=r"its tokenizer has a token [\d,]+, the embedding 256 rows"):
        convert(inputs[0], adapter, out)

    assert not out.parent.exists()


@pytest.mark.parametrize("vocabulary", ["", "[]", '{"model": {"vocab": {"a": "b"}}}', '{"model": 3}'])
def test_an_adapters_tokenizer_that_cannot_be_read_is_refused(
    inputs: tuple[Path, Path], out: Path, tmp_path: Path, vocabulary: str
) -> None:
    adapter = copy(inputs[1], tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text(vocabulary)

    with pytest.raises(ConversionRefused, match=r"tokenizer\.json: not a tokenizer"):
        convert(inputs[0], adapter, out)


@pytest.fixture
def base_with_code(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A base that names Python code, which leaves a trace if it runs."""
    base = copy(inputs[0], tmp_path / "base")
    change_json(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (base / "parts").mkdir()
    for name in ("modeling_own.py", "helper.py", "parts/inner.py"):
        (base / name).write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nraise SystemExit\n")
    return base


def test_code_that_a_base_names_is_refused(base_with_code: Path, adapter: Path, out: Path) -> None:
    with pytest.raises(ConversionRefused, match=r"auto_map.*`trust_remote_code`"):
        convert(base_with_code, adapter, out)

    assert not out.parent.exists()


def test_code_that_a_base_names_is_copied_if_trusted_and_never_run(
    base_with_code: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    convert(base_with_code, adapter, out, trust_remote_code=True)

    for name in ("modeling_own.py", "helper.py", "parts/inner.py"):  # which one imports may be seen only by running it
        assert (out / name).read_bytes() == (base_with_code / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["auto_map"]
    assert not (tmp_path / "trace").exists()


def test_code_that_a_tokenizer_names_is_refused_and_copied_if_trusted(
    inputs: tuple[Path, Path], tiny_base: Path, out: Path, tmp_path: Path
) -> None:
    base = copy(inputs[0], tmp_path / "base")
    save_tokenizer(tiny_base, base, auto_map={"AutoTokenizer": ["tokenization_own.Slow", None]})
    (base / "tokenization_own.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")

    with pytest.raises(ConversionRefused, match=r"tokenizer_config\.json names Python code \(tokenization_own\.py\)"):
        convert(base, inputs[1], out)
    convert(base, inputs[1], out, trust_remote_code=True)

    assert (out / "tokenization_own.py").exists()
    assert not (tmp_path / "trace").exists()


# The model card


def test_the_card_names_base_and_recipe(inputs: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    adapter = copy(inputs[1], tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="maker/base-7b")

    base = copy(inputs[0], tmp_path / "base-7b")

    convert(base, adapter, out, Recipe(keep=("o_proj",)))

    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: maker/base-7b\nbase_model_relation: finetune\n")
    assert "- bitsandbytes\n- 4-bit\n- lora-merged\n" in card
    for row in ("quant type | nf4", "double quant | true", "block size | 64", "kept in 16 bits | o_proj"):
        assert f"| {row} |" in card
    assert 'AutoModelForCausalLM.from_pretrained("PATH")' in card


@pytest.mark.parametrize("config", [{}, {"_name_or_path": "elsewhere/another"}])
def test_a_base_that_the_adapter_does_not_name_is_not_named_by_the_adapter(
    config: dict[str, str], inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    adapter, base = copy(inputs[1], tmp_path / "adapter"), copy(inputs[0], tmp_path / "base")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="maker/base-7b")
    change_json(base / "config.json", **config)

    convert(base, adapter, out)

    card, receipt = (out / "README.md").read_text(), (out / "conversion.json").read_text()
    assert "base-7b" not in card
    assert json.loads(receipt)["origin"]["base_name"] is None
    assert "a local base, with a local adapter merged in" in card


@pytest.mark.parametrize("folder", ["maker/base-7b", "models--maker--base-7b/snapshots/0123", "kept"])
def test_a_base_in_a_folder_is_named_where_folder_or_config_has_the_name_that_the_adapter_has(
    folder: str, inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    adapter, base = copy(inputs[1], tmp_path / "adapter"), tmp_path / folder
    base.parent.mkdir(parents=True, exist_ok=True)
    copy(inputs[0], base)
    change_json(adapter / "adapter_config.json", base_model_name_or_path="maker/base-7b")
    if folder == "kept":
        change_json(base / "config.json", _name_or_path="maker/base-7b")

    report = convert(base, adapter, out)

    assert json.loads((out / "conversion.json").read_text())["origin"]["base_name"] == "maker/base-7b"
    assert not any("this base has another name" in note for note in report.plan.notes)


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("inside", [".journal", ".lock"]),
        ("inside", [".lock"]),
        ("inside", []),
        ("beside", [".lock", "config.json", "model.safetensors"]),
        ("beside", [".lock"]),
        ("beside", []),
    ],
)
def test_what_a_run_left_that_died_right_after_it_had_made_out_goes_with_the_next(
    where: str, left: list[str], inputs: tuple[Path, Path], out: Path
) -> None:
    convert(*inputs, out, resources=ONE_THREAD)
    staging = out / ".partial" if where == "inside" else out.with_name("out.partial")
    staging.mkdir()
    for name in left:
        (staging / name).write_bytes(b"")

    assert convert(*inputs, out, resources=ONE_THREAD).nothing_to_do

    assert not staging.exists()


@pytest.mark.parametrize(
    "left",
    [[".journal", ".lock", "model.safetensors.unfinished"], ["thesis.txt"]],
    ids=["unfinished work", "no staging folder"],
)
def test_where_nothing_is_to_be_done_a_folder_beside_out_that_may_be_wanted_stays(
    left: list[str], inputs: tuple[Path, Path], out: Path
) -> None:
    convert(*inputs, out, resources=ONE_THREAD)
    staging = out.with_name("out.partial")
    staging.mkdir()
    for name in left:
        (staging / name).write_bytes(b"")

    assert convert(*inputs, out, resources=ONE_THREAD).nothing_to_do

    assert sorted(path.name for path in staging.iterdir()) == left


def test_where_nothing_is_to_be_done_a_staging_folder_that_another_run_holds_stays(
    inputs: tuple[Path, Path], out: Path
) -> None:
    convert(*inputs, out, resources=ONE_THREAD)
    staging = out.with_name("out.partial")
    staging.mkdir()
    with (staging / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        assert convert(*inputs, out, resources=ONE_THREAD).nothing_to_do

    assert (staging / ".lock").exists()

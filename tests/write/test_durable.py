"""Small files: when they have their name, and what is left and said when the disk fails."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from converter.errors import WriteFailed
from converter.write.durable import LOCAL_DISK, Disk, writing
from tests.disks import failing, raising
from tests.limits import files_of_at_most


def names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def test_a_file_holds_its_bytes_and_nothing_else_is_left(tmp_path: Path) -> None:
    LOCAL_DISK.put(tmp_path / "config.json", b"{}\n")

    assert (tmp_path / "config.json").read_bytes() == b"{}\n"
    assert names(tmp_path) == {"config.json"}


def test_a_file_is_durable_before_it_has_its_name_and_its_name_after(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"old")
    calls: list[str] = []

    class Watched(Disk):
        def sync(self, descriptor: int) -> None:
            calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
            super().sync(descriptor)

        def rename(self, path: Path, other: Path) -> None:
            assert (path.read_bytes(), other.read_bytes()) == (b"new", b"old")
            calls.append(f"rename {path.name} {other.name}")
            super().rename(path, other)

    Watched().put(tmp_path / "config.json", b"new")

    temporary = "config.json.unfinished"
    assert calls == [f"sync {temporary}", f"rename {temporary} config.json", f"sync {tmp_path.name}"]
    assert (tmp_path / "config.json").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["create", "append", "sync", "close", "rename"])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(call: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"old")

    with pytest.raises(WriteFailed) as caught:
        failing(call).put(tmp_path / "config.json", b"new")

    assert str(caught.value) == f"{tmp_path}/config.json: Input/output error"
    assert (tmp_path / "config.json").read_bytes() == b"old"


def test_a_disk_without_room_for_it_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with files_of_at_most(4096), pytest.raises(WriteFailed, match=r"/config\.json: File too large$"):
        LOCAL_DISK.put(tmp_path / "config.json", bytes(5000))

    assert "config.json" not in names(tmp_path)


def test_a_write_that_the_system_cuts_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, write = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda descriptor, raw, at: pwrite(descriptor, raw[:5], at))
    monkeypatch.setattr(os, "write", lambda descriptor, raw: write(descriptor, raw[:3]))
    descriptor = LOCAL_DISK.create(tmp_path / "file")

    LOCAL_DISK.append(descriptor, b"01234567")
    LOCAL_DISK.write(descriptor, b"abcdefghijkl", 8)
    LOCAL_DISK.close(descriptor)

    assert (tmp_path / "file").read_bytes() == b"01234567abcdefghijkl"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_filesystem_that_cannot_reserve_room_has_files_of_the_size_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", raising(code))
    descriptor = LOCAL_DISK.create(tmp_path / "file")

    LOCAL_DISK.reserve(descriptor, 1000)
    LOCAL_DISK.close(descriptor)

    assert (tmp_path / "file").stat().st_size == 1000


def test_a_copy_has_all_bytes(tmp_path: Path) -> None:
    raw = os.urandom(9 << 20)
    (tmp_path / "source").write_bytes(raw)
    target = LOCAL_DISK.create(tmp_path / "target")
    with (tmp_path / "source").open("rb") as source:
        LOCAL_DISK.copy(source.fileno(), target)
    LOCAL_DISK.close(target)

    assert (tmp_path / "target").read_bytes() == raw


def test_a_full_disk_is_told_with_what_is_needed_what_there_is_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_234))

    with pytest.raises(WriteFailed) as caught:
        failing("append", code=errno.ENOSPC).put(tmp_path / "config.json", bytes(5_678))

    assert str(caught.value) == (
        f"{tmp_path}/config.json: No space left on device: 5,678 bytes are needed for this file, its disk has 1,234 "
        "free; make room there"
    )


def test_a_quota_that_is_used_up_is_told_apart_from_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed) as caught, writing(tmp_path / "file"):
        raising(errno.EDQUOT)()

    assert str(caught.value) == (
        f"{tmp_path}/file: Disk quota exceeded: your quota on its disk is used up; make room there"
    )


def test_a_full_disk_whose_room_cannot_be_asked_for_is_told_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed) as caught, writing(tmp_path / "gone" / "file"):
        raising(errno.ENOSPC)()

    assert str(caught.value).endswith("/file: No space left on device: its disk has none left; make room there")

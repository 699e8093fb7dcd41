"""A finished shard in another output: linked, cloned or copied."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from converter.seal.link import link
from converter.write.durable import Disk
from tests.disks import failing


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(b"weights" * 1000)
    return tmp_path / "source"


def test_a_hard_link_is_the_same_file(source: Path, tmp_path: Path) -> None:
    assert link(source, tmp_path / "target", "hard") == "hard"
    assert (tmp_path / "target").samefile(source)


def test_a_copy_is_another_file_with_the_same_bytes_and_the_umasks_mode(source: Path, tmp_path: Path) -> None:
    assert link(source, tmp_path / "target", "copy") == "copy"
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert not (tmp_path / "target").samefile(source)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


def test_whatever_has_the_name_is_replaced_and_not_written_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    for how in ("hard", "copy"):
        (tmp_path / "target").unlink(missing_ok=True)
        (tmp_path / "target").symlink_to(tmp_path / "precious")
        link(source, tmp_path / "target", how)
        assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_no_hard_link_can_be_auto_finds_another_way(code: int, source: Path, tmp_path: Path) -> None:
    disk = failing("link", code=code)

    assert link(source, tmp_path / "target", "auto", disk) in ("reflink", "copy")

    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    with pytest.raises(OSError, match=os.strerror(code)):
        link(source, tmp_path / "other", "hard", disk)


def test_a_disk_that_fails_is_not_taken_for_one_without_links(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        link(source, tmp_path / "target", "auto", failing("link"))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL])
def test_a_reflink_that_can_not_be_is_refused_if_asked_for_and_leaves_the_name_as_it_was(
    code: int, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").write_bytes(b"before")

    with pytest.raises(OSError, match=os.strerror(code)):
        link(source, tmp_path / "target", "reflink", failing("clone", code=code))

    assert (tmp_path / "target").read_bytes() == b"before"


def test_a_reflink_where_the_filesystem_has_them_copies_nothing(source: Path, tmp_path: Path) -> None:
    class Cloning(Disk):
        def clone(self, source: int, target: int) -> None:
            os.sendfile(target, source, 0, 1 << 20)

        def copy(self, source: int, target: int) -> None:
            raise AssertionError

    assert link(source, tmp_path / "target", "reflink", Cloning()) == "reflink"
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("call", ["create", "append", "sync", "close", "rename"])
def test_a_copy_that_fails_leaves_the_name_as_it_was(call: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"before")

    with pytest.raises(OSError, match="Input/output error"):
        link(source, tmp_path / "target", "copy", failing(call))

    assert (tmp_path / "target").read_bytes() == b"before"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

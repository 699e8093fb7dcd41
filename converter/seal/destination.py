"""OUT: whether it may be written, where its parts gather, and how it gets its name, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from converter.errors import BadOutput
from converter.read.checkpoint import CONFIG
from converter.read.checksums import SUMS
from converter.seal.receipt import CARD, RECEIPT, read_receipt
from converter.write.journal import JOURNAL
from converter.write.lock import LOCK, Lock
from converter.write.renaming import can_be_renamed, exchange
from converter.write.shard import sync_folder, writing

OURS = frozenset({LOCK, JOURNAL})
"""Files of a staging folder that are none of the checkpoint's."""
_INSIDE = ".partial"
_REPLACED = "replaced"
_PRESENT_IN_EMPTY = frozenset({"lost+found", _INSIDE})  # a mounted volume's own folder, and a dead run's staging


class Destination:
    """OUT: whether it may be written, and where its parts gather until it is whole. Refuses with `BadOutput`."""

    def __init__(self, out: Path, *, inputs: Iterable[Path], overwrite: bool) -> None:
        self.out = Path(os.path.realpath(out.expanduser()))
        for folder in inputs:
            real = Path(os.path.realpath(folder))
            if self.out == real or self.out in real.parents or real in self.out.parents:
                raise BadOutput(f"{out}: is, holds or lies inside the input {folder}; choose a folder of its own")
        self.receipt: dict[str, Any] | None = None
        self.accepted = False
        """Whether OUT is the new one; what is in staging then is of no more use."""
        self._overwrite = overwrite
        self._occupied = False
        self._inside = False
        self._names: set[str] = set()
        self._refuse_if_impossible()
        if self.out.exists():
            names = self._names = {entry.name for entry in os.scandir(self.out)}
            self.receipt = read_receipt(self.out)
            self._occupied = bool(names - _PRESENT_IN_EMPTY) and not self._is_half_moved_in(names)
            # An earlier run has found that it can't be renamed where its staging folder is inside.
            self._inside = not self._occupied or _INSIDE in names or not can_be_renamed(self.out)

    def _refuse_if_impossible(self) -> None:
        """`BadOutput` where there can be no such folder, or no staging folder beside it."""
        try:
            Path(f"{self.out}.partial").exists()
            # With lexists, for a link to itself leads nowhere, and is in the way.
            nearest = next(path for path in (self.out, *self.out.parents) if os.path.lexists(path))
        except OSError as exc:  # names that are too long, folders that may not be looked into
            raise BadOutput(f"{self.out}: {exc.strerror}") from exc
        if not nearest.is_dir():
            raise BadOutput(f"{nearest}: exists and is not a folder")

    def holds(self, fingerprint: str) -> bool:
        """Whether OUT is a finished conversion of this fingerprint, with all its files there in their sizes."""
        if self.receipt is None or self.receipt["fingerprint"] != fingerprint or not self._is_whole():
            return False
        with contextlib.suppress(OSError):  # a run died right after it gave OUT its name
            self._tidy()
            for folder in (self.out / _INSIDE, self.out.with_name(self.out.name + ".partial")):
                _remove_if_spent(folder)
        return True

    def refuse_if_taken(self) -> None:
        """`BadOutput` unless OUT is free, or holds a conversion that `--overwrite` may replace."""
        if not self._occupied:
            return
        if self.receipt is None:
            raise BadOutput(f"{self.out}: not empty, and not made by this tool; choose another folder")
        if not self._overwrite:
            what = "another conversion" if self._is_whole() else "a conversion with missing or changed files"
            raise BadOutput(f"{self.out}: holds {what}; --overwrite replaces it")
        if not self._inside and (others := self._names - self._names_in_receipt() - OURS - _PRESENT_IN_EMPTY):
            raise BadOutput(
                f"{self.out}: also holds {min(others)!r}, which is not of that conversion, and which --overwrite would "
                "remove with it; move it away"
            )

    def refuse_if_too_full(self, nbytes: int) -> None:
        """`BadOutput` if the disk has no room for `nbytes`, what an earlier run has left there counted in."""
        if (free := room([self.staging])) < nbytes:
            raise BadOutput(f"{self.out}: {nbytes:,} bytes are needed, the disk has {free:,} free")

    @property
    def staging(self) -> Path:
        """Where OUT's parts gather; on OUT's filesystem."""
        return self.out / _INSIDE if self._inside else self.out.with_name(self.out.name + ".partial")

    def accept(self) -> None:
        """Make the whole staging folder OUT. Its lock holds until it has the name, so that no other run touches it."""
        with writing(self.out):
            if self._inside:
                self._move_in()
            elif self._occupied:
                self._swap()
            else:
                self.staging.rename(self.out)
                self.accepted = True
                self._tidy()
            sync_folder(self.out.parent)

    def _tidy(self) -> None:
        for name in OURS:
            (self.out / name).unlink(missing_ok=True)

    def _swap(self) -> None:
        # The same lock in both folders: whichever is OUT.partial is a staging folder, should this run die now.
        with contextlib.suppress(OSError):
            (self.out / LOCK).hardlink_to(self.staging / LOCK)
        try:
            try:
                exchange(self.staging, self.out)
            except OSError as exc:
                if exc.errno != errno.EXDEV:
                    raise
                # A folder in a lower layer of an overlay: it keeps its name, and lets files and a new folder in.
                self._tidy()
                self.staging.rename(self.out / _INSIDE)
                self._inside = True
                self._move_in()
                return
            self.accepted = True
            sync_folder(self.out.parent)
        finally:
            self._tidy()
        remove(self.staging)

    def _move_in(self) -> None:
        """Move one file after the other; what fails or is interrupted is undone.

        The old config.json leaves first and the new one comes last: in between the folder is no checkpoint.
        """
        new = sorted({entry.name for entry in os.scandir(self.staging)} - OURS, key=_arrival)
        moves = [(self.staging / name, self.out / name) for name in new]
        if self.receipt is not None:
            aside = self.staging / _REPLACED
            aside.mkdir()
            own = {entry.name for entry in os.scandir(self.out)} & self._names_in_receipt()
            moves[:0] = [(self.out / name, aside / name) for name in sorted(own, key=_arrival, reverse=True)]
        try:
            for source, target in moves:
                if target == self.out / CONFIG:
                    sync_folder(self.out)
                source.rename(target)
        except BaseException:
            for source, target in reversed(moves):
                if target.exists() and not source.exists():
                    target.rename(source)
            raise
        self.accepted = True
        sync_folder(self.out)
        remove(self.staging)

    def _is_half_moved_in(self, names: set[str]) -> bool:
        """Whether OUT is what a run left that died while it moved its files in."""
        if self.receipt is None or _INSIDE not in names or CONFIG in names:
            return False
        return names <= _PRESENT_IN_EMPTY | self._names_in_receipt()

    def _names_in_receipt(self) -> set[str]:
        assert self.receipt is not None  # noqa: S101  (asked only of conversions)
        return {RECEIPT, SUMS, CARD, *self.receipt["files"]}

    def _is_whole(self) -> bool:
        assert self.receipt is not None  # noqa: S101  (asked only of conversions)
        try:
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.out)}
        except OSError:
            return False
        return all(sizes.get(name) == file.get("bytes") for name, file in self.receipt["files"].items())


def room(folders: Sequence[Path]) -> int:
    """Bytes that some staging folders of one disk may come to: what is free, and what they hold already."""
    held: dict[int, int] = {}  # by inode: what has several names, linked by a batch, is one file
    for folder in folders:
        with contextlib.suppress(OSError):  # it isn't there, or what is made in it will say what is wrong with it
            files = [entry.stat(follow_symlinks=False) for entry in os.scandir(folder)]
            held |= {file.st_ino: file.st_size for file in files}
    return shutil.disk_usage(first_that_exists(folders[0])).free + sum(held.values())


def first_that_exists(path: Path) -> Path:
    """A path, or the nearest folder above it that there is."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def remove(folder: Path) -> None:
    """Take a staging folder away."""
    clear(folder)
    try:
        folder.rmdir()
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # without its lock, another run may have it already
            raise


def _remove_if_spent(folder: Path) -> None:
    """Take away what is left of a staging folder whose run had made OUT of it; not the work of another run."""
    if folder.is_symlink() or not folder.is_dir():
        return
    names = set(os.listdir(folder))
    if names - OURS and (JOURNAL in names or LOCK not in names):
        return  # what a journal tells of can be gone on with; what has no lock isn't ours
    if LOCK in names:
        lock = Lock(folder)
        try:
            remove(folder)
        finally:
            lock.release()
    else:
        folder.rmdir()  # empty: the lock goes last


def clear(folder: Path, *, but: Collection[str] = ()) -> None:
    """Empty a staging folder: first the journal, which tells of the rest; last the lock, by which it is known."""
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.name == LOCK, entry.name != JOURNAL)):
        if entry.name in but:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink()


def _arrival(name: str) -> tuple[bool, bool, str]:
    """Order of moving in: the receipt, which names all files, first; config.json, which makes a checkpoint, last."""
    return name != RECEIPT, name == CONFIG, name

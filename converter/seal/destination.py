"""OUT: whether it may be written, where its files gather, and how it gets its name, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from converter.errors import BadOutput, OutputLocked
from converter.lock import LOCK, Lock
from converter.read.checkpoint import CONFIG
from converter.read.checksums import SUMS
from converter.read.digests import digests_of
from converter.seal.link import link
from converter.seal.receipt import CARD, RECEIPT, fingerprint_of, origin_of, read_receipt
from converter.write.durable import LOCAL_DISK, Disk, writing
from converter.write.journal import JOURNAL, Journal
from converter.write.renaming import can_be_renamed, exchange

if TYPE_CHECKING:
    from converter.plan.inputs import Inputs
    from converter.plan.plan import Plan
    from converter.write.uploads import Uploads

BASE = ".base"
"""The folder in a staging folder that has files of a base while they are read."""
OURS = frozenset({LOCK, JOURNAL})
"""Files of a staging folder that don't belong to the checkpoint."""
_INSIDE = ".partial"
_REPLACED = "replaced"
_PRESENT_IN_EMPTY = frozenset({"lost+found", _INSIDE})  # a mounted volume's own folder; an earlier run's staging folder


class Place(Protocol):
    """OUT: whether it may be written, where its files gather until it is whole, and how it gets its name."""

    receipt: dict[str, Any] | None
    """Of the conversion that lies there; None if none does."""
    accepted: bool
    """Whether OUT is the new one. What is left in staging is then of no more use."""

    @property
    def label(self) -> str:
        """How messages call it."""

    @property
    def staging(self) -> Path:
        """Where OUT's files gather: a folder of this machine."""

    def receipt_for(self, plan: Plan) -> dict[str, Any] | None:
        """`receipt`; where OUT has several versions, it becomes that of the one which a plan like this made."""

    def holds(self, fingerprint: str) -> bool:
        """Whether OUT is a finished conversion of this fingerprint, and all its files are there in their sizes."""

    def refuse_if_taken(self) -> None:
        """`BadOutput` unless OUT is free, or holds a conversion that `--overwrite` may replace."""

    def room_for(self, plan: Plan, disk: int | None = None) -> int:
        """Bytes that OUT takes of this machine's disk while it is made; `disk`: how many it may take at the most."""

    def least_room_for(self, plan: Plan) -> int:
        """The smallest `disk` with which it can be made."""

    def refuse_if_too_full(self, nbytes: int) -> None:
        """`BadOutput` if this machine's disk has no room for `nbytes`."""

    def uploads(self, journal: Journal, disk: Disk) -> Uploads | None:
        """What takes finished shards away; None if OUT lies on this machine."""

    def accept(self) -> None:
        """Make the finished staging folder OUT."""

    def publish(self, folder: Path, measured: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Make OUT of a finished output that lies in another folder, and stays there. If it fails, or the process dies,
        it may be called again. `measured`: gates and evaluation, for stores that show them."""


class Destination:
    """OUT in a folder of this machine. `BadOutput` if it can't be OUT."""

    def __init__(self, out: Path, *, inputs: Iterable[Path], overwrite: bool) -> None:
        self.out = Path(os.path.realpath(out.expanduser()))
        for folder in inputs:
            real = Path(os.path.realpath(folder))
            if self.out == real or self.out in real.parents or real in self.out.parents:
                raise BadOutput(f"{out}: is, holds or lies inside the input {folder}; choose another folder")
        self.receipt: dict[str, Any] | None = None
        self.accepted = False
        """Whether OUT is the new one. What is left in staging is then of no more use."""
        self._overwrite = overwrite
        self._occupied = False
        self._inside = False
        self._names: set[str] = set()
        self._refuse_if_impossible()
        if self.out.exists():
            names = self._names = {entry.name for entry in os.scandir(self.out)}
            self.receipt = read_receipt(self.out)
            self._occupied = bool(names - _PRESENT_IN_EMPTY) and not self._is_half_moved_in(names)
            # A staging folder inside says that an earlier run found that OUT can't be renamed.
            self._inside = not self._occupied or _INSIDE in names or not can_be_renamed(self.out)

    def _refuse_if_impossible(self) -> None:
        """`BadOutput` if there can be no such folder, or no staging folder beside it."""
        try:
            Path(f"{self.out}.partial").exists()
            # lexists, because a link to itself leads nowhere and is in the way.
            nearest = next(path for path in (self.out, *self.out.parents) if os.path.lexists(path))
        except OSError as exc:  # a name that is too long, a folder that may not be searched
            raise BadOutput(f"{self.out}: {exc.strerror}") from exc
        if not nearest.is_dir():
            raise BadOutput(f"{nearest}: exists and is not a folder")

    def receipt_for(self, plan: Plan) -> dict[str, Any] | None:
        return self.receipt

    def holds(self, fingerprint: str) -> bool:
        """Whether OUT is a finished conversion of this fingerprint, and all its files are there in their sizes."""
        if self.receipt is None or self.receipt["fingerprint"] != fingerprint or not self._is_whole():
            return False
        with contextlib.suppress(OSError):  # a run may have died right after it gave OUT its name
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
            raise BadOutput(f"{self.out}: holds {what}; `overwrite` replaces it")
        if not self._inside and (others := self._names - self._names_in_receipt() - OURS - _PRESENT_IN_EMPTY):
            raise BadOutput(
                f"{self.out}: also holds {min(others)!r}, which is not of that conversion, and which `overwrite` would "
                "remove with it; move it away"
            )

    @property
    def label(self) -> str:
        return str(self.out)

    def room_for(self, plan: Plan, disk: int | None = None) -> int:
        return plan.output_bytes

    def least_room_for(self, plan: Plan) -> int:
        return plan.output_bytes

    def uploads(self, journal: Journal, disk: Disk) -> None:
        return None

    def refuse_if_too_full(self, nbytes: int) -> None:
        """`BadOutput` if the disk has no room for `nbytes`. What an earlier run left in staging counts as free."""
        if (free := room([self.staging, self.staging / BASE])) < nbytes:
            raise BadOutput(
                f"{self.out}: {nbytes:,} bytes are needed, the disk has {free:,} free; make room for {nbytes - free:,} "
                "more, or choose a folder on another disk"
            )

    @property
    def staging(self) -> Path:
        """Where OUT's files gather: a folder on OUT's filesystem."""
        return self.out / _INSIDE if self._inside else self.out.with_name(self.out.name + ".partial")

    def accept(self) -> None:
        """Make the finished staging folder OUT. It is locked until it has the name, so that no other run touches it."""
        with writing(self.out):
            if self._inside:
                self._move_in()
            elif self._occupied:
                self._swap()
            else:
                self.staging.rename(self.out)
                self.accepted = True
                self._tidy()
            LOCAL_DISK.sync_folder(self.out.parent)

    def publish(self, folder: Path, measured: Mapping[str, Any] = MappingProxyType({})) -> None:
        with writing(self.staging):
            LOCAL_DISK.make_folder(self.staging)
            names = os.listdir(self.staging)
            if JOURNAL in names or (names and LOCK not in names):
                raise BadOutput(f"{self.staging}: another run left it there; finish that run, or delete the folder")
            try:
                lock = Lock(self.staging)
            except BlockingIOError:
                raise OutputLocked(f"{self.staging}: another run is writing it") from None
            try:
                clear(self.staging, but={LOCK})
                for name in sizes_in(folder):
                    LOCAL_DISK.make_folder((self.staging / name).parent)
                    link(folder / name, self.staging / name)
                self.accept()
            finally:
                lock.release()

    def _tidy(self) -> None:
        for name in OURS:
            (self.out / name).unlink(missing_ok=True)

    def _swap(self) -> None:
        # The same lock in both folders: should this run die now, whichever is OUT.partial is a staging folder.
        with contextlib.suppress(OSError):
            (self.out / LOCK).hardlink_to(self.staging / LOCK)
        try:
            try:
                exchange(self.staging, self.out)
            except OSError as exc:
                # Of a lower layer of an overlay, or mounted unseen: it keeps its name, but takes files and folders.
                if exc.errno not in (errno.EXDEV, errno.EBUSY):
                    raise
                self._tidy()
                self.staging.rename(self.out / _INSIDE)
                self._inside = True
                self._move_in()
                return
            self.accepted = True
            LOCAL_DISK.sync_folder(self.out.parent)
        finally:
            self._tidy()
        remove(self.staging)

    def _move_in(self) -> None:
        """Move one file after the other. If that fails or is interrupted, it is undone.

        The old config.json leaves first and the new one comes last. In between the folder is no checkpoint.
        """
        new = sorted({entry.name for entry in os.scandir(self.staging)} - OURS, key=arrival)
        moves = [(self.staging / name, self.out / name) for name in new]
        if self.receipt is not None:
            aside = self.staging / _REPLACED
            aside.mkdir()
            own = {entry.name for entry in os.scandir(self.out)} & self._names_in_receipt()
            moves[:0] = [(self.out / name, aside / name) for name in sorted(own, key=arrival, reverse=True)]
        try:
            for source, target in moves:
                if target == self.out / CONFIG:
                    LOCAL_DISK.sync_folder(self.out)
                source.rename(target)
        except BaseException:
            for source, target in reversed(moves):
                if target.exists() and not source.exists():
                    target.rename(source)
            raise
        self.accepted = True
        LOCAL_DISK.sync_folder(self.out)
        remove(self.staging)

    def _is_half_moved_in(self, names: set[str]) -> bool:
        """Whether OUT is what a run left that died while it was moving its files in."""
        if self.receipt is None or _INSIDE not in names or CONFIG in names:
            return False
        return names <= _PRESENT_IN_EMPTY | self._names_in_receipt()

    def _names_in_receipt(self) -> set[str]:
        assert self.receipt is not None  # noqa: S101  (asked only of conversions)
        return {RECEIPT, SUMS, CARD, *(name.partition("/")[0] for name in self.receipt["files"])}

    def _is_whole(self) -> bool:
        assert self.receipt is not None  # noqa: S101  (asked only of conversions)
        try:
            sizes = sizes_in(self.out)
        except OSError:
            return False
        return all(sizes.get(name) == file.get("bytes") for name, file in self.receipt["files"].items())


def already_made(
    destination: Place, plan: Plan, inputs: Inputs, device: str, *, any_layout: bool = False
) -> str | None:
    """The fingerprint of OUT, if OUT is a finished conversion of these inputs by this plan; else None.

    If all else agrees and nothing is remembered of the base, the base is read to be sure. `any_layout`: OUT's tensors
    may lie in other shards than planned.
    """
    receipt = destination.receipt_for(plan)
    if receipt is None or receipt.get("content") != plan.content:
        return None
    if receipt.get("plan") != plan.digest and not any_layout:
        return None
    digests = dict.fromkeys((tensor.name for tensor in plan.tensors()), "")
    sketch = asdict(origin_of(plan, inputs, device, digests))
    made_of = receipt.get("origin")
    if not isinstance(made_of, dict) or any(made_of.get(k) != v for k, v in sketch.items() if k != "base"):
        return None
    if not inputs.hub_digests():
        digests = digests_of(inputs.base, (tensor.source for tensor in plan.tensors() if tensor.origin == "base"))
    known = fingerprint_of(str(receipt.get("plan")), origin_of(plan, inputs, device, digests))
    return known if destination.holds(known) else None


def room(folders: Sequence[Path]) -> int:
    """Bytes that staging folders on one disk can grow to: what is free, and what they hold already."""
    held: dict[int, int] = {}  # by inode: a batch gives one file several names
    for folder in folders:
        with contextlib.suppress(OSError):  # there is none, or whoever writes to it will say what is wrong with it
            files = [entry.stat(follow_symlinks=False) for entry in os.scandir(folder)]
            held |= {file.st_ino: file.st_size for file in files}
    return shutil.disk_usage(first_that_exists(folders[0])).free + sum(held.values())


def first_that_exists(path: Path) -> Path:
    """A path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of the plain files of a folder, and of those in the folders in it, INNER/NAME, unless these are hidden.

    `OSError` if the folder can't be read.
    """
    sizes: dict[str, int] = {}
    left = [""]
    while left:
        inside = left.pop()
        for entry in os.scandir(folder / inside):
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    left.append(f"{inside}{entry.name}/")
            elif entry.is_file(follow_symlinks=not inside):
                sizes[inside + entry.name] = entry.stat().st_size
    return sizes


def remove(folder: Path) -> None:
    """Remove a staging folder."""
    clear(folder)
    try:
        folder.rmdir()
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # its lock is gone, so another run may have it already
            raise


def _remove_if_spent(folder: Path) -> None:
    """Remove what is left of a staging folder that became OUT, but not the work of another run."""
    if folder.is_symlink() or not folder.is_dir():
        return
    names = set(os.listdir(folder))
    if names - OURS and (JOURNAL in names or LOCK not in names):
        return  # work that can be resumed; or, without a lock, not ours
    if LOCK in names:
        lock = Lock(folder)
        try:
            remove(folder)
        finally:
            lock.release()
    else:
        folder.rmdir()  # it is empty, for the lock goes last


def clear(folder: Path, *, but: Collection[str] = ()) -> None:
    """Empty a staging folder: first the journal, which names the rest; last the lock, by which the folder is known."""
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.name == LOCK, entry.name != JOURNAL)):
        if entry.name in but:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink()


def arrival(name: str) -> tuple[bool, bool, str]:
    """Order of moving in: first the receipt, which names all files; last config.json, which makes a checkpoint."""
    return name != RECEIPT, name == CONFIG, name

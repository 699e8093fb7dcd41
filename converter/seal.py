"""Sealing: a staging folder becomes a checkpoint named OUT, whole or not at all.

Order of writes: shards, side files, index, config.json, receipt, and then the name. Each is durable before the next
one refers to it; OUT is never half a checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from converter.ask import check_output
from converter.card import CARD, model_card
from converter.checksums import SUMS
from converter.errors import (
    BadOutput,
    ConversionRefused,
    InputChanged,
    NotFinite,
    OutputLocked,
    VerificationFailed,
    WriteFailed,
)
from converter.journal import JOURNAL, Journal
from converter.link import GivenShard, How, identity_of, link
from converter.lock import LOCK, Lock
from converter.read import CONFIG, INDEX, Checkpoint, LocalFolder, parse_json_object
from converter.receipt import RECEIPT, Origin, read_receipt, write_receipt
from converter.threads import pool
from converter.write import UNFINISHED, make_folder, sync_folder, write_file, writing

if TYPE_CHECKING:
    from converter.measure import Fidelity
    from converter.plan import Plan

ANEW = "an earlier run had begun it with the same tensors in other shards: it was begun anew"
_OURS = frozenset({LOCK, JOURNAL})
_INSIDE = ".partial"
_REPLACED = "replaced"
_INPUTS_AT_FAULT = (ConversionRefused, InputChanged, NotFinite, VerificationFailed)
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
        self._refuse_if_impossible()
        if self.out.exists():
            names = {entry.name for entry in os.scandir(self.out)}
            self.receipt = read_receipt(self.out)
            self._occupied = bool(names - _PRESENT_IN_EMPTY) and not self._is_half_moved_in(names)
            # A mount can't be renamed, nor can a name be changed in a folder that isn't ours to write.
            self._inside = not self._occupied or self.out.is_mount() or not os.access(self.out.parent, os.W_OK)

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
        for name in _OURS:
            (self.out / name).unlink(missing_ok=True)

    def _swap(self) -> None:
        # The same lock in both folders: whichever is OUT.partial is a staging folder, should this run die now.
        with contextlib.suppress(OSError):
            (self.out / LOCK).hardlink_to(self.staging / LOCK)
        try:
            _exchange(self.staging, self.out)
            self.accepted = True
            sync_folder(self.out.parent)
        finally:
            self._tidy()
        _remove(self.staging)

    def _move_in(self) -> None:
        """Move one file after the other; what fails or is interrupted is undone.

        The old config.json leaves first and the new one comes last: in between the folder is no checkpoint.
        """
        new = sorted({entry.name for entry in os.scandir(self.staging)} - _OURS, key=_arrival)
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
        _remove(self.staging)

    def _is_half_moved_in(self, names: set[str]) -> bool:
        """Whether OUT is what a run left that died while it moved its files in."""
        if self.receipt is None or _INSIDE not in names or CONFIG in names:
            return False
        return names <= _PRESENT_IN_EMPTY | self._names_in_receipt()

    def _names_in_receipt(self) -> set[str]:
        assert self.receipt is not None  # noqa: S101  (asked only of conversions)
        return {RECEIPT, SUMS, *self.receipt["files"]}

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


class Staging:
    """The locked staging folder of one run, with the journal of what is done.

    Left without `seal` it stays for the next run of the same job, if something is done and the reason was not a fault
    of the inputs. `resume` false: what an earlier run left is discarded. That is done, too, where it has the same
    tensors in other shards, and `notes` says so.
    """

    def __init__(
        self, destination: Destination, job: Mapping[str, Any], shards: Iterable[str], *, resume: bool
    ) -> None:
        self._destination = destination
        self.folder = destination.staging
        self._sealed = False
        self._spent = False
        self._digests: dict[str, Future[str]] = {}
        self._ended = threading.Event()
        self._links: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        """What a user should know of what an earlier run left."""
        with writing(self.folder):
            if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                raise BadOutput(f"{self.folder}: exists and is not a staging folder")
            if self.folder.exists() and not (self.folder / LOCK).exists() and os.listdir(self.folder):
                raise BadOutput(f"{self.folder}: exists, is not empty and not a staging folder of this tool")
            make_folder(self.folder)
            try:
                self._lock = Lock(self.folder)
            except BlockingIOError:
                raise OutputLocked(f"{self.folder}: another conversion is writing it") from None
            try:
                if not resume:
                    _clear(self.folder, but={LOCK})
                self.journal = Journal(self.folder, job)  # may refuse; then the other job's files stay
                if self.journal.is_begun_anew:
                    self.notes = (ANEW,)
                    shards = ()
                _clear(self.folder, but={LOCK, JOURNAL, *shards, *(shard + UNFINISHED for shard in shards)})
                self._hasher = pool(1, "digest")
            except BaseException:
                self._lock.release()
                raise

    def digest_soon(self, name: str) -> None:
        """Begin to compute a finished file's sha256, while the next one is made."""
        self._digests[name] = self._hasher.submit(sha256_of, self.folder / name, self._ended)

    def take(self, shard: GivenShard, name: str, how: How) -> str:
        """Have a finished shard from elsewhere under a name of ours; how that was done: hard, reflink or copy.

        `ReadFailed` if it is gone, or isn't what its digest was taken of.
        """
        shard.refuse_if_changed()
        with writing(self.folder / name):
            self._links[name] = link(shard.path, self.folder / name, how)
        shard.refuse_if_changed()
        done: Future[str] = Future()
        done.set_result(shard.sha256)
        self._digests[name] = done
        return self._links[name]

    def finished(self, name: str) -> GivenShard:
        """A finished shard of this folder, for other folders to take."""
        with writing(self.folder / name):
            return GivenShard(self.folder / name, self._digest(name), identity_of(self.folder / name))

    def is_there(self) -> bool:
        """Whether the folder is still this run's: while a run lives, somebody may delete or move it all the same."""
        return self._lock.is_there()

    def spend(self) -> None:
        """What is here has served its purpose: it is removed at the end."""
        self._spent = True

    def seal(
        self, plan: Plan, origin: Origin, side_files: Mapping[str, bytes], fidelity: Mapping[str, Fidelity]
    ) -> None:
        """Write what stands beside the shards, look at the whole once more as a loader would, give it its name."""
        for name, raw in side_files.items():
            write_file(self.folder / name, raw)
        if len(plan.shards) > 1:
            write_file(self.folder / INDEX, _index(self.folder))
        write_file(self.folder / CARD, model_card(plan, origin))
        write_file(self.folder / CONFIG, (json.dumps(plan.config, indent=2, sort_keys=True) + "\n").encode())
        verify(self.folder, plan)
        with writing(self.folder):
            files = {
                entry.name: (entry.stat().st_size, self._digest(entry.name))
                for entry in os.scandir(self.folder)
                if entry.name not in _OURS
            }
        write_file(self.folder / RECEIPT, write_receipt(plan, origin, files, fidelity, self._links))
        digests = {name: digest for name, (_, digest) in files.items()} | {RECEIPT: sha256_of(self.folder / RECEIPT)}
        sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        write_file(self.folder / SUMS, sums.encode())
        with writing(self.folder):
            sync_folder(self.folder)
        if not self.is_there():
            raise WriteFailed(f"{self.folder}: was taken away while it was written; what has its name is another run's")
        self._destination.accept()
        self._sealed = True

    def _digest(self, name: str) -> str:
        known = self._digests.get(name)
        return sha256_of(self.folder / name) if known is None else known.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._hasher.shutdown(cancel_futures=True)
        self.journal.close()
        at_fault = kind is not None and issubclass(kind, _INPUTS_AT_FAULT)
        useless = at_fault or self._spent or not self.journal.entries or self._destination.accepted
        try:
            if not self._sealed and useless and self.is_there():
                with contextlib.suppress(OSError):  # the next run takes away what is left
                    _remove(self.folder)
        finally:
            self._lock.release()


def verify(folder: Path, plan: Plan) -> None:
    """Open what was written as a reader would and hold it against the plan; `VerificationFailed` names a difference."""
    with Checkpoint(LocalFolder(folder)) as written:
        planned = {output.name: output for tensor in plan.tensors() for output in tensor.outputs}
        for name in planned.keys() ^ written.tensors.keys():
            raise VerificationFailed(f"{name}: {'not written' if name in planned else 'not planned'}")
        for name, output in planned.items():
            found = written.tensors[name]
            fits = found.nbytes <= output.nbytes if output.is_state else found.shape == output.shape
            if found.dtype != output.dtype or not fits:
                raise VerificationFailed(f"{name}: {found.dtype} {list(found.shape)}, planned {output}")
        shapes = {}
        for tensor in plan.tensors():
            shapes[tensor.name] = tensor.shape
            if tensor.action == "quantize" and plan.recipe.four_bit:
                shapes[tensor.name] = _shape_in_state(written, tensor.outputs[-1].name)
        if plan.verifiable:
            problems = check_output(written.config, shapes, [t.name for t in plan.tensors() if t.action == "quantize"])
            if problems:
                raise VerificationFailed(f"the output would not load: {problems[0]} ({len(problems)} in all)")


def _shape_in_state(written: Checkpoint, name: str) -> tuple[int, ...]:
    state = written.tensors[name]
    raw = bytearray(state.nbytes)
    written.folder.read_into(state.file, state.offset, memoryview(raw))
    return tuple(parse_json_object(bytes(raw), name)["shape"])


def _index(folder: Path) -> bytes:
    """The index, from the headers of the finished shards."""
    from converter.read import read_header

    local = LocalFolder(folder)
    shards = sorted(name for name in local.names() if name.endswith(".safetensors"))
    headers = [tensor for shard in shards for tensor in read_header(local, shard).values()]
    local.close()
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in headers)},
        "weight_map": {tensor.name: tensor.file for tensor in headers},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def sha256_of(path: Path, ended: threading.Event | None = None) -> str:
    """Of a file, in hex; `CancelledError` if it has `ended`, as nobody wants it then, and a shard takes seconds."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if ended is not None and ended.is_set():
                raise CancelledError
            digest.update(buffer[:count])
    return digest.hexdigest()


def _arrival(name: str) -> tuple[bool, bool, str]:
    """Order of moving in: the receipt, which names all files, first; config.json, which makes a checkpoint, last."""
    return name != RECEIPT, name == CONFIG, name


def _remove(folder: Path) -> None:
    """Take a staging folder away."""
    _clear(folder)
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
    if names - _OURS and (JOURNAL in names or LOCK not in names):
        return  # what a journal tells of can be gone on with; what has no lock isn't ours
    if LOCK in names:
        lock = Lock(folder)
        try:
            _remove(folder)
        finally:
            lock.release()
    else:
        folder.rmdir()  # empty: the lock goes last


def _clear(folder: Path, *, but: Collection[str] = ()) -> None:
    """Empty a staging folder: first the journal, which tells of the rest; last the lock, by which it is known."""
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.name == LOCK, entry.name != JOURNAL)):
        if entry.name in but:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink()


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders' names in one step, so that neither is ever absent; in two steps where the system can't."""
    at_fdcwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    aside = other.with_name(other.name + ".replaced")
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)

"""The staging folder, in which OUT's files gather until it becomes OUT, whole or not at all.

Order of writes: shards, side files, index, config.json, receipt, SHA256SUMS, then the name. Each is durable before the
next one refers to it, so OUT is never half a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from converter.errors import (
    BadOutput,
    ConverterError,
    OutputLocked,
    VerificationFailed,
    WriteFailed,
)
from converter.lock import LOCK, Lock
from converter.model.ask import check_loaders
from converter.model.loaders import OF_TARGET
from converter.plan.experts import uneven
from converter.quantize.formats import format_of
from converter.read.checkpoint import CONFIG, INDEX, Checkpoint
from converter.read.checksums import SUMS
from converter.read.folder import LocalFolder
from converter.seal.destination import OURS, Place, clear, remove, sizes_in
from converter.seal.link import How, ReusableShard, identity_of, link
from converter.seal.receipt import CARD, RECEIPT, Origin, write_receipt
from converter.threads import pool
from converter.write.durable import LOCAL_DISK, UNFINISHED, Disk, writing
from converter.write.journal import JOURNAL, Journal
from converter.write.sha256 import Begun, sha256_of
from converter.write.shard import ShardWriter

if TYPE_CHECKING:
    from converter.plan.plan import Plan, ShardPlan
    from converter.quantize.agreement import Agreement
    from converter.quantize.measure import Fidelity

ANEW = "an earlier run had begun this with the same tensors in other shards: it was begun anew"


class Staging:
    """The locked staging folder of one run, with the journal of what is done. It is where shards and small files go.

    Closed before `seal`, it stays for the next run of the same job. It is removed if nothing is done in it, or if
    `spend` or `fail` said that it is of no more use. What an earlier run left is discarded if `resume` is false, or if
    it has the same tensors in other shards; then `notes` says so. A folder in `keep`, and what lies in it, is the
    caller's.
    """

    def __init__(
        self,
        destination: Place,
        job: Mapping[str, Any],
        shards: Iterable[str],
        *,
        resume: bool,
        keep: Collection[str] = (),
        disk: Disk = LOCAL_DISK,
    ) -> None:
        self._destination, self._disk = destination, disk
        self.folder = destination.staging
        self._sealed = False
        self._spent = False
        self._digests: dict[str, Future[str]] = {}
        self._ended = threading.Event()
        self._links: dict[str, str] = {}
        self.stored: frozenset[str] = frozenset()
        """Finished shards that a store has. Here they are thin: no tensor's bytes but the small ones'."""
        self.notes: tuple[str, ...] = ()
        """What the user should know about an earlier run's work."""
        with writing(self.folder):
            if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                raise BadOutput(f"{self.folder}: exists and is not a staging folder")
            if self.folder.exists() and not (self.folder / LOCK).exists() and os.listdir(self.folder):
                raise BadOutput(f"{self.folder}: exists, is not empty and not a staging folder of this tool")
            disk.make_folder(self.folder)
            try:
                self._lock = Lock(self.folder)
            except BlockingIOError:
                raise OutputLocked(f"{self.folder}: another conversion is writing it") from None
            try:
                if not resume:
                    clear(self.folder, but={LOCK})
                self.journal = Journal(self.folder, job, disk=disk)  # may refuse; then the other job's files stay
                if self.journal.is_begun_anew:
                    self.notes = (ANEW,)
                    shards = ()
                shards = frozenset(shards)
                clear(self.folder, but={LOCK, JOURNAL, *keep, *shards, *(shard + UNFINISHED for shard in shards)})
                self._hasher = pool(1, "digest")
                self._uploads = destination.uploads(self.journal, disk)
                if self._uploads is not None:
                    self._recall(self._uploads.recall(shards))
            except BaseException:
                self._lock.release()
                raise

    def writer(self, shard: ShardPlan) -> ShardWriter:
        """Begin a shard, or resume it."""
        written = self.journal.written(shard.file)
        # An upload reads it again.
        return ShardWriter(self.folder, shard, written, disk=self._disk, read_again=self._uploads is not None)

    def put(self, name: str, raw: bytes) -> None:
        """Write a small file, durably. `WriteFailed`."""
        self._disk.make_folder((self.folder / name).parent)
        self._disk.put(self.folder / name, raw)

    def finish_soon(self, name: str, hashed: Begun | None = None) -> None:
        """Begin to compute the sha256 of a finished shard, while the next one is made; if OUT lies in a store, also to
        upload it. Its tensors are in the journal. `hashed`: the sha256 of its beginning."""
        self._digests[name] = self._hasher.submit(sha256_of, self.folder / name, self._ended, hashed)
        if self._uploads is not None:
            self._uploads.add(name, self._digests[name])

    def take(self, shard: ReusableShard, name: str, how: How) -> str:
        """Link or copy a finished shard of another output to `name`. Returns how: hard, reflink or copy.

        `ReadFailed` if it is gone or has changed since its sha256 was taken.
        """
        shard.refuse_if_changed()
        with writing(self.folder / name, shard.identity[1]):
            self._links[name] = link(shard.path, self.folder / name, how, self._disk)
        shard.refuse_if_changed()
        self._digests[name] = _known(shard.sha256)
        return self._links[name]

    def finished(self, name: str) -> ReusableShard:
        """A finished shard of this folder, for others to take."""
        with writing(self.folder / name):
            return ReusableShard(self.folder / name, self._digest(name), identity_of(self.folder / name))

    @property
    def is_thinned(self) -> bool:
        """Whether finished shards leave this disk for a store, so that their values can't be read here."""
        return self._uploads is not None

    def is_there(self) -> bool:
        """Whether the folder is still this run's. Somebody may delete or move it although it is locked."""
        return self._lock.is_there()

    def spend(self) -> None:
        """Say that what is here is of no more use. The folder is removed when it is closed."""
        self._spent = True

    def fail(self, reason: BaseException) -> None:
        """Say why this will not be sealed. If no run can resume it, the folder is removed when it is closed."""
        if isinstance(reason, ConverterError) and not reason.resumable:
            self.spend()

    def seal(
        self,
        plan: Plan,
        origin: Origin,
        side_files: Mapping[str, bytes],
        fidelity: Mapping[str, Fidelity],
        agreement: Agreement | None = None,
    ) -> None:
        """Write the files beside the shards, check the whole as a loader reads it, and give it its name. If OUT lies in
        a store, all shards are there before anything of it is to be seen."""
        if self._uploads is not None:
            self._uploads.finish()
        for name, raw in side_files.items():
            self.put(name, raw)
        if len(plan.shards) > 1:
            self.put(INDEX, _index(self.folder))
        self.put(CONFIG, (json.dumps(plan.config, indent=2, sort_keys=True) + "\n").encode())
        check_written(self.folder, plan)
        files = self._files()
        self.put(RECEIPT, write_receipt(plan, origin, files, fidelity, self._links, agreement))
        digests = {name: digest for name, (_, digest) in files.items()} | {RECEIPT: sha256_of(self.folder / RECEIPT)}
        sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        self.put(SUMS, sums.encode())
        with writing(self.folder):
            self._disk.sync_folder(self.folder)
        if not self.is_there():
            raise WriteFailed(f"{self.folder}: was moved or deleted while this run was writing it; nothing was sealed")
        self._destination.accept()
        self._sealed = True

    def receipt(self, plan: Plan, origin: Origin, fidelity: Mapping[str, Fidelity]) -> bytes:
        """The receipt of what is here so far."""
        return write_receipt(plan, origin, self._files(), fidelity, self._links)

    def _recall(self, uploaded: Mapping[str, str]) -> None:
        self.stored = frozenset(uploaded)
        self._digests |= {name: _known(sha256) for name, sha256 in uploaded.items()}

    def _files(self) -> dict[str, tuple[int, str]]:
        """Bytes and sha256 of every file that the receipt names."""
        with writing(self.folder):
            return {
                name: (size, self._digest(name))
                for name, size in sizes_in(self.folder).items()
                if name not in OURS and name != CARD
            }

    def _digest(self, name: str) -> str:
        known = self._digests.get(name)
        return sha256_of(self.folder / name) if known is None else known.result()

    def close(self) -> None:
        """Remove the folder if it is of no more use, and release its lock."""
        self._ended.set()
        self._hasher.shutdown(cancel_futures=True)
        if self._uploads is not None:
            self._uploads.close()
        self.journal.close()
        useless = self._spent or self.journal.is_empty or self._destination.accepted
        try:
            if not self._sealed and useless and self.is_there():
                if self._uploads is not None and not self._destination.accepted:
                    self._uploads.forget()
                with contextlib.suppress(OSError):  # the next run removes what is left
                    remove(self.folder)
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self.fail(value)
        self.close()


def check_written(folder: Path, plan: Plan) -> None:
    """Read what was written as a loader does, and compare it with the plan. `VerificationFailed` names a difference."""
    with Checkpoint(LocalFolder(folder)) as written:
        planned = {output.name: output for tensor in plan.tensors() for output in tensor.outputs}
        for name in planned.keys() ^ written.tensors.keys():
            raise VerificationFailed(f"{name}: {'not written' if name in planned else 'not planned'}")
        for name, output in planned.items():
            found = written.tensors[name]
            fits = found.nbytes <= output.nbytes if output.is_state else found.shape == output.shape
            if found.dtype != output.dtype or not fits:
                raise VerificationFailed(f"{name}: {found.dtype} {list(found.shape)}, planned {output}")
        shapes = {tensor.name: tensor.shape for tensor in plan.tensors()} | format_of(plan.recipe).find(written).weights
        if plan.verifiable:
            quantized = [tensor.name for tensor in plan.tensors() if tensor.is_quantized]
            loaders = check_loaders(written.config, shapes, quantized, uneven(plan.tensors(), plan.recipe))
            if problems := loaders[OF_TARGET[plan.recipe.target]]:
                raise VerificationFailed(f"the output would not load: {problems[0]} ({len(problems)} in all)")


def _index(folder: Path) -> bytes:
    """The index, from the headers of the finished shards."""
    from converter.read.header import read_header

    local = LocalFolder(folder)
    shards = sorted(name for name in local.names() if name.endswith(".safetensors"))
    headers = [tensor for shard in shards for tensor in read_header(local, shard).values()]
    local.close()
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in headers)},
        "weight_map": {tensor.name: tensor.file for tensor in headers},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _known(digest: str) -> Future[str]:
    done: Future[str] = Future()
    done.set_result(digest)
    return done

"""Sealing: a staging folder becomes a checkpoint named OUT, whole or not at all.

Order of writes: shards, side files, index, config.json, receipt, and then the name. Each is durable before the next
one refers to it; OUT is never half a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError, Future
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
from converter.model.ask import check_output
from converter.quantize.formats import format_of
from converter.read.checkpoint import CONFIG, INDEX, Checkpoint
from converter.read.checksums import SUMS
from converter.read.folder import LocalFolder
from converter.seal.card import model_card
from converter.seal.destination import OURS, Destination, clear, remove
from converter.seal.link import How, ReusableShard, identity_of, link
from converter.seal.receipt import CARD, RECEIPT, Origin, write_receipt
from converter.threads import pool
from converter.write.journal import JOURNAL, Journal
from converter.write.lock import LOCK, Lock
from converter.write.shard import UNFINISHED, make_folder, sync_folder, write_file, writing

if TYPE_CHECKING:
    from converter.plan.plan import Plan
    from converter.quantize.measure import Fidelity

ANEW = "an earlier run had begun it with the same tensors in other shards: it was begun anew"


class Staging:
    """The locked staging folder of one run, with the journal of what is done.

    Closed without `seal` it stays for the next run of the same job if something is done in it, unless `spend` or `fail`
    said that it is of no more use. `resume` false: what an earlier run left is discarded. That is done, too, where it
    has the same tensors in other shards, and `notes` says so.
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
                    clear(self.folder, but={LOCK})
                self.journal = Journal(self.folder, job)  # may refuse; then the other job's files stay
                if self.journal.is_begun_anew:
                    self.notes = (ANEW,)
                    shards = ()
                clear(self.folder, but={LOCK, JOURNAL, *shards, *(shard + UNFINISHED for shard in shards)})
                self._hasher = pool(1, "digest")
            except BaseException:
                self._lock.release()
                raise

    def digest_soon(self, name: str) -> None:
        """Begin to compute a finished file's sha256, while the next one is made."""
        self._digests[name] = self._hasher.submit(sha256_of, self.folder / name, self._ended)

    def take(self, shard: ReusableShard, name: str, how: How) -> str:
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

    def finished(self, name: str) -> ReusableShard:
        """A finished shard of this folder, for other folders to take."""
        with writing(self.folder / name):
            return ReusableShard(self.folder / name, self._digest(name), identity_of(self.folder / name))

    def is_there(self) -> bool:
        """Whether the folder is still this run's: while a run lives, somebody may delete or move it all the same."""
        return self._lock.is_there()

    def spend(self) -> None:
        """What is here has served its purpose: it is removed at the end."""
        self._spent = True

    def fail(self, reason: BaseException) -> None:
        """Say why this is not sealed: what no run can resume is removed at the end."""
        if isinstance(reason, ConverterError) and not reason.resumable:
            self.spend()

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
        check_written(self.folder, plan)
        with writing(self.folder):
            files = {
                entry.name: (entry.stat().st_size, self._digest(entry.name))
                for entry in os.scandir(self.folder)
                if entry.name not in OURS and entry.name != CARD
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

    def close(self) -> None:
        """Remove the folder if it is of no more use, and release its lock."""
        self._ended.set()
        self._hasher.shutdown(cancel_futures=True)
        self.journal.close()
        useless = self._spent or not self.journal.entries or self._destination.accepted
        try:
            if not self._sealed and useless and self.is_there():
                with contextlib.suppress(OSError):  # the next run takes away what is left
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
        shapes = {tensor.name: tensor.shape for tensor in plan.tensors()} | format_of(plan.recipe).find(written).weights
        if plan.verifiable:
            problems = check_output(written.config, shapes, [t.name for t in plan.tensors() if t.action == "quantize"])
            if problems:
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


def sha256_of(path: Path, ended: threading.Event | None = None) -> str:
    """Of a file, in hex; `CancelledError` if it has `ended`, as nobody wants it then, and a shard takes seconds."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if ended is not None and ended.is_set():
                raise CancelledError
            digest.update(buffer[:count])
    return digest.hexdigest()

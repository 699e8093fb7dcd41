"""The journal of a staging folder: which tensors are durably written, so that another run can resume the work.

A line is a digest, a space and a JSON object. The first line says which job it is. Each other line names a tensor, the
pieces of bytes that were written for it with their digests, and what was measured while it was made; or a shard that a
store has. A line is written when the bytes that it names are durable, and is itself durable before anything relies on
it. Reading stops at the first line that doesn't fit its digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from converter.errors import BadOutput
from converter.quantize.agreement import Agreement
from converter.read.digests import sample
from converter.recipe import versions
from converter.write.durable import LOCAL_DISK, Disk, writing
from converter.write.shard import Piece, Written

if TYPE_CHECKING:
    from converter.plan.inputs import Inputs
    from converter.plan.plan import Plan

JOURNAL = ".journal"
FORMAT = 2
"""A journal of another format is refused as another job's."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is written, in the order of a line's keys."""

    tensor: str
    shard: str
    pieces: tuple[Piece, ...]
    states: Mapping[str, str]
    """Quant state → its JSON. It gets its place when the shard is finished."""
    error: float
    survival: float | None
    digest: str
    """xxh3-128 of the bytes that were read."""
    agreement: Agreement | None = None
    """Of its tiles that an accelerator made and the CPU made again; None if none was."""
    output_error: float | None = None


@dataclass(frozen=True)
class Upload:
    """A finished shard that a store has taken, in the order of a line's keys."""

    shard: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Sampled:
    """The text that the model wrote to be calibrated by."""

    windows: tuple[tuple[int, ...], ...]
    """Tokens."""


def job_of(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """What two runs must have in common for one to resume the other's work.

    `layout` says which tensor lies in which shard, and changes with what a batch shares. The rest says what will be
    made of what. Of a local base it has headers, sizes, modification times and some bytes, for its whole contents are
    known only when they have been read.
    """
    base = inputs.base
    headers = sorted((t.name, t.dtype, t.shape, t.file, t.offset) for t in base)
    identity: Any = inputs.hub_digests()
    if not identity:
        identity = {shard: base.folder.identity(shard)[:2] for shard in base.shards}
        if base.folder.path is not None:  # a bucket's ETags tell enough, and a request takes long
            identity |= {"sample": sample(base)}
    return {
        "plan": plan.content,
        "layout": plan.digest,
        "base": hashlib.sha256(json.dumps([headers, identity], sort_keys=True).encode()).hexdigest(),
        "adapter": plan.adapter_digest,
        "device": plan.device,
        "versions": versions(),
    }


class Journal:
    """The journal in a staging folder that is locked. `entries` is what an earlier run of the same job left.

    Work of the same job in another layout is of no use: `entries` is empty then, and `is_begun_anew` true. `BadOutput`
    says what differs if the folder holds the work of another job.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], *, disk: Disk = LOCAL_DISK) -> None:
        self._path, self._disk = folder / JOURNAL, disk
        self.entries: dict[str, Entry] = {}
        """By tensor."""
        self.uploads: dict[str, Upload] = {}
        """By shard: what a store has taken of this job."""
        self._texts: list[Sampled] = []
        self.is_begun_anew = False
        self._lock = threading.Lock()
        self._new: list[Entry] = []
        self._failure: OSError | None = None
        self._committed = time.monotonic()
        self._read(job)
        # A new file: the old one may end with half a line, or a sync of it may have failed.
        known: list[Entry | Upload | Sampled] = [*self._texts, *self.entries.values(), *self.uploads.values()]
        disk.put(self._path, b"".join([_line({"journal": FORMAT, "job": job}), *map(_line_of, known)]))
        with writing(self._path):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)

    def add(self, entry: Entry) -> None:
        """Note a tensor. It counts once it is committed."""
        self._new.append(entry)

    def is_due(self, seconds: float) -> bool:
        """Whether the last commit is so many seconds ago."""
        return time.monotonic() - self._committed >= seconds

    def take(self) -> list[Entry]:
        """What was noted and is not yet committed, for `commit`."""
        taken, self._new = self._new, []
        return taken

    def commit(self, entries: Sequence[Entry]) -> None:
        """Make entries durable. Their tensors must be durable already."""
        with self._lock:
            self._append(entries)
            # Another dict: `written` may be iterating over this one in another thread.
            self.entries = self.entries | {entry.tensor: entry for entry in entries}
        self._committed = time.monotonic()

    def commit_upload(self, upload: Upload) -> None:
        """Make durable that a store has a shard, of which all tensors are committed."""
        with self._lock:
            self._append([upload])
            self.uploads = self.uploads | {upload.shard: upload}

    def commit_sampled(self, sampled: Sampled) -> None:
        """Make durable which text the model wrote."""
        with self._lock:
            self._append([sampled])
            self._texts = [sampled]

    @property
    def sampled(self) -> Sampled | None:
        """The text that the model wrote; None: it hasn't yet."""
        return self._texts[0] if self._texts else None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is noted that another run could use."""
        return not self.entries and not self._texts

    def _append(self, what: Sequence[Entry | Upload | Sampled]) -> None:
        with writing(self._path):
            if self._failure is not None:
                raise self._failure
            try:
                self._disk.append(self._descriptor, b"".join(map(_line_of, what)))
                self._disk.sync_bytes(self._descriptor)
            except OSError as exc:
                # The file may end with half a line. Or the disk lost it, and a second sync would report success.
                self._failure = exc
                raise

    def written(self, shard: str) -> Written:
        """What was written of a shard, for a `ShardWriter`."""
        return {e.tensor: (e.pieces, e.states) for e in self.entries.values() if e.shard == shard}

    def forget(self, shard: str) -> None:
        """Rely on nothing that was written of a shard."""
        with self._lock:
            self.entries = {tensor: entry for tensor, entry in self.entries.items() if entry.shard != shard}
            self.uploads = {name: upload for name, upload in self.uploads.items() if name != shard}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _read(self, job: Mapping[str, Any]) -> None:
        """Take in what is there, up to the first line that doesn't fit its digest."""
        try:
            raw = _read_plain(self._path)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise BadOutput(f"{self._path}: {exc.strerror}") from exc
        for number, line in enumerate(raw.splitlines(keepends=True)):
            digest, _, text = line.partition(b" ")
            if not text.endswith(b"\n") or digest.decode("latin-1") != xxhash.xxh3_64_hexdigest(text):
                return
            try:
                value = json.loads(text)
                if number == 0:
                    self._check_job(dict(value["job"]) if value["journal"] == FORMAT else {}, job)
                    if self.is_begun_anew:
                        return
                elif "sha256" in value:
                    upload = Upload(str(value["shard"]), _size(value["size"]), str(value["sha256"]))
                    self.uploads[upload.shard] = upload
                elif "windows" in value:
                    self._texts = [Sampled(tuple(tuple(map(_size, window)) for window in value["windows"]))]
                else:
                    entry = _entry(value)
                    self.entries[entry.tensor] = entry
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # an error of 400 digits, too
                return

    def _check_job(self, found: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        differing = [key for key in job if found.get(key) != json.loads(json.dumps(job[key]))]
        self.is_begun_anew = differing == ["layout"]
        if differing and not self.is_begun_anew:
            raise BadOutput(
                f"{self._path.parent}: holds the unfinished work of another conversion, of which "
                f"{', '.join(key for key in differing if key != 'layout')} differ; `resume=False` discards it"
            )


def _line(value: Mapping[str, Any]) -> bytes:
    raw = (json.dumps(value) + "\n").encode()
    return f"{xxhash.xxh3_64_hexdigest(raw)} ".encode() + raw


def _entry(value: dict[str, Any]) -> Entry:
    """What a line says. `TypeError`, `KeyError` or `ValueError` if it has another shape, whatever its digest."""
    pieces = tuple(
        Piece(str(p["output"]), _size(p["start"]), _size(p["length"]), str(p["digest"])) for p in value["pieces"]
    )
    states = {str(name): str(state) for name, state in dict(value["states"]).items()}
    survival = None if value["survival"] is None else float(value["survival"])
    tensor, shard, digest = (str(value[key]) for key in ("tensor", "shard", "digest"))
    found = value.get("agreement")
    agreement = None if found is None else Agreement(_size(found["tiles"]), *_floats(found["codes"], found["scales"]))
    of_outputs = None if value.get("output_error") is None else float(value["output_error"])
    return Entry(tensor, shard, pieces, states, float(value["error"]), survival, digest, agreement, of_outputs)


def _floats(*values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError
    return value


def _line_of(what: Entry | Upload | Sampled) -> bytes:
    stated = asdict(what)
    for key in ("agreement", "output_error"):  # other lines are as they always were
        if stated.get(key, "") is None:
            del stated[key]
    return _line(stated)


def _read_plain(path: Path) -> bytes:
    """The bytes of a plain file. No link is followed, and no pipe is waited for."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadOutput(f"{path}: not a plain file")
        return file.read()

"""Reading: folders, safetensors headers, and the bytes of a tensor or of some of its rows.

Nothing here is mapped into memory: a file that shrinks under a mapping kills the process, and mapped pages count
against its memory. Nothing here is trusted either: the header is parsed by this module, within limits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from converter.errors import BadCheckpoint, ConversionRefused, InputChanged, ReadFailed

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADER_BYTES = 25_000_000  # the Hub's own limit
MAX_JSON_BYTES = 50_000_000  # an index of all the tensors that are allowed
MAX_CONFIG_BYTES = 10_000_000  # of a model; one with 20,000 labels has three million
MAX_TENSORS = 200_000  # in one checkpoint; the largest public ones have about 100,000
MAX_JSON_VALUES = 3_000_000  # in one file; what Python makes of a value takes up to 300 bytes
MAX_JSON_DEPTH = 64  # what copies or writes JSON again is recursive
MAX_NAME_LENGTH = 512
MAX_RANK = 8

READ_AHEAD = 64_000_000
"""Bytes of a file that the disk may be ahead of its reader."""

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Bytes per element by safetensors dtype. https://github.com/huggingface/safetensors#format"""


@dataclass(frozen=True)
class TensorHeader:
    """What a shard's header says of one tensor."""

    name: str
    dtype: str
    """As safetensors spells it: BF16, F16, F32, …"""
    shape: tuple[int, ...]
    file: str
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a row being what one index of the first dimension selects."""
        return math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]


class Folder(Protocol):
    """A flat set of named files that can be read in pieces: a local folder, or a repository on the Hub."""

    @property
    def label(self) -> str:
        """How messages call it."""

    def names(self) -> frozenset[str]:
        """The names of its plain files."""

    def size(self, name: str) -> int:
        """Bytes of one file; `BadCheckpoint` if it is not a plain file of this folder."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset`; `InputChanged` if the file ends before, `ReadFailed`
        if the disk fails."""

    def expect(self, name: str, offset: int) -> None:
        """What follows byte `offset` of a file is read next, in order: no more than a hint."""

    def close(self) -> None:
        """Let go of open files."""


class LocalFolder:
    """A folder on this machine. Only plain files directly inside it are seen, and the Hub cache's own links."""

    def __init__(self, path: Path) -> None:
        if not is_folder(path):
            raise ConversionRefused(f"{path}: no such folder")
        self.path = path
        self._descriptors: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        """Of each file: up to where the system was asked to read ahead."""

    @property
    def label(self) -> str:
        return str(self.path)

    def names(self) -> frozenset[str]:
        try:
            return frozenset(entry.name for entry in os.scandir(self.path) if self._is_ours(entry.name))
        except OSError as exc:
            raise BadCheckpoint(f"{self.path}: {exc.strerror}") from exc

    def size(self, name: str) -> int:
        return os.fstat(self._open(name)).st_size

    def identity(self, name: str) -> list[int]:
        """Size, modification time in ns and inode by the folder: for telling whether a file is still the one it was."""
        status = (self.path / name).stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def state(self, name: str) -> list[int]:
        """Of the file that is open: size, modification time in ns, inode, and the time of its last change of any kind,
        in ns, which nobody can set."""
        status = os.fstat(self._open(name))
        return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        descriptor = self._open(name)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as exc:
                raise ReadFailed(f"{self.path / name}: reading at byte {offset + done}: {exc.strerror}") from exc
            if count == 0:
                raise InputChanged(f"{self.path / name}: ends at byte {offset + done}, expected {offset + len(buffer)}")
            done += count

    def expect(self, name: str, offset: int) -> None:
        # Of itself the system reads ahead by less than a tile, and the disk idles while tiles are converted.
        asked, until = self._asked.get(name, offset), offset + READ_AHEAD
        if not offset <= asked <= until:
            asked = offset
        if until - asked >= READ_AHEAD // 2:
            _hint(self._open(name), asked, until - asked, os.POSIX_FADV_WILLNEED)
            self._asked[name] = until

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, name: str) -> int:
        if name not in self._descriptors:
            if not self._is_ours(name):
                raise BadCheckpoint(f"{self.path}: {name!r} is not a plain file inside the folder")
            try:
                # O_NONBLOCK: should the file become a pipe after the check, opening it must not hang.
                self._descriptors[name] = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                # A conversion reads its base from end to end: the system may read further ahead than it would.
                _hint(self._descriptors[name], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            except OSError as exc:
                raise BadCheckpoint(f"{self.path / name}: {exc.strerror}") from exc
        return self._descriptors[name]

    def _is_ours(self, name: str) -> bool:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            return False
        path = self.path / name
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                # The Hub's cache keeps snapshots/<commit>/NAME -> ../../blobs/<digest>, which may itself be a link into
                # blobs/<2 hex>/ that its repositories share. No other link is followed.
                real = path.resolve(strict=True)
                snapshots = self.path.resolve().parent
                repository = snapshots.parent
                own, shared = repository / "blobs", repository.parent / "blobs"
                inside = real.parent == own or real.parent.parent == shared
                return snapshots.name == "snapshots" and inside and real.is_file()
            return stat.S_ISREG(mode)
        except (OSError, RuntimeError, ValueError):  # a loop of links; a name that no file can have
            return False


def _hint(descriptor: int, start: int, length: int, advice: int) -> None:
    with contextlib.suppress(OSError):  # a filesystem, or a system, that takes no hints
        os.posix_fadvise(descriptor, start, length, advice)


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; of a name that no file can have, too: `Path.is_dir` raises for a long one."""
    return os.path.isdir(path)  # noqa: PTH112


def read_bytes(folder: Folder, name: str, *, limit: int) -> bytes:
    """A whole small file; `BadCheckpoint` if it is larger than `limit` bytes."""
    size = folder.size(name)
    if size > limit:
        raise BadCheckpoint(f"{folder.label}: {name} has {size:,} bytes, expected at most {limit:,}")
    buffer = bytearray(size)
    folder.read_into(name, 0, memoryview(buffer))
    return bytes(buffer)


def read_json(folder: Folder, name: str, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object; `BadCheckpoint` for anything else, duplicate keys, NaN and bottomless nesting included."""
    return parse_json_object(read_bytes(folder, name, limit=limit), f"{folder.label}: {name}")


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes; `where` begins the message of the `BadCheckpoint` raised for anything else."""
    # Counted before they are made; commas and brackets in strings count, too, for no real file comes near the limit.
    if sum(raw.count(mark) for mark in b",[{") > MAX_JSON_VALUES:
        raise BadCheckpoint(f"{where}: more than {MAX_JSON_VALUES:,} values")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"key {twice[:60]!r} occurs twice")
        return result

    def constant(text: str) -> float:
        # Infinity is found in real configs (Mamba's time_step_limit); no setting means NaN.
        if text == "NaN":
            raise ValueError("NaN is not a value")
        return float(text)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as exc:
        raise BadCheckpoint(f"{where}: nested too deeply") from exc
    except (ValueError, UnicodeDecodeError) as exc:
        raise BadCheckpoint(f"{where}: not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{where}: holds {type(value).__name__}, expected an object")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise BadCheckpoint(f"{where}: nested too deeply")
    return value


def _is_deeper(value: object, depth: int) -> bool:
    """Whether objects and arrays are nested more than `depth` deep."""
    level: list[Any] = [value]
    for _ in range(depth):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def read_header(folder: Folder, name: str) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, in the order of their offsets.

    `BadCheckpoint` unless the header is well formed and the tensors cover the file without overlap, hole or rest.
    """
    where = f"{folder.label}: {name}"
    size = folder.size(name)
    if size < 8:
        raise BadCheckpoint(f"{where}: {size} bytes, too short for a safetensors file")
    prefix = bytearray(8)
    folder.read_into(name, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise BadCheckpoint(f"{where}: header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise BadCheckpoint(f"{where}: header of {length:,} bytes in a file of {size:,}: truncated?")
    raw = bytearray(length)
    folder.read_into(name, 8, memoryview(raw))
    if raw[:1] != b"{":
        raise BadCheckpoint(f"{where}: the header does not begin with '{{'")
    entries = parse_json_object(bytes(raw), where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadCheckpoint(f"{where}: __metadata__ is not a mapping of strings")
    if len(entries) > MAX_TENSORS:
        raise BadCheckpoint(f"{where}: {len(entries):,} tensors, expected at most {MAX_TENSORS:,}")
    tensors = [_tensor_header(where, name, key, entry, 8 + length) for key, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise BadCheckpoint(f"{where}: {tensor.name!r} begins at byte {tensor.offset}, expected {end}: it {kind}")
        end += tensor.nbytes
    if end != size:
        raise BadCheckpoint(f"{where}: the tensors end at byte {end:,}, the file at {size:,}: truncated or padded?")
    return {tensor.name: tensor for tensor in tensors}


def _tensor_header(where: str, file: str, name: str, entry: object, data_start: int) -> TensorHeader:
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise BadCheckpoint(f"{where}: tensor name {name[:60]!r} is empty, too long or not printable")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise BadCheckpoint(f"{where}: {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadCheckpoint(f"{where}: {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not are_sizes(shape) or len(shape) > MAX_RANK:
        raise BadCheckpoint(f"{where}: {name!r} has the shape {str(shape)[:60]}, expected at most {MAX_RANK} sizes")
    if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadCheckpoint(f"{where}: {name!r} has the offsets {str(offsets)[:60]}, expected [begin, end]")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise BadCheckpoint(
            f"{where}: {name!r} spans {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} takes {nbytes:,}"
        )
    return TensorHeader(name, dtype, tuple(shape), file, data_start + offsets[0], nbytes)


def are_sizes(value: object) -> bool:
    """Whether it is a list of numbers that sizes can be."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


class Checkpoint:
    """A base: its config, its weight map, the headers of its shards; and their bytes on request.

    Opening it reads the config, the index and the headers, and checks them against each other.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        names = folder.names()
        if CONFIG not in names:
            raise BadCheckpoint(f"{folder.label}: no {CONFIG}, so this is not a transformers checkpoint")
        self.config = read_json(folder, CONFIG, limit=MAX_CONFIG_BYTES)
        self.tensors: dict[str, TensorHeader] = {}
        # transformers, too, takes the single file where both are there.
        if SINGLE_FILE in names:
            self.shards: tuple[str, ...] = (SINGLE_FILE,)
            self.tensors = read_header(folder, SINGLE_FILE)
        elif INDEX in names:
            weight_map = self._weight_map(names)
            self.shards = tuple(sorted(set(weight_map.values())))
            self._read_shards(weight_map)
        elif any(name.endswith(".bin") for name in names):
            raise BadCheckpoint(
                f"{folder.label}: only pickled weights (.bin); this tool reads safetensors and unpickles nothing"
            )
        else:
            raise BadCheckpoint(f"{folder.label}: neither {SINGLE_FILE} nor {INDEX}")
        if not self.tensors:
            raise BadCheckpoint(f"{folder.label}: no tensors")

    def _weight_map(self, names: frozenset[str]) -> dict[str, str]:
        where = f"{self.folder.label}: {INDEX}"
        weight_map = read_json(self.folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpoint(f"{where}: no weight_map")
        for tensor, shard in weight_map.items():
            found = f"{where}: {tensor[:60]!r} is in {str(shard)[:80]!r}"
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                raise BadCheckpoint(f"{found}, expected a .safetensors file")
            if "/" in shard or "\\" in shard:
                raise BadCheckpoint(f"{found}, expected a file inside the folder")
            if shard not in names:
                raise BadCheckpoint(f"{found}, which is not a plain file of the folder")
        return weight_map

    def _read_shards(self, weight_map: dict[str, str]) -> None:
        for shard in self.shards:
            for tensor in read_header(self.folder, shard).values():
                if tensor.name in self.tensors:
                    other = self.tensors[tensor.name].file
                    raise BadCheckpoint(f"{self.folder.label}: {tensor.name!r} is in two shards, {other} and {shard}")
                if weight_map.get(tensor.name) != shard:
                    found = weight_map.get(tensor.name, "nowhere")
                    raise BadCheckpoint(
                        f"{self.folder.label}: {tensor.name!r} is in {shard}, but the index says {found}"
                    )
                self.tensors[tensor.name] = tensor
            if len(self.tensors) > MAX_TENSORS:
                raise BadCheckpoint(f"{self.folder.label}: more than {MAX_TENSORS:,} tensors")
        missing = sorted(weight_map.keys() - self.tensors.keys())
        if missing:
            raise BadCheckpoint(
                f"{self.folder.label}: the index names {missing[0][:60]!r} in {weight_map[missing[0]]}, which lacks it"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[TensorHeader]:
        return iter(self.tensors.values())

"""A folder with files that are made for this run, from tensors that are stored elsewhere in another form.

They lie in files without a name, which the system removes when the process ends, however it ends.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.errors import BadCheckpoint, ConversionRefused, InputChanged
from converter.read.folder import Folder, LocalFolder, Progress


class MadeFile:
    """A file without a name, which lasts as long as this does."""

    def __init__(self, parts: Iterable[bytes | memoryview]) -> None:
        """Write these parts. `ConversionRefused` if there is no room for them."""
        try:
            with tempfile.TemporaryFile(prefix="convert-") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                self.descriptor = os.dup(file.fileno())
        except OSError as exc:
            raise ConversionRefused(
                f"{tempfile.gettempdir()}: a temporary file can't be written ({exc.strerror}): set "
                "TMPDIR to a folder with more room"
            ) from exc
        weakref.finalize(self, os.close, self.descriptor)

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size


@dataclass(frozen=True)
class MadeTensor:
    """A tensor to be written, whose bytes are made when its turn comes."""

    name: str
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], bytes | memoryview]


def weights_file(tensors: Sequence[MadeTensor]) -> MadeFile:
    """A safetensors file of these tensors, of which one at a time is in memory."""
    header, end = {}, 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    raw = json.dumps(header).encode()
    begin = [len(raw).to_bytes(8, "little"), raw]
    return MadeFile(itertools.chain(begin, (tensor.make() for tensor in tensors)))


class MadeFolder:
    """A `Folder` that has the files of another one, but for those that are `made`, and those that are `hidden`.

    Closing it closes the other; what is made lasts as long as the folder, for a batch reads what it closed before.
    """

    def __init__(
        self,
        around: Folder,
        made: Mapping[str, MadeFile],
        hidden: Iterable[str] = (),
        label: str | None = None,
        others: Sequence[Folder] = (),
    ) -> None:
        """`others` are closed with it."""
        self._around, self._others = around, others
        self._label = label
        self._made = dict(made)
        self._hidden = frozenset(hidden)

    @property
    def label(self) -> str:
        return self._label or self._around.label

    @property
    def path(self) -> Path | None:
        return self._around.path

    @property
    def repo_id(self) -> str | None:
        return self._around.repo_id

    @property
    def commit(self) -> str | None:
        return self._around.commit

    def names(self) -> frozenset[str]:
        return (self._around.names() - self._hidden) | self._made.keys()

    def inner_names(self) -> frozenset[str]:
        return self._around.inner_names()

    def size(self, name: str) -> int:
        return self._made[name].size if name in self._made else self._around.size(name)

    def digest(self, name: str) -> str | None:
        return None if name in self._made else self._around.digest(name)

    def identity(self, name: str) -> list[int]:
        return [] if name in self._made else self._around.identity(name)

    def state(self, name: str) -> list[int]:
        return [] if name in self._made else self._around.state(name)

    def fetch(self, names: Iterable[str], progress: Progress | None = None) -> LocalFolder:
        raise BadCheckpoint(f"{self.label}: has files that were made for this run, and can't be fetched")

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._made:
            self._around.read_into(name, offset, buffer)
            return
        descriptor, done = self._made[name].descriptor, 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise InputChanged(f"{self.label}: {name}: ends at byte {offset + done}")
            done += count

    def expect(self, name: str, offset: int) -> None:
        if name not in self._made:
            self._around.expect(name, offset)

    def close(self) -> None:
        for folder in (self._around, *self._others):
            folder.close()

"""A base: its config, its weight map and the headers of its shards, checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Self

from converter.errors import BadCheckpoint
from converter.read.folder import Folder, link_left
from converter.read.header import MAX_TENSORS, TensorHeader, read_header
from converter.read.mistaken import instead_of_a_checkpoint
from converter.read.pickled import read_pickled_header
from converter.read.strict_json import read_json

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

MAX_CONFIG_BYTES = 10_000_000  # of a model; one with 20,000 labels has three million


class Checkpoint:
    """A base: its config, its weight map, the headers of its shards; and their bytes on request.

    Opening it reads the config, the index and the headers. `BadCheckpoint` if one of them is damaged, a shard is
    missing, a tensor is in two shards, or there are more than `most` tensors. `allow_pickle`: where there are no
    safetensors, weights may be pickled.
    """

    def __init__(self, folder: Folder, *, most: int = MAX_TENSORS, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._most = most
        names = folder.names()
        if CONFIG not in names:
            if (left := link_left(folder, CONFIG)) is not None:
                raise BadCheckpoint(left)
            what = instead_of_a_checkpoint(names, folder.path)
            what = what or f"no {CONFIG}, so this is not a transformers checkpoint; give the folder that has it"
            raise BadCheckpoint(f"{folder.label}: {what}")
        self.config = read_json(folder, CONFIG, limit=MAX_CONFIG_BYTES)
        self.tensors: dict[str, TensorHeader] = {}
        self.notes: tuple[str, ...] = ()
        """What the index says otherwise than the headers, which are believed."""
        self.shards = self._read_shards(names, allow_pickle=allow_pickle)
        if not self.tensors:
            raise BadCheckpoint(f"{folder.label}: no tensors")

    def _read_shards(self, names: frozenset[str], *, allow_pickle: bool) -> tuple[str, ...]:
        """Read the headers of all shards, and give their names."""
        # transformers, too, takes the single file where both are there.
        if SINGLE_FILE in names:
            self._read(SINGLE_FILE, read_header)
            return (SINGLE_FILE,)
        if INDEX in names:
            return self._read_index(INDEX, ".safetensors", names, read_header)
        if (left := link_left(self.folder, SINGLE_FILE) or link_left(self.folder, INDEX)) is not None:
            raise BadCheckpoint(left)
        if allow_pickle and PICKLED in names:
            self._read(PICKLED, read_pickled_header)
            return (PICKLED,)
        if allow_pickle and PICKLED_INDEX in names:
            return self._read_index(PICKLED_INDEX, ".bin", names, read_pickled_header)
        if any(name.endswith(".bin") for name in names):
            known = PICKLED in names or PICKLED_INDEX in names
            raise BadCheckpoint(
                f"{self.folder.label}: only pickled weights (.bin); "
                + ("give `allow_pickle` to read them without running any code, or " if known else "")
                + "load the model with transformers, and give the folder that its save_pretrained(FOLDER) writes"
            )
        raise BadCheckpoint(f"{self.folder.label}: neither {SINGLE_FILE} nor {INDEX}; the download may be incomplete")

    def _read_index(
        self, index: str, ending: str, names: frozenset[str], read: Callable[..., dict[str, TensorHeader]]
    ) -> tuple[str, ...]:
        weight_map = self._weight_map(index, ending, names)
        shards = tuple(sorted(set(weight_map.values())))
        for shard in shards:
            self._read(shard, read)
        self.notes = tuple(_differences(index, weight_map, self.tensors))
        return shards

    def _read(self, shard: str, read: Callable[..., dict[str, TensorHeader]]) -> None:
        for tensor in read(self.folder, shard, most=self._most).values():
            if tensor.name in self.tensors:
                other = self.tensors[tensor.name].file
                raise BadCheckpoint(f"{self.folder.label}: {tensor.name!r} is in two shards, {other} and {shard}")
            self.tensors[tensor.name] = tensor
        if len(self.tensors) > self._most:
            raise BadCheckpoint(f"{self.folder.label}: more than {self._most:,} tensors")

    def _weight_map(self, index: str, ending: str, names: frozenset[str]) -> dict[str, str]:
        where = f"{self.folder.label}: {index}"
        weight_map = read_json(self.folder, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpoint(f"{where}: no weight_map")
        for tensor, shard in weight_map.items():
            found = f"{where}: {tensor[:60]!r} is in {str(shard)[:80]!r}"
            if not isinstance(shard, str) or not shard.endswith(ending):
                raise BadCheckpoint(f"{found}, expected a {ending} file")
            if "/" in shard or "\\" in shard:
                raise BadCheckpoint(f"{found}, expected a file inside the folder")
            if shard not in names:
                if (left := link_left(self.folder, shard)) is not None:
                    raise BadCheckpoint(left)
                raise BadCheckpoint(f"{found}, which is not a plain file of the folder")
        return weight_map

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[TensorHeader]:
        return iter(self.tensors.values())


def _differences(index: str, weight_map: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    """What the index says otherwise than the headers of the shards, a line each."""
    elsewhere = [name for name in tensors.keys() & weight_map.keys() if tensors[name].file != weight_map[name]]
    for what, names, so in (
        ("names", weight_map.keys() - tensors.keys(), "no shard has it"),
        ("lacks", tensors.keys() - weight_map.keys(), "a shard has it, so it is converted"),
        ("puts into another shard", elsewhere, "it is read where it is"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"{index} {what} {min(names)[:60]!r}{more}: {so}"

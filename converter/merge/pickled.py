"""Pickled weights of an adapter, which are read only where the user says so (`allow_pickle`), and as weights only.

Their tensors are copied, one at a time, into a temporary safetensors file, which is gone when the run ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import BadAdapter, BadCheckpoint, InputChanged
from converter.merge.files import CONFIG, PICKLED, TRAINED_BESIDE, WEIGHTS
from converter.merge.keys import PREFIX
from converter.read.folder import Folder
from converter.read.header import TensorHeader, read_header
from converter.read.made import MadeFile, MadeFolder, MadeTensor, weights_file
from converter.read.pickled import unpickled_tensors
from converter.read.strict_json import read_json
from converter.tensors import as_bytes, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


def unpickled(folder: Folder) -> Folder:
    """The folder with all its weights in `adapter_model.safetensors`; itself if none of them is pickled.

    Raises `BadAdapter` for a pickle that holds anything but tensors by name.
    """
    names = folder.names()
    read = [name for name in (PICKLED, TRAINED_BESIDE) if name in names and not (name == PICKLED and WEIGHTS in names)]
    if not read or CONFIG not in names or folder.path is None:
        return folder
    before = [folder.identity(name) for name in read]
    tensors = {name: _loaded(folder.path / name, f"{folder.label}: {name}") for name in read}
    made = [_made(key, tensor) for key, tensor in tensors.get(PICKLED, {}).items()]
    if PICKLED not in read:
        made = [_copied(folder, header) for header in _header(folder).values()]
    files = {}
    if beside := tensors.get(TRAINED_BESIDE):
        _refuse_names(beside, {tensor.name for tensor in made}, f"{folder.label}: {TRAINED_BESIDE}")
        made += [_made(key, tensor) for key, tensor in beside.items()]
        files[CONFIG] = MadeFile([json.dumps(_saying_so(folder, beside)).encode()])
    files[WEIGHTS] = weights_file(made)
    if before != [folder.identity(name) for name in read]:
        raise InputChanged(f"{folder.label}: {read[0]} changed while it was being read")
    return MadeFolder(folder, files, hidden=read)


def _loaded(path: Path, where: str) -> dict[str, Tensor]:
    try:
        return unpickled_tensors(path, where)
    except BadCheckpoint as exc:
        raise BadAdapter(str(exc)) from exc


def _made(name: str, tensor: Tensor) -> MadeTensor:
    dtype = stored_dtype(tensor)
    assert dtype is not None  # noqa: S101  (`unpickled_tensors` saw to it)
    return MadeTensor(name, dtype, tuple(tensor.shape), tensor.nbytes, partial(as_bytes, tensor))


def _header(folder: Folder) -> dict[str, TensorHeader]:
    try:
        return read_header(folder, WEIGHTS)
    except BadCheckpoint as exc:
        raise BadAdapter(str(exc)) from exc


def _copied(folder: Folder, header: TensorHeader) -> MadeTensor:
    return MadeTensor(
        header.name,
        header.dtype,
        header.shape,
        header.nbytes,
        lambda: b"".join(piece.tobytes() for piece in header.pieces(folder)),
    )


def _refuse_names(beside: Mapping[str, object], there: set[str], where: str) -> None:
    for name in beside:
        if not name.startswith(PREFIX):
            raise BadAdapter(f"{where}: {name[:60]!r} does not begin with {PREFIX}, as PEFT names what it wraps")
        if name in there:
            raise BadAdapter(f"{where}: {name[:60]!r} is in the adapter's file, too")


def _saying_so(folder: Folder, beside: Mapping[str, object]) -> dict[str, object]:
    """The config with the modules that were trained as a whole among its `modules_to_save`."""
    try:
        config = read_json(folder, CONFIG)
    except BadCheckpoint as exc:
        raise BadAdapter(str(exc)) from exc
    saved = config.get("modules_to_save")
    modules = {name.removeprefix(PREFIX).rpartition(".")[0] for name in beside}
    return config | {"modules_to_save": [*(saved if isinstance(saved, list) else []), *sorted(modules)]}

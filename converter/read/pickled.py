"""Pickled weights of torch, read as weights only, and only where the user says so (`allow_pickle`).

torch.load(weights_only=True) builds tensors and containers, and calls nothing that the file names.
"""

from __future__ import annotations

import re
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import BadCheckpoint
from converter.read.folder import Folder
from converter.read.header import MAX_NAME_LENGTH, MAX_RANK, MAX_TENSORS, TensorHeader
from converter.silence import quietly
from converter.tensors import stored_dtype

if TYPE_CHECKING:
    from torch import Tensor

_SAVE_IT = "load the model with transformers, and give the folder that its save_pretrained(FOLDER) writes"


def unpickled_tensors(path: Path, where: str, *, without_values: bool = False) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped into memory where its format allows. `BadCheckpoint` for anything else in it.

    `without_values`: they have a place in the file, and no memory.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    archive = zipfile.is_zipfile(path)
    mode = FakeTensorMode() if without_values else nullcontext()
    try:
        with quietly(), mode:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive and not without_values)
    except Exception as exc:  # whatever a damaged file makes torch raise
        named = re.search(r"GLOBAL ([\w.]+)", str(exc))
        what = f"names {named[1][:100]}, which is no weight" if named else "is damaged, or no pickle of torch"
        raise BadCheckpoint(f"{where}: {what}") from exc
    if not isinstance(found, dict) or not found:
        raise BadCheckpoint(f"{where}: holds {type(found).__name__}, expected tensors by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadCheckpoint(f"{where}: {str(name)[:60]!r} is {type(tensor).__name__}, expected a tensor")
        if tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise BadCheckpoint(f"{where}: {name[:60]!r} does not hold all its values")
        if stored_dtype(tensor) is None:
            raise BadCheckpoint(f"{where}: {name[:60]!r} has the dtype {tensor.dtype}, which safetensors has not")
    return found


def read_pickled_header(folder: Folder, name: str, *, most: int = MAX_TENSORS) -> dict[str, TensorHeader]:
    """The tensors of a pickle, in the order of their offsets: their values are read from the file as they are needed.

    `BadCheckpoint` for what is no pickle of weights, for one that is not on this disk, and for the format that torch
    wrote before version 1.6, in which values have no place of their own.
    """
    where = f"{folder.label}: {name}"
    if folder.path is None:
        raise BadCheckpoint(f"{where}: is pickled, and read from a disk only; download the base, and give its folder")
    path = folder.path / name
    if not _values_lie_in(path):
        raise BadCheckpoint(f"{where}: is damaged, or of a version of torch before 1.6; {_SAVE_IT}")
    tensors = unpickled_tensors(path, where, without_values=True)
    if len(tensors) > most:
        raise BadCheckpoint(f"{where}: {len(tensors):,} tensors, expected at most {most:,}")
    headers = [_header(where, name, key, tensor, folder.size(name)) for key, tensor in tensors.items()]
    return {header.name: header for header in sorted(headers, key=lambda header: (header.offset, header.name))}


def _values_lie_in(path: Path) -> bool:
    """Whether a file is an archive whose parts lie in it as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _header(where: str, file: str, name: str, tensor: Tensor, size: int) -> TensorHeader:
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable() or tensor.ndim > MAX_RANK:
        raise BadCheckpoint(
            f"{where}: tensor name {name[:60]!r} is empty, too long or not printable, or it has no shape"
        )
    if not tensor.is_contiguous():
        raise BadCheckpoint(f"{where}: {name!r} is a view of another tensor; {_SAVE_IT}")
    dtype = stored_dtype(tensor)
    assert dtype is not None  # noqa: S101  (`unpickled_tensors` saw to it)
    # torch sets it under FakeTensorMode: https://docs.pytorch.org/docs/stable/notes/serialization.html
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    offset = size if begin is None else begin + tensor.storage_offset() * tensor.element_size()
    if tensor.nbytes and not 0 <= offset <= size - tensor.nbytes:
        raise BadCheckpoint(f"{where}: {name!r} reaches over the end of the file: truncated?")
    return TensorHeader(name, dtype, tuple(tensor.shape), file, offset, tensor.nbytes)

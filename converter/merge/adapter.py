"""An adapter: PEFT's files, every key classified, every option understood or refused.

The file is the truth: it says which tensors are touched. Its config gives scaling and flags, and is checked against it.
"""

from __future__ import annotations

import hashlib
import json

from converter.errors import BadAdapter, BadCheckpoint
from converter.merge.files import (
    CONFIG,
    WEIGHTS,
    refuse_other_formats,
    refuse_weights_beside,
    whole_model_beside,
)
from converter.merge.keys import Keys, Parts, read_keys
from converter.merge.options import Options
from converter.merge.patterns import SECONDS
from converter.read.folder import Folder
from converter.read.header import DTYPE_BYTES, TensorHeader, read_header
from converter.read.strict_json import read_json
from converter.tensors import all_finite

_FLOATS = ("F32", "F16", "BF16")


class Adapter:
    """A PEFT LoRA adapter. Opening it reads the config and the header, and refuses what is not understood.

    Raises `BadAdapter` for files that contradict themselves, `Unsupported` for options that change the merge in ways
    that this tool does not reproduce.
    """

    def __init__(self, folder: Folder, *, seconds: float = SECONDS, members: tuple[Adapter, ...] = ()) -> None:
        self.folder = folder
        self.members = members
        """The adapters that were combined into this one; usually none."""
        self.notes: list[str] = []
        """What a user should know of the folder."""
        self._look_around()
        try:
            self.config = read_json(folder, CONFIG)
            self.tensors = read_header(folder, WEIGHTS)
        except BadCheckpoint as exc:
            raise BadAdapter(str(exc)) from exc
        self.options = Options(self.config, f"{folder.label}: {CONFIG}", seconds)
        self.notes += self.options.notes
        where = folder.label
        if not self.tensors:
            raise BadAdapter(f"{where}: {WEIGHTS} holds no tensors")
        for tensor in self.tensors.values():
            if tensor.dtype not in _FLOATS and not self.options.is_bridged:
                raise BadAdapter(f"{where}: {tensor.name!r}: dtype {tensor.dtype}, expected {', '.join(_FLOATS)}")
            if tensor.nbytes == 0:
                raise BadAdapter(
                    f"{where}: {tensor.name!r}: empty, as a ZeRO-3 run saves it when its parameters were not gathered"
                )
        keys = read_keys(self.tensors, where, self.options.prefix)
        self.shared = keys.shared
        """What all modules share, by its key."""
        self.modules: dict[str, Parts] = keys.modules
        """The parts of what changes a module, by the module, named as in the model that was trained."""
        self.replacements: dict[str, TensorHeader] = self._replacements(keys)
        """Whole tensors that take the place of the base's, by tensor name: modules_to_save, biases, embeddings."""
        self.options.learn(self.modules)
        scalings = [self.options.scaling(module)[1] for module in self.modules if self.options.has_scaling]
        if scalings and not any(scalings) and not self.replacements:
            raise BadAdapter(
                f"{where}: {CONFIG}: lora_alpha is 0, so that the adapter changes nothing; set it to what was trained"
            )

    @property
    def base_name(self) -> str | None:
        """The base that the adapter says it was trained on."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def base_revision(self) -> str | None:
        revision = self.config.get("revision")
        return revision if isinstance(revision, str) and revision else None

    def check_finite(self) -> str:
        """Read every value once: the sha256 of config and tensors; `BadAdapter` names a tensor with NaN or infinity."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.name):
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
            for piece in tensor.pieces(self.folder):
                digest.update(piece)
                if tensor.dtype in _FLOATS and not all_finite(piece, tensor.dtype):
                    raise BadAdapter(f"{self.folder.label}: {tensor.name!r} holds a NaN or an infinity")
        return digest.hexdigest()

    def is_zero(self, tensor: TensorHeader) -> bool:
        """Whether a tensor holds nothing but zeros."""
        for piece in tensor.pieces(self.folder):
            raw = bytearray(piece)
            last = DTYPE_BYTES[tensor.dtype] - 1  # it has the sign, and -0.0 is a zero, too
            raw[last :: last + 1] = raw[last :: last + 1].replace(b"\x80", b"\0")
            if raw.strip(b"\0"):
                return False
        return True

    def same_bytes(self, one: TensorHeader, other: TensorHeader) -> bool:
        """Whether two tensors of the file are equal in dtype, shape and bytes."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        both = zip(one.pieces(self.folder), other.pieces(self.folder), strict=True)
        return all(mine.tobytes() == yours.tobytes() for mine, yours in both)

    def _look_around(self) -> None:
        label, names = self.folder.label, self.folder.names()
        refuse_other_formats(self.folder)
        refuse_weights_beside(names, label)
        if (model := whole_model_beside(names)) is not None:
            self.notes.append(f"{label}: {model}, of a whole model, lies beside the adapter and is left out")

    def _replacements(self, keys: Keys) -> dict[str, TensorHeader]:
        """One tensor for each name: PEFT writes some twice, and beside them what they took the place of."""
        for name, copy in keys.copies.items():
            if name in keys.replacements and not self.same_bytes(copy, keys.replacements[name]):
                raise BadAdapter(
                    f"{self.folder.label}: {keys.replacements[name].name!r} and {copy.name!r} are the same tensor, but "
                    "they differ"
                )
        found = keys.copies | keys.replacements
        for name, original in keys.originals.items():
            if name not in found:
                raise BadAdapter(f"{self.folder.label}: {original.name!r}: what took its place is not in the file")
        return found

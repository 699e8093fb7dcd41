"""An adapter: PEFT's files, every key classified, every option understood or refused.

The file is the truth: it says which tensors are touched. Its config gives scaling and flags, and is checked against it.
"""

from __future__ import annotations

import hashlib
import json
import re

from converter.errors import BadAdapter, BadCheckpoint, Unsupported
from converter.merge.lora import Lora
from converter.merge.options import Options
from converter.merge.patterns import SECONDS
from converter.read.folder import Folder
from converter.read.header import TensorHeader, read_header
from converter.read.strict_json import read_json
from converter.tensors import all_finite

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_FLOATS = ("F32", "F16", "BF16")


class Adapter:
    """A PEFT LoRA adapter. Opening it reads the config and the header, and refuses what is not understood.

    Raises `BadAdapter` for files that contradict themselves, `Unsupported` for options that change the merge in ways
    that this tool does not reproduce.
    """

    def __init__(self, folder: Folder, *, seconds: float = SECONDS) -> None:
        self.folder = folder
        names = folder.names()
        for name in (CONFIG, WEIGHTS):
            if name not in names:
                pickled = name == WEIGHTS and "adapter_model.bin" in names
                hint = "only pickled weights (.bin), which this tool does not unpickle" if pickled else f"no {name}"
                raise BadAdapter(f"{folder.label}: {hint}")
        try:
            self.config = read_json(folder, CONFIG)
            self.tensors = read_header(folder, WEIGHTS)
        except BadCheckpoint as exc:
            raise BadAdapter(str(exc)) from exc
        self.options = Options(self.config, f"{folder.label}: {CONFIG}", seconds)
        self.pairs: dict[str, Lora] = {}
        """By module name."""
        self.replacements: dict[str, TensorHeader] = {}
        """Whole tensors that take the place of the base's, by tensor name: modules_to_save, biases, embeddings."""
        self._classify()

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
                if not all_finite(piece, tensor.dtype):
                    raise BadAdapter(f"{self.folder.label}: {tensor.name!r} holds a NaN or an infinity")
        return digest.hexdigest()

    def is_zero(self, tensor: TensorHeader) -> bool:
        """Whether a tensor holds nothing but zeros."""
        return not any(piece.tobytes().strip(b"\0") for piece in tensor.pieces(self.folder))

    def same_bytes(self, one: TensorHeader, other: TensorHeader) -> bool:
        """Whether two tensors of the file are equal in dtype, shape and bytes."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        both = zip(one.pieces(self.folder), other.pieces(self.folder), strict=True)
        return all(mine.tobytes() == yours.tobytes() for mine, yours in both)

    def _classify(self) -> None:
        halves: dict[str, dict[str, TensorHeader]] = {}
        for key, tensor in self.tensors.items():
            where = f"{self.folder.label}: {key!r}"
            if not key.startswith(PREFIX):
                raise BadAdapter(f"{where}: expected a name that begins with {PREFIX}")
            if tensor.dtype not in _FLOATS:
                raise BadAdapter(f"{where}: dtype {tensor.dtype}, expected {', '.join(_FLOATS)}")
            if tensor.nbytes == 0:
                raise BadAdapter(f"{where}: empty, as a ZeRO-3 run saves it when its parameters were not gathered")
            path = key.removeprefix(PREFIX)
            if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", path):
                if len(tensor.shape) != 2:
                    raise Unsupported(f"{where}: {len(tensor.shape)} dimensions; LoRA on linear layers has 2")
                pair = halves.setdefault(match[1], {})
                if match[2] in pair:
                    raise BadAdapter(f"{where}: the module has this factor twice")
                pair[match[2]] = tensor
            elif "lora_" in path or "trainable_tokens" in path:
                raise Unsupported(f"{where}: this kind of tensor is not merged; LoRA on linear layers is")
            elif "modules_to_save" in path or not re.fullmatch(r".+\.(weight|bias)", path):
                raise Unsupported(f"{where}: not a name that this tool understands")
            else:
                name = re.sub(r"\.base_layer(\.(?:weight|bias))$", r"\1", path)
                if name in self.replacements:
                    raise BadAdapter(f"{where}: the adapter has {name!r} twice")
                self.replacements[name] = tensor
        self.options.learn(halves)
        for module, pair in halves.items():
            self.pairs[module] = self._pair(module, pair)
        if not self.tensors:
            raise BadAdapter(f"{self.folder.label}: {WEIGHTS} holds no tensors")

    def _pair(self, module: str, halves: dict[str, TensorHeader]) -> Lora:
        where = f"{self.folder.label}: {module}"
        if len(halves) != 2:
            missing = "B" if "A" in halves else "A"
            raise BadAdapter(f"{where}: has no lora_{missing}.weight")
        a, b = halves["A"], halves["B"]
        rank, scaling = self.options.scaling(module)
        if a.shape[0] != b.shape[1]:
            raise BadAdapter(f"{where}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}: their ranks differ")
        if a.shape[0] != rank:
            raise BadAdapter(f"{where}: rank {a.shape[0]} in the file, {rank} in {CONFIG}")
        return Lora(module, a, b, scaling)

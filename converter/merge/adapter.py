"""An adapter: PEFT's files, every key classified, every option understood or refused.

The file is the truth: it says which tensors are touched. Its config gives scaling and flags, and is checked against it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import BadAdapter, BadCheckpoint, Unsupported
from converter.merge.lora import Lora
from converter.merge.patterns import Patterns
from converter.read.checkpoint import Folder, TensorHeader, read_header, read_json

if TYPE_CHECKING:
    import numpy as np

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What a saved LoraConfig may say without changing the merge, and what is read below.
_WITHOUT_EFFECT = """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    megatron_core runtime_config eva_config lora_B_layout qalora_group_size
"""
_READ = """
    r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform
    layers_pattern fan_in_fan_out bias modules_to_save init_lora_weights
"""
_UNDERSTOOD = frozenset(_WITHOUT_EFFECT.split() + _READ.split())
# Initialisations that leave the base as it was; most others change the base that the adapter was trained on.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
_FLOATS = {"F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
"""Bytes and the exponent's bits; all of them set means infinity or NaN."""
_LARGEST = float(2**128 - 2**104)
"""What float32 holds, in which deltas are computed."""
_PIECE = 8 << 20
_LAYER = r"(?:^|.*?\.){}\.(?P<layer>\d+)\."


class Adapter:
    """A PEFT LoRA adapter. Opening it reads the config and the header, and refuses what is not understood.

    Raises `BadAdapter` for files that contradict themselves, `Unsupported` for options that change the merge in ways
    that this tool does not reproduce.
    """

    def __init__(self, folder: Folder) -> None:
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
        self._patterns = Patterns(f"{folder.label}: {CONFIG}")
        self._lists: dict[str, frozenset[Any]] = {}
        self._check_config()
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
            for piece in self._pieces(tensor):
                digest.update(piece)
                if tensor.dtype in _FLOATS and not _all_finite(piece, tensor.dtype):
                    raise BadAdapter(f"{self.folder.label}: {tensor.name!r} holds a NaN or an infinity")
        return digest.hexdigest()

    def is_zero(self, tensor: TensorHeader) -> bool:
        """Whether a tensor holds nothing but zeros."""
        return all(piece == bytes(len(piece)) for piece in self._pieces(tensor))

    def same_bytes(self, one: TensorHeader, other: TensorHeader) -> bool:
        """Whether two tensors of the file are equal in dtype, shape and bytes."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return all(mine == yours for mine, yours in zip(self._pieces(one), self._pieces(other), strict=True))

    def is_saved_whole(self, module: str) -> bool:
        """Whether `modules_to_save` names the module, one around it, or the end of its name.

        PEFT wraps every module whose path ends with the name, without regard to dots: `norm` means input_layernorm,
        too (`peft.utils.other._set_trainable`).
        """
        return self._excluded(module) or any(module.endswith(name) for name in self._strings("modules_to_save"))

    def targets(self, module: str) -> bool:
        """Whether the config's targeting names the module; PEFT's rules, `exclude_modules` and layer lists included.

        `peft.tuners.tuners_utils.check_target_module_exists`
        """
        if self._excluded(module) or self._names("exclude_modules", module):
            return False
        target = self.config.get("target_modules")
        if isinstance(target, str) and target.lower() == "all-linear":
            return True  # resolved by what the modules are; that the file has their tensors is what says it here
        if not self._names("target_modules", module):
            return False
        layers = self.config.get("layers_to_transform")
        if layers in (None, [], "") or isinstance(target, str) or module in self._listed("target_modules"):
            return True
        patterns = _as_list(self.config.get("layers_pattern"))
        expressions = [_LAYER.format(pattern) for pattern in patterns] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        matches = (self._patterns.search_from_start(expression, module) for expression in expressions)
        found = next((match for match in matches if match), None)
        if found is None or found["layer"] is None:
            return False
        return int(found["layer"]) in self._listed("layers_to_transform")

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank and scaling that the config gives a module: alpha / r, or alpha / sqrt(r) with rsLoRA.

        `r` and `alpha` may be overridden by the first matching pattern, as in `peft.utils.get_pattern_key`.
        """
        rank = self._by_pattern("rank_pattern", module, self.config.get("r"))
        alpha = self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha"))
        where = f"{self.folder.label}: {CONFIG}"
        if type(rank) is not int or not 1 <= rank < 1 << 31:
            raise BadAdapter(f"{where}: rank {rank!r} for {module}, expected a positive integer")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST:
            raise BadAdapter(
                f"{where}: lora_alpha {str(alpha)[:60]!r} for {module}, expected a number that float32 can hold"
            )
        return rank, alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _check_config(self) -> None:
        where = f"{self.folder.label}: {CONFIG}"
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise Unsupported(f"{where}: peft_type {kind!r}; this tool merges LORA")
        init = self.config.get("init_lora_weights", True)
        if init not in _PLAIN_INITIALISATIONS:
            raise Unsupported(
                f"{where}: init_lora_weights {init!r} may change the base that the adapter was trained on; convert the "
                "adapter to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        for key, value in self.config.items():
            if key not in _UNDERSTOOD and value not in (None, False, 0) and value not in ({}, [], ""):
                raise Unsupported(f"{where}: {key} = {str(value)[:60]!r} is not an option that this tool understands")
        bias = self.config.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise BadAdapter(f"{where}: bias {bias!r}, expected none, all or lora_only")
        if not isinstance(self.config.get("use_rslora", False), bool | None):
            raise BadAdapter(f"{where}: use_rslora {self.config['use_rslora']!r}, expected true or false")
        self._check_names()
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = self.config.get(key) or {}
            if not isinstance(patterns, Mapping):
                raise BadAdapter(f"{where}: {key} is not a mapping")
            for pattern in patterns:
                self._patterns.check(key, pattern, _at_the_end(pattern))

    def _check_names(self) -> None:
        """The options that name modules or layers."""
        where = f"{self.folder.label}: {CONFIG}"
        for key in ("target_modules", "exclude_modules"):
            if isinstance(expression := self.config.get(key), str):
                self._patterns.check(key, expression, expression)
            else:
                self._strings(key)
        for name in self._strings("modules_to_save"):
            self._patterns.check("modules_to_save", name, _around(name))
        layers = self.config.get("layers_to_transform")
        if layers is not None and not all(type(layer) is int for layer in _as_list(layers)):
            raise BadAdapter(f"{where}: layers_to_transform is not a list of numbers")
        for pattern in _as_list(self.config.get("layers_pattern")):
            if not isinstance(pattern, str):
                raise BadAdapter(f"{where}: layers_pattern is not a list of names")
            self._patterns.check("layers_pattern", pattern, _LAYER.format(pattern))

    def _excluded(self, module: str) -> bool:
        names = self._strings("modules_to_save")
        return any(self._patterns.search_from_start(_around(name), module) for name in names)

    def _names(self, key: str, module: str) -> bool:
        """Whether an expression is all of the module's path, or a list has it or an end of it."""
        if isinstance(value := self.config.get(key), str):
            return self._patterns.covers(value, module)
        parts = module.split(".")
        return any(".".join(parts[start:]) in self._listed(key) for start in range(len(parts)))

    def _listed(self, key: str) -> frozenset[Any]:
        """The names or numbers of a list, which may be long, for looking up; a number is a list of one."""
        if key not in self._lists:
            value = self.config.get(key)
            self._lists[key] = frozenset(_as_list(value) if isinstance(value, list | int) else ())
        return self._lists[key]

    def _by_pattern(self, key: str, module: str, default: object) -> object:
        patterns: Mapping[str, object] = self.config.get(key) or {}
        for pattern, value in patterns.items():
            if self._patterns.search_from_start(_at_the_end(pattern), module):
                return value
        return default

    def _strings(self, key: str) -> list[str]:
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadAdapter(f"{self.folder.label}: {CONFIG}: {key} is not a list of names")
        return value

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
        rank, scaling = self.scaling(module)
        if a.shape[0] != b.shape[1]:
            raise BadAdapter(f"{where}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}: their ranks differ")
        if a.shape[0] != rank:
            raise BadAdapter(f"{where}: rank {a.shape[0]} in the file, {rank} in {CONFIG}")
        return Lora(module, a, b, scaling)

    def _pieces(self, tensor: TensorHeader) -> Iterator[bytearray]:
        for start in range(0, tensor.nbytes, _PIECE):
            buffer = bytearray(min(_PIECE, tensor.nbytes - start))
            self.folder.read_into(tensor.file, tensor.offset + start, memoryview(buffer))
            yield buffer


def _all_finite(raw: bytearray, dtype: str) -> bool:
    import numpy

    width, exponent = _FLOATS[dtype]
    bits: np.ndarray[Any, Any] = numpy.frombuffer(raw, dtype=f"<u{width}")
    return not bool(numpy.any((bits & exponent) == exponent))


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _at_the_end(pattern: str) -> str:
    """What `peft.utils.other.get_pattern_key` makes of a key of rank_pattern."""
    return rf"(.*\.)?({pattern})$"


def _around(name: str) -> str:
    """What `peft.tuners.tuners_utils.check_target_module_exists` makes of a name in modules_to_save."""
    return rf"(^|.*\.){name}($|\..*)"

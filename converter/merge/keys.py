"""What the names in an adapter's file say: which module a tensor belongs to, and which part of its change it is.

PEFT names a tensor `base_model.model.MODULE.PART`, PART being lora_A.weight, lora_embedding_B, … A tensor that is saved
whole keeps its own name. Wrappers of torch and of PEFT leave words of their own in names; they are taken out here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from converter.errors import BadAdapter
from converter.read.header import TensorHeader

PREFIX = "base_model.model."
_WRAPPERS = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
"""What torch.compile, FSDP and checkpointing put into the names of what they wrap; no module is called so."""
_MODULE = r"(?P<module>.+?)\.(?P<inside>(?:base_layer\.)*)"
_FACTOR = re.compile(_MODULE + r"(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")
_BARE = re.compile(
    _MODULE + r"(?:token_adapter\.)?(?P<part>lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_OTHER = re.compile(r"(?P<module>.+?)\.(?P<part>(?:base_layer\.)*(?:lora_|token_adapter\.|trainable_tokens_).*)")
_SAVED = re.compile(r"(?P<module>.+)\.(?P<which>modules_to_save|original_module)\.(?P<rest>.+)")

Parts = dict[str, TensorHeader]
"""Of one module: lora_A, lora_B, lora_B.bias, lora_embedding_A, lora_magnitude_vector, trainable_tokens_delta, …; those
of a parameter that PEFT wrapped first begin with `base_layer.`"""


@dataclass
class Keys:
    """The tensors of an adapter's file, sorted by what they are for."""

    modules: dict[str, Parts] = field(default_factory=dict)
    """By the module that they change, named as in the model that was trained."""
    replacements: dict[str, TensorHeader] = field(default_factory=dict)
    """Whole tensors that take the place of the base's, by tensor name: modules_to_save, biases, embeddings."""
    originals: dict[str, TensorHeader] = field(default_factory=dict)
    """What `replacements` took the place of, as PEFT saves it beside them where the vocabulary grew."""
    shared: dict[str, TensorHeader] = field(default_factory=dict)
    """What all modules of another tuner share, by its key."""
    copies: dict[str, TensorHeader] = field(default_factory=dict)
    """Replacements that the file has a second time, as `modules_to_save`."""


def read_keys(tensors: Mapping[str, TensorHeader], where: str, prefix: str | None = None) -> Keys:
    """Sort the tensors of an adapter's file by module.

    `prefix` is how the names of the parts begin; None: as LoRA's do. `where` begins the message of the `BadAdapter`
    that is raised if names contradict each other.
    """
    shared = {key for key in tensors if prefix is not None and key.startswith(f"base_model.{prefix}")}
    paths = _paths([key for key in tensors if key not in shared], where)
    found = Keys()
    if prefix is not None:
        return _of_another_tuner(paths, tensors, prefix, where)
    names: set[str] = set()
    for key, path in paths.items():
        factor = _FACTOR.fullmatch(path) or _BARE.fullmatch(path)
        if factor is not None:
            names.add(factor["adapter"] or "default")
            leaf = factor.groupdict().get("leaf")
            part = factor["inside"] + factor["part"] + (".bias" if leaf == "bias" else "")
            _add_part(found, factor["module"], part, tensors[key], where)
        elif other := _OTHER.fullmatch(path):
            _add_part(found, other["module"], other["part"], tensors[key], where)
    if len(names) > 1:
        first, second, *_ = sorted(names)
        raise BadAdapter(f"{where}: holds several adapters, {first!r} and {second!r}; save one of them alone")
    for key, path in paths.items():
        if not (_FACTOR.fullmatch(path) or _BARE.fullmatch(path) or _OTHER.fullmatch(path)):
            _add_whole(found, path, tensors[key], names | {"default"}, where)
    return found


def _of_another_tuner(paths: Mapping[str, str], tensors: Mapping[str, TensorHeader], prefix: str, where: str) -> Keys:
    """Parts whose names begin with `prefix`; what all modules share stands beside the model."""
    found = Keys(shared={key: tensor for key, tensor in tensors.items() if key not in paths})
    part = re.compile(rf"(?P<module>.+?)\.(?:base_layer\.)*(?P<part>{prefix}.+)")
    for key, path in paths.items():
        if match := part.fullmatch(path):
            _add_part(found, match["module"], match["part"].replace(".default", ""), tensors[key], where)
        else:
            _add_whole(found, path, tensors[key], {"default"}, where)
    return found


def _paths(tensors: Iterable[str], where: str) -> dict[str, str]:
    """Key → what follows PEFT's prefix, without the words of wrappers."""
    plain = {key: ".".join(word for word in key.split(".") if word not in _WRAPPERS) for key in tensors}
    plain = {key: path.removeprefix("module.") if "base_model." in path else path for key, path in plain.items()}
    lacking = [key for key, path in plain.items() if not path.startswith(PREFIX)]
    if lacking and len(lacking) < len(plain):
        having = next(key for key in plain if key not in lacking)
        raise BadAdapter(f"{where}: {lacking[0]!r} does not begin with {PREFIX}, as {having!r} does")
    return {key: path.removeprefix(PREFIX) for key, path in plain.items()}


def _add_part(found: Keys, module: str, part: str, tensor: TensorHeader, where: str) -> None:
    parts = found.modules.setdefault(module, {})
    if part in parts:
        raise BadAdapter(f"{where}: {tensor.name!r}: the module has this tensor twice")
    parts[part] = tensor


def _add_whole(found: Keys, path: str, tensor: TensorHeader, adapters: set[str], where: str) -> None:
    saved = _SAVED.fullmatch(path)
    name = path if saved is None else f"{saved['module']}.{_without(saved['rest'], adapters)}"
    name = re.sub(r"\.(?:base_layer|ln_tuning_layers)(\.[^.]+)$", r"\1", name)
    if saved is None:
        place = found.replacements
    else:
        place = found.copies if saved["which"] == "modules_to_save" else found.originals
    if name in place:
        raise BadAdapter(f"{where}: {tensor.name!r}: the adapter has {name!r} twice")
    place[name] = tensor


def _without(rest: str, adapters: set[str]) -> str:
    """What follows the adapter's name, if it is there."""
    first, dot, inner = rest.partition(".")
    return inner if dot and first in adapters else rest

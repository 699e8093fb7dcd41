"""The files beside the weights: which are copied into the output, and from where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from converter.errors import BadCheckpoint, ConversionRefused
from converter.read.folder import Folder, read_bytes
from converter.read.strict_json import read_json

MAX_SIDE_FILE_BYTES = 200_000_000
"""Of one file, and of all of them: they are in memory when they are copied."""
MAX_TOKENIZER_VALUES = 6_000_000
"""A vocabulary of a million pieces has three million."""

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
    "*.spm",
    "spm.model",
    "sentencepiece*.model",
)
_TOKENIZER = (
    *_VOCABULARIES,
    "*.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
    "*vocab*.json",
    "*vocab*.txt",
    "*merges*.txt",
    "*token*.json",
)
_SETTINGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
_MODULES = "modules.json"
_NOT_SAID = (
    *(".*", "*.py", "README.md", "config.json", "*.safetensors", "*.index.json", "*.bin", "conversion.json"),
    *("SHA256SUMS", "adapter_config.json"),
)
"""Of files that are not copied: weights, what an output has of its own, and what is spoken of elsewhere."""
_OTHERS = (*_SETTINGS, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_BESIDE_WEIGHTS = ("model.safetensors.index.json", "adapter_config.json")
_MAX_MODULES_BYTES = 1_000_000
_MAY_NAME_CODE = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)


@dataclass(frozen=True)
class SideFile:
    """A file to copy as it is."""

    name: str
    origin: str
    """base or adapter"""


def wanted_from_base(base: Folder) -> list[str]:
    """Names of the base's files that are copied or read besides the weights."""
    wanted = {name for name in base.names() if _is_one_of(name, (*_TOKENIZER, *_OTHERS, "README.md"))}
    return sorted(wanted | _of_modules(base))


def _of_modules(base: Folder) -> set[str]:
    """The files of the folders that modules.json names: what sentence-transformers does after the model, such as its
    pooling."""
    if _MODULES not in base.names():
        return set()
    try:
        modules = json.loads(read_bytes(base, _MODULES, limit=_MAX_MODULES_BYTES))
    except (ValueError, RecursionError) as exc:
        raise BadCheckpoint(f"{base.label}: {_MODULES} is not JSON: {exc}") from exc
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    found: set[str] = set()
    for path in paths:
        if isinstance(path, str) and path and path.isprintable():
            found |= {name for name in base.names_in(path) if name.isprintable() and not name.endswith(".py")}
    return found


def left_behind(base: Folder, chosen: Iterable[SideFile]) -> list[str]:
    """Files of the base that are not copied, and that a user may miss."""
    copied = {side.name for side in chosen}
    return sorted(name for name in base.names() - copied if not _is_one_of(name, _NOT_SAID))


def is_loaded(name: str) -> bool:
    """Whether a loader that finds a file of this name beside a checkpoint reads it, weights excepted."""
    return _is_one_of(name, (*_TOKENIZER, *_SETTINGS, *_BESIDE_WEIGHTS))


def choose(base: Folder, adapter: Folder | None, *, trust_remote_code: bool) -> tuple[SideFile, ...]:
    """What to copy. The tokenizer is taken as one set: the adapter's if it has one, else the base's."""
    base_names = base.names()
    adapter_names = adapter.names() if adapter is not None else frozenset()
    own_tokenizer = any(_is_one_of(name, _VOCABULARIES) for name in adapter_names)
    chosen = {name: SideFile(name, "base") for name in base_names if _is_one_of(name, _OTHERS)}
    chosen |= {name: SideFile(name, "base") for name in _of_modules(base)}
    tokenizer = adapter_names if own_tokenizer else base_names
    origin = "adapter" if own_tokenizer else "base"
    chosen |= {name: SideFile(name, origin) for name in tokenizer if _is_one_of(name, _TOKENIZER)}
    for name in _MAY_NAME_CODE:
        folder = adapter if adapter is not None and origin == "adapter" and name == "tokenizer_config.json" else base
        if name not in folder.names():
            continue
        for module in _code_named_by(read_json(folder, name)):
            if not trust_remote_code:
                raise ConversionRefused(
                    f"{folder.label}: {name} names Python code ({module}); with `trust_remote_code` its files are "
                    "copied, and still never run"
                )
            if module in folder.names() and module.isprintable():
                chosen[module] = SideFile(module, "adapter" if folder is adapter else "base")
    total = 0
    for side in chosen.values():
        total += (base if side.origin == "base" or adapter is None else adapter).size(side.name)
        if total > MAX_SIDE_FILE_BYTES:
            raise BadCheckpoint(
                f"{base.label}: {side.name} and other files beside the weights have more than "
                f"{MAX_SIDE_FILE_BYTES:,} bytes"
            )
    return tuple(chosen[name] for name in sorted(chosen))


def read_side_files(files: Iterable[SideFile], folder_of: Callable[[str], Folder]) -> dict[str, bytes]:
    """The bytes of side files, by name; `folder_of` gives the folder of an origin."""
    return {side.name: read_bytes(folder_of(side.origin), side.name, limit=MAX_SIDE_FILE_BYTES) for side in files}


def largest_token(raw: bytes) -> int:
    """The largest id in a tokenizer.json."""
    if sum(raw.count(mark) for mark in b",[{") > MAX_TOKENIZER_VALUES:
        raise BadCheckpoint(f"tokenizer.json: not a tokenizer: more than {MAX_TOKENIZER_VALUES:,} values")
    try:
        tokenizer: dict[str, Any] = json.loads(raw)
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram models list [piece, score] pairs; the others map token to id.
        ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else list(vocabulary.values())
        ids += [token["id"] for token in tokenizer.get("added_tokens") or ()]
        return max(int(number) for number in ids)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise BadCheckpoint(f"tokenizer.json: not a tokenizer: {type(exc).__name__} {exc}") from exc


def _code_named_by(config: Mapping[str, Any]) -> list[str]:
    """What an `auto_map` names: "modeling_x.XForCausalLM" means the file modeling_x.py of this folder.

    With "--" in it, it is code of another repository, and given as it is. A list is a tokenizer's, in the old way.
    """
    auto_map = config.get("auto_map") or {}
    values: list[object] = []
    for value in auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]:
        values += value if isinstance(value, list) else [value]
    named = [value for value in values if isinstance(value, str)]
    return sorted({value if "--" in value else f"{value.partition('.')[0]}.py" for value in named})


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    # A name with a line break would be a row of its own in SHA256SUMS; others could not be written to it.
    return name.isprintable() and any(fnmatchcase(name, pattern) for pattern in patterns)

"""The files beside the weights: which are copied into the output, and from where."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any

from converter.errors import BadCheckpoint, ConversionRefused
from converter.read.folder import Folder, read_bytes
from converter.read.strict_json import read_json

MAX_SIDE_FILE_BYTES = 200_000_000
"""Of one file, and of all of them: they are in memory when they are copied."""
MAX_OTHER_BYTES = 50_000_000
"""Of those that no loader is known to read."""
MAX_SIDE_FILES = 200
MAX_TOKENIZER_VALUES = 6_000_000
"""A vocabulary of a million pieces has three million."""

_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "dict*.txt", "bpe.codes"),
    *("*.model", "*.tiktoken", "*.spm", "*.bpe"),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_TOKENIZER = (
    *_VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "normalizer.json"),
    *("tekken.json", "*vocab*.json", "*vocab*.txt", "*merges*.txt", "*token*.json"),
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
_MODULES, _TOKENIZER_CONFIG = "modules.json", "tokenizer_config.json"
_OWN = (
    *("config.json", "README.md", "conversion.json", "gates.json", "SHA256SUMS", "adapter_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
)
"""What an output has of its own, and what is spoken of elsewhere: neither copied nor said."""
_WEIGHTS = (
    *("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.pt2", "*.ckpt*", "*.distcp", "*.nemo", "*.pkl", "*.pickle"),
    *("*.joblib", "*.index.json", "*.bin.index*.json", "*.data-*-of-*", "weights*.npz", "model*.npz"),
    *("*.h5", "*.hdf5", "*.keras", "*.pb", "*.tflite", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data*", "*.onnx.data"),
    *("*.gguf", "*.ggml", "*.ggml*.bin", "*.mlmodel", "*.mlpackage", "*.engine", "*.plan", "*.llamafile"),
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z"),
)
"""Weights in any format or variant, pickles, and archives."""
_OTHERS_OWN = (
    *("params.json", "*quant*_config.json", "openvino_*.xml", "events.out.tfevents.*"),
    *(
        "flax_model*",
        "tf_model*",
        "rust_model*",
        "*.tmp",
        "*.lock",
        "*.incomplete",
        "*.swp",
        "Thumbs.db",
        "desktop.ini",
    ),
)
"""Of another framework, of what quantized the base, or of no use: they describe other files than the output's."""
_OTHERS_FOLDERS = ("onnx", "openvino", "coreml", "tflite", "gguf", "mlx", "original", "runs", "wandb", "__pycache__")
_NO_VOCABULARY = ("*token*.bin", "*vocab*.bin")
"""Named like weights, but a tokenizer's."""
_CODE = ("*.py", "*.so", "*.pyc")
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
    """A file to copy as it is; or, with `inside`, a chat template that is a value of that JSON file."""

    name: str
    origin: str
    """base or adapter"""
    inside: str | None = None


def wanted_from_base(base: Folder) -> list[str]:
    """Names of the base's files that are copied or read besides the weights."""
    return sorted({*_travelling(base, code=True), *({"README.md"} & base.names())})


def wanted_from_adapter(adapter: Folder) -> list[str]:
    """Names of the adapter's files that are copied or read besides its config and tensors."""
    names = adapter.names() | adapter.inner_names()
    return sorted(n for n in names if n == "README.md" or _is_tokenizers(n) or _is_one_of(n, _TEMPLATES))


def _travelling(base: Folder, *, code: bool) -> list[str]:
    """The base's files that an output needs, or may need: all that are not weights, nor of another framework or a
    cache. Those that loaders read come first, then the smaller ones, up to the limits.

    A folder travels as a whole; one with weights in it is another model, unless modules.json names it. `BadCheckpoint`
    where what loaders read alone is beyond the limits."""
    modules = _of_modules(base)
    inner = base.inner_names()
    elsewhere = {name.partition("/")[0] for name in inner - modules if _is_weights(name)} | set(_OTHERS_FOLDERS)
    found = [name for name in base.names() | inner if name in modules or _travels(name, elsewhere, code=code)]
    # Without opening it, where that can be: there may be thousands.
    sizes = {name: (base.identity(name) or [base.size(name)])[0] for name in found}
    needed = {name for name in found if name in modules or is_loaded(name) or _is_one_of(name, _CODE)}
    if sum(sizes[name] for name in needed) > MAX_SIDE_FILE_BYTES or len(needed) > MAX_SIDE_FILES:
        largest = max(sorted(needed), key=lambda name: sizes[name])
        raise BadCheckpoint(
            f"{base.label}: {largest} and other files beside the weights have more than {MAX_SIDE_FILE_BYTES:,} bytes, "
            f"or are more than {MAX_SIDE_FILES:,}"
        )
    smallest = sorted(set(found) - needed, key=lambda name: (sizes[name], name))
    until = accumulate(sizes[name] for name in smallest)
    others = [name for name, total in zip(smallest, until, strict=True) if total <= MAX_OTHER_BYTES]
    return sorted([*needed, *others[: MAX_SIDE_FILES - len(needed)]])


def _travels(name: str, others: Container[str], *, code: bool) -> bool:
    """Whether a file is none of weights, code that nobody asked for, another framework's, a cache's, or the output's
    own. A name with a line break would be a row of its own in SHA256SUMS; others could not be written to it."""
    *folders, last = name.split("/")
    hidden = any(part.startswith(".") for part in (*folders, last))
    elsewhere = bool(folders) and folders[0] in others
    own = not folders and _is_one_of(last, _OWN)
    other = _is_weights(name) or _is_one_of(last, _OTHERS_OWN) or (not code and _is_one_of(last, _CODE))
    return name.isprintable() and not (hidden or elsewhere or own or other)


def _is_weights(name: str) -> bool:
    last = name.rpartition("/")[2]
    return _is_one_of(last, _WEIGHTS) and not _is_one_of(last, _NO_VOCABULARY)


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
    inside = tuple(f"{path}/" for path in paths if isinstance(path, str) and path)
    names = base.inner_names() if inside else ()
    return {name for name in names if name.startswith(inside) and name.isprintable() and not name.endswith(".py")}


def left_behind(base: Folder, shards: Iterable[str], chosen: Iterable[SideFile]) -> list[str]:
    """What is in the base's folder and is not copied, less its `shards` and what an output has of its own: files, links
    that are not followed, and folders, with a slash, of which nothing is copied."""
    copied = {side.name for side in chosen} | set(shards)
    some = {name.partition("/")[0] for name in copied if "/" in name}
    left = {name for name in base.names() | _links_left(base) if not _is_one_of(name, _OWN)}
    for name in base.inner_names():
        folder = name.partition("/")[0]
        left.add(name if folder in some else f"{folder}/")
    return sorted(name for name in left - copied if name.isprintable() and not name.startswith((".", "__pycache__")))


def left_of_adapter(adapter: Folder, chosen: Iterable[SideFile]) -> list[str]:
    """Files of a tokenizer in the adapter's folder that are not copied, for there is no vocabulary with them."""
    wanted = {*wanted_from_adapter(adapter)} - {"README.md"}
    return sorted(wanted - {side.name for side in chosen if side.origin == "adapter"})


def _links_left(base: Folder) -> set[str]:
    if base.path is None:
        return set()
    with os.scandir(base.path) as entries:
        links = {entry.name for entry in entries if entry.is_symlink() and not Path(entry.path).is_dir()}
    return links - base.names()


def is_loaded(name: str) -> bool:
    """Whether a loader that finds a file of this name beside a checkpoint reads it, weights excepted."""
    return _is_tokenizers(name, (*_TOKENIZER, *_SETTINGS, *_BESIDE_WEIGHTS)) or _is_one_of(name, _TEMPLATES)


def choose(base: Folder, adapter: Folder | None, *, trust_remote_code: bool) -> tuple[SideFile, ...]:
    """What to copy: all of the base's files that may be needed. Where the adapter has a tokenizer, all files of that
    take the place of the base's, as one set; the base's chat template stays where the adapter has none."""
    adapter_names = adapter.names() | adapter.inner_names() if adapter is not None else frozenset()
    own_tokenizer = adapter if any(_is_tokenizers(name, _VOCABULARIES) for name in adapter_names) else None
    chosen = {name: SideFile(name, "base") for name in _travelling(base, code=False)}
    if own_tokenizer is not None:
        for name in [name for name in chosen if _is_tokenizers(name)]:
            del chosen[name]
        chosen |= {name: SideFile(name, "adapter") for name in adapter_names if _is_tokenizers(name)}
        templates = {name: SideFile(name, "adapter") for name in adapter_names if _is_one_of(name, _TEMPLATES)}
        if templates or template_in(own_tokenizer):
            for name in [name for name in chosen if _is_one_of(name, _TEMPLATES)]:
                del chosen[name]
            chosen |= templates
        elif template_in(base) and _TEMPLATES[0] not in chosen:
            chosen[_TEMPLATES[0]] = SideFile(_TEMPLATES[0], "base", inside=_TOKENIZER_CONFIG)
    for name in _MAY_NAME_CODE:
        folder = own_tokenizer if own_tokenizer is not None and name == _TOKENIZER_CONFIG else base
        if name not in folder.names():
            continue
        for module in _code_named_by(read_json(folder, name)):
            if not trust_remote_code:
                raise ConversionRefused(
                    f"{folder.label}: {name} names Python code ({module}); with `trust_remote_code` its files are "
                    "copied, and still never run"
                )
            if folder is not base and module in folder.names() and module.isprintable():
                chosen[module] = SideFile(module, "adapter")
    if trust_remote_code:  # what names no file may be imported by one that is named
        chosen = {
            name: SideFile(name, "base") for name in _travelling(base, code=True) if _is_one_of(name, _CODE)
        } | chosen
    return tuple(chosen[name] for name in sorted(chosen))


def template_in(folder: Folder) -> str | None:
    """The chat template in a folder's tokenizer_config.json; None where there is none, or several."""
    if _TOKENIZER_CONFIG not in folder.names():
        return None
    template = read_json(folder, _TOKENIZER_CONFIG).get("chat_template")
    return template if isinstance(template, str) and template else None


def read_side_files(files: Iterable[SideFile], folder_of: Callable[[str], Folder]) -> dict[str, bytes]:
    """The bytes of side files, by name; `folder_of` gives the folder of an origin."""
    return {side.name: _read(side, folder_of(side.origin)) for side in files}


def _read(side: SideFile, folder: Folder) -> bytes:
    if side.inside is None:
        return read_bytes(folder, side.name, limit=MAX_SIDE_FILE_BYTES)
    return (template_in(folder) or "").encode()


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


def _is_tokenizers(name: str, patterns: Iterable[str] = _TOKENIZER) -> bool:
    """Whether a file is one of a tokenizer: no loader looks for one in an inner folder."""
    return "/" not in name and _is_one_of(name, patterns)


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return name.isprintable() and any(fnmatchcase(name, pattern) for pattern in patterns)

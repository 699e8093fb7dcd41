"""Which files an adapter's folder has: PEFT's two, or something else that is called by its name.

Weights that lie beside an adapter were trained with it, as a rule: a merge that leaves them out gives another model.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from converter.errors import BadAdapter, Unsupported
from converter.read.folder import Folder, is_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TRAINED_BESIDE = "non_lora_trainables.bin"
"""LLaVA's whole tensors that were trained with a LoRA, named as PEFT names them."""
OF_MLX = "adapters.safetensors"
"""MLX's weights; what it saved during training is called 0000100_adapters.safetensors."""
FUSE_WITH_MLX = (
    "run `mlx_lm.fuse --model BASE --adapter-path THIS --save-path FUSED`, and give FUSED as `base`, without `adapter`"
)
_OWN_OF_TORCHTUNE = ("adapter_model.pt", "adapter_[0-9]*.pt", "adapter.pt")

_WITHOUT_EFFECT = (
    WEIGHTS,
    PICKLED,
    "adapter_model.pt",  # torchtune's, of which it writes PEFT's files, too
    "adapter_[0-9]*.pt",
    "recipe_state.pt",
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args*", "trainer_state*"),
)
"""Files beside an adapter with the endings of weights, which hold none that was trained: a Trainer's checkpoint."""
_HAVE_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
_WHOLE_MODELS = (
    *("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    *("consolidated.safetensors", "consolidated.*.pth", "tf_model.*", "flax_model.*", "open_clip_*"),
    "pytorch_model_fsdp*.bin",  # that a Trainer saves of the same step
    *("hf_model_*.pt", "meta_model_*.pt", "torchtune_model_*.pt"),  # that torchtune merged
)
_TOKENIZER = ("*.bpe.model", "*token*.bin")

_TO_SAFETENSORS = (
    "from safetensors.torch import save_file; import torch; "
    f"save_file(torch.load('{PICKLED}', weights_only=True), '{WEIGHTS}')"
)
_DISTRIBUTED = (
    "the shards of a distributed checkpoint (FSDP); put them together with `accelerate merge-weights SHARDS FOLDER`, "
    "load what that gives into the PeftModel, and call save_pretrained"
)
_OTHER_FORMATS = (
    (
        (OF_MLX, "[0-9]*_adapters.safetensors", "adapters.npz"),
        f"an adapter of MLX that lacks {CONFIG} or {OF_MLX}; {FUSE_WITH_MLX}",
    ),
    (("*.distcp", ".metadata"), _DISTRIBUTED),
    (
        ("zero_pp_rank_*", "zero_to_fp32.py", "mp_rank_*"),
        "a checkpoint of DeepSpeed; run its zero_to_fp32.py, load what that gives into the PeftModel, and call "
        "save_pretrained",
    ),
    (
        ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
        "a LoRA of diffusers, for a model of images, which this tool does not convert",
    ),
    (
        _OWN_OF_TORCHTUNE,
        f"an adapter in torchtune's own format; give `allow_pickle` to read it, where {CONFIG} (r, lora_alpha: "
        "lora_rank and lora_alpha of the recipe) and config.json of the base lie beside it",
    ),
    (("*.gguf", "ggml-adapter-model.bin"), "an adapter for llama.cpp; give the one of PEFT that it was made from"),
    (
        (f"{WEIGHTS}.index.json", "adapter_model-*-of-*.safetensors"),
        f"an adapter in several files, which PEFT never writes; join them to one {WEIGHTS}",
    ),
    (
        ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
        "a whole model, no adapter; give it as `base`",
    ),
)
"""Names of files → what a folder with one of them is, and the step that helps."""
_DEEPSPEED = dict(_OTHER_FORMATS)["zero_pp_rank_*", "zero_to_fp32.py", "mp_rank_*"]
_INNER_SHARDS = ("pytorch_model_fsdp_*", "adapter_model_fsdp_*", "distcp", "dist_ckpt")
_INNER_DEEPSPEED = ("global_step*",)
_MOST_ENTRIES = 10_000
"""Of a folder, that are looked through for folders."""


def inner_folders(folder: Folder) -> list[str]:
    """The folders in a folder, with `/adapter_config.json` after those that have one."""
    path = folder.path
    if path is None:  # on the Hub
        inner = folder.inner_names()
        tops = sorted({name.partition("/")[0] for name in inner})
        return [f"{top}/{CONFIG}" if f"{top}/{CONFIG}" in inner else top for top in tops]
    with os.scandir(path) as entries:
        folders = [entry.name for entry in itertools.islice(entries, _MOST_ENTRIES) if is_folder(Path(entry.path))]
    return [f"{name}/{CONFIG}" if (path / name / CONFIG).is_file() else name for name in folders]


def is_of_mlx(names: Iterable[str]) -> bool:
    """Whether these are the files of an MLX adapter, and not of a PEFT adapter."""
    return WEIGHTS not in names and {CONFIG, OF_MLX} <= set(names)


def of_torchtune(names: Iterable[str]) -> list[str]:
    """Files of adapters in torchtune's own form; none where PEFT's weights are there, which it saves, too."""
    files = set(names)
    if files & {WEIGHTS, PICKLED}:
        return []
    return sorted(name for name in files if _is_one_of(name, _OWN_OF_TORCHTUNE))


def refuse_other_formats(folder: Folder, taken: Iterable[str] = ()) -> None:
    """Refuse a folder that lacks PEFT's two files, as what it is. Files that are `taken` will do in their place."""
    label, files, folders = folder.label, set(folder.names()), sorted(inner_folders(folder))
    if files & set(taken):
        files.add(WEIGHTS)
    if CONFIG in files and WEIGHTS in files:
        return
    what = _what_it_is(files, folders, folder)
    if what is None and CONFIG in files and PICKLED in files:
        what = (
            f"only pickled weights ({PICKLED}); give `allow_pickle` to read them without running any code, or "
            f'convert them with `python -c "{_TO_SAFETENSORS}"`'
        )
    missing = CONFIG if CONFIG not in files else WEIGHTS
    raise BadAdapter(f"{label}: {what or f'no {missing}; give the folder of an adapter that PEFT saved'}")


def _what_it_is(files: set[str], folders: list[str], folder: Folder) -> str | None:
    adapters = [name.removesuffix(f"/{CONFIG}") for name in folders if name.endswith(f"/{CONFIG}")]
    if adapters and CONFIG not in files:
        listed = ", ".join(adapters[:8])
        step = f"give one of them, as {folder.label}/{adapters[0]}"
        if folder.path is None:
            of_hub = f"{folder.repo_id} --include '{adapters[0]}/*' --local-dir DIR"
            step = f"download one of them, as `hf download {of_hub}`, and give DIR/{adapters[0]}"
        return f"no adapter itself, but its folders are: {listed}; {step}"
    for patterns, what in _OTHER_FORMATS:
        if any(_is_one_of(name, patterns) for name in files):
            return what
    if any(_is_one_of(name, _INNER_SHARDS) for name in folders):
        return _DISTRIBUTED
    if any(_is_one_of(name, _INNER_DEEPSPEED) for name in folders):
        return _DEEPSPEED
    return None


def refuse_weights_beside(names: Iterable[str], label: str, taken: Iterable[str] = ()) -> None:
    """Refuse an adapter beside which lie other weights, but for those that are `taken`, and whole models."""
    for name in sorted(set(names) - set(taken)):
        harmless = (*_WITHOUT_EFFECT, *_TOKENIZER, *_WHOLE_MODELS)
        if _is_one_of(name, _HAVE_WEIGHTS) and not _is_one_of(name, harmless):
            raise Unsupported(
                f"{label}: {name} lies beside the adapter, and what was trained with it may be there: {_step(name)}"
            )


def whole_model_beside(names: Iterable[str]) -> str | None:
    """A file of a whole model that lies beside an adapter, and is left out."""
    return next((name for name in sorted(names) if _is_one_of(name, _WHOLE_MODELS)), None)


def _step(name: str) -> str:
    if name == TRAINED_BESIDE:
        return "give `allow_pickle` to take them, or move it elsewhere to convert without them"
    if re.match(r"(value|v|reward)_?head\.", name):
        return "a value head is not part of any merged model; move it elsewhere to convert without it"
    return "put its tensors into the adapter's file, with modules_to_save, or move it elsewhere to convert without it"


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

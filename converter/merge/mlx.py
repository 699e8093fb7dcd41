"""An adapter of MLX in PEFT's form: the same factors, turned, and the same formula.

MLX adds scale · (x · A) · B to what a linear layer gives; A is (in_features, rank), B (rank, out_features). PEFT's
factors are Aᵀ and Bᵀ, its alpha is scale · rank, and DoRA's lengths are those that MLX calls m.
https://github.com/ml-explore/mlx-lm (mlx_lm/tuner/lora.py, dora.py)
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

from converter.errors import BadAdapter, BadCheckpoint, Unsupported
from converter.merge.change import read_stored
from converter.merge.files import CONFIG, FUSE_WITH_MLX, OF_MLX, WEIGHTS, is_of_mlx
from converter.merge.keys import PREFIX
from converter.read.folder import Folder
from converter.read.header import TensorHeader, read_header
from converter.read.made import MadeFile, MadeFolder, MadeTensor, weights_file
from converter.read.strict_json import read_json
from converter.tensors import as_bytes

NOTE = "an adapter of MLX, whose factors and scale are taken in PEFT's form"
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_PARAMETERS = {"rank", "scale", "dropout", "keys"}
_FLOATS = ("F32", "F16", "BF16")


def in_pefts_form(folder: Folder) -> Folder:
    """The folder with PEFT's two files instead of MLX's; itself if it has none of MLX.

    Raises `BadAdapter` for files that contradict themselves, `Unsupported` for what has no exact form in PEFT.
    """
    names = folder.names()
    if not is_of_mlx(names):
        return folder
    try:
        config, tensors = read_json(folder, CONFIG), read_header(folder, OF_MLX)
    except BadCheckpoint as exc:
        raise BadAdapter(str(exc)) from exc
    made, modules = [], set()
    for tensor in tensors.values():
        found = _PART.fullmatch(tensor.name)
        if found is None:
            raise Unsupported(
                f"{folder.label}: {OF_MLX}: {tensor.name[:100]!r} is no part of MLX's LoRA; {FUSE_WITH_MLX}"
            )
        modules.add(found["module"])
        made.append(_made(folder, tensor, found["module"], found["part"]))
    settings = _settings(config, f"{folder.label}: {CONFIG}") | {"target_modules": sorted(modules)}
    files = {CONFIG: MadeFile([json.dumps(settings).encode()]), WEIGHTS: weights_file(made)}
    return MadeFolder(folder, files, hidden=[name for name in names if name.endswith(OF_MLX)])


def _made(folder: Folder, tensor: TensorHeader, module: str, part: str) -> MadeTensor:
    """PEFT's tensor of one of MLX's."""
    dimensions = 1 if part == "m" else 2
    if tensor.dtype not in _FLOATS:
        raise BadAdapter(f"{folder.label}: {tensor.name!r}: dtype {tensor.dtype}, expected {', '.join(_FLOATS)}")
    if len(tensor.shape) != dimensions:
        raise Unsupported(
            f"{folder.label}: {tensor.name!r} has {len(tensor.shape)} dimensions, as MLX's LoRA on experts has, and "
            f"not {dimensions}; {FUSE_WITH_MLX}"
        )
    name = f"{PREFIX}{module}.{_NAMES[part]}"
    return MadeTensor(name, tensor.dtype, tensor.shape[::-1], tensor.nbytes, partial(_turned, folder, tensor))


def _turned(folder: Folder, tensor: TensorHeader) -> memoryview:
    values = read_stored(tensor, folder)
    return as_bytes(values.T if values.ndim == 2 else values)


def _settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What PEFT's config says of the same adapter."""
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise Unsupported(f"{where}: fine_tune_type {str(kind)[:60]!r} of MLX is no adapter; {FUSE_WITH_MLX}")
    if not isinstance(parameters, dict):
        raise BadAdapter(f"{where}: no lora_parameters, which say the rank and the scale of an adapter of MLX")
    # Before `scale` stood alone, MLX multiplied it by alpha / rank; a later version takes no notice of alpha.
    if odd := sorted(parameters.keys() - _PARAMETERS):
        raise Unsupported(f"{where}: lora_parameters has {odd[0][:60]!r}, whose meaning changed; {FUSE_WITH_MLX}")
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or rank < 1:
        raise BadAdapter(f"{where}: lora_parameters: rank {str(rank)[:60]!r}, expected a positive integer")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise BadAdapter(f"{where}: lora_parameters: scale {str(scale)[:60]!r}, expected a number")
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "use_dora": kind == "dora",
    }

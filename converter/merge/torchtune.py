"""An adapter in torchtune's own file, in PEFT's form: other names, and other rows of q_proj and k_proj.

torchtune computes rotary positions of most models on neighbouring pairs of values, as Meta does, and turns the rows of
both projections when it reads a base; transformers pairs each value with one half a head away. What belongs to these
rows, lora_b and DoRA's magnitude, is turned back here. Models of Qwen have the same rows in both.
https://github.com/pytorch/torchtune (torchtune/models/convert_weights.py, models/*/_convert_weights.py, modules/peft)
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from converter.errors import BadAdapter, BadCheckpoint, InputChanged, Unsupported
from converter.merge.files import CONFIG, PICKLED, WEIGHTS, of_torchtune
from converter.merge.keys import PREFIX
from converter.read.folder import Folder
from converter.read.header import read_header
from converter.read.made import MadeFile, MadeFolder, MadeTensor, weights_file
from converter.read.pickled import unpickled_tensors
from converter.read.strict_json import read_json
from converter.tensors import as_bytes, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor

NOTE = "an adapter of torchtune, whose names and rows of q_proj and k_proj are put into PEFT's form"
OF_BASE = "config.json"
"""The base's config, which torchtune copies into its output folder."""
_TURNED = ("llama", "mistral", "gemma", "gemma2")
_AS_THEY_ARE = ("qwen2", "qwen3")
"""Model types whose rows of q_proj and k_proj torchtune turns, and model types whose rows it leaves."""
_MODULES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_PARTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_NAME = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.(?P<module>[\w.]+)|(?P<head>output))\.(?P<part>lora_[ab]\.weight|magnitude)"
)
_MERGED = "give the merged model that torchtune saves beside its adapters as `base`, without `adapter`"


class _Rows(NamedTuple):
    """How torchtune orders the rows of q_proj and k_proj."""

    heads: dict[str, int]
    """Module of an attention → its heads."""
    head_dim: int
    are_turned: bool


def in_pefts_form(folder: Folder) -> Folder:
    """The folder with PEFT's two files in place of torchtune's. A folder that has PEFT's files, or none of torchtune's,
    is given back as it is.

    Unpickles the weights, as weights only. Raises `BadAdapter` for files that contradict themselves, `Unsupported` for
    what has no exact form in PEFT.
    """
    own = of_torchtune(folder.names())
    if not own or folder.path is None:
        return folder
    if len(own) > 1:
        raise BadAdapter(
            f"{folder.label}: {len(own)} adapters of torchtune, one for each epoch: {', '.join(own[:4])}; "
            "leave one of them in the folder"
        )
    file = f"{folder.label}: {own[0]}"
    if OF_BASE not in folder.names():
        raise BadAdapter(
            f"{file}: its rows are in an order that depends on the base: put the base's {OF_BASE} beside it, as "
            "torchtune does"
        )
    before = folder.identity(own[0])
    try:
        config, rows = read_json(folder, CONFIG), _rows(folder)
        tensors = unpickled_tensors(folder.path / own[0], file)
    except BadCheckpoint as exc:
        raise BadAdapter(str(exc)) from exc
    made = [_made(name, tensor, rows, file) for name, tensor in tensors.items()]
    modules = sorted({tensor.name.removeprefix(PREFIX).rpartition(".lora_")[0] for tensor in made})
    # torchtune can train DoRA, but its config never says so: the names of the tensors do.
    uses_dora = any(name.endswith(".magnitude") for name in tensors)
    settings = {"peft_type": "LORA"} | config | {"target_modules": modules, "use_dora": uses_dora}
    files = {CONFIG: MadeFile([json.dumps(settings).encode()]), WEIGHTS: weights_file(made)}
    if before != folder.identity(own[0]):
        raise InputChanged(f"{file}: changed while it was being read")
    return MadeFolder(folder, files, hidden=own)


def refuse_wrongly_turned(folder: Folder) -> None:
    """Refuse what torchtune saves in PEFT's form for models of Qwen: torchtune turned their rows, which is wrong there.

    That can be known only where torchtune's own file and the base's config lie beside PEFT's file.
    """
    names = folder.names()
    own = of_torchtune(names - {WEIGHTS, PICKLED})
    if not own or OF_BASE not in names or WEIGHTS not in names:
        return
    try:
        kind, tensors = read_json(folder, OF_BASE).get("model_type"), read_header(folder, WEIGHTS)
    except BadCheckpoint as exc:
        raise BadAdapter(str(exc)) from exc
    if kind in _AS_THEY_ARE and any(re.search(r"\.[qk]_proj\.lora_B\.weight$", name) for name in tensors):
        raise Unsupported(
            f"{folder.label}: {WEIGHTS}: torchtune turns the rows of q_proj and k_proj in PEFT's form for every model, "
            f"and a model of {kind} has none to turn; move PEFT's weights elsewhere, and give `allow_pickle`, to read "
            f"{own[-1]}"
        )


def _rows(folder: Folder) -> _Rows:
    config, where = read_json(folder, OF_BASE), f"{folder.label}: {OF_BASE}"
    kind = config.get("model_type")
    if kind not in (*_TURNED, *_AS_THEY_ARE):
        raise Unsupported(
            f"{where}: model_type {str(kind)[:60]!r}: torchtune's adapter of such a model has no exact form in PEFT; "
            f"{_MERGED}"
        )
    heads, width = _count(config, "num_attention_heads", where), _count(config, "hidden_size", where)
    grouped = heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads", where)
    head_dim = width // heads if config.get("head_dim") is None else _count(config, "head_dim", where)
    return _Rows({"attn.q_proj": heads, "attn.k_proj": grouped}, head_dim, kind in _TURNED)


def _count(config: dict[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise BadAdapter(f"{where}: {key} {str(value)[:60]!r}, expected a positive integer")
    return value


def _made(name: str, tensor: Tensor, rows: _Rows, file: str) -> MadeTensor:
    """PEFT's tensor of one of torchtune's."""
    found = _NAME.fullmatch(name)
    if found is None or not (found["head"] or found["module"] in _MODULES):
        raise Unsupported(f"{file}: {name[:100]!r} is no part of LoRA on a linear layer of torchtune; {_MERGED}")
    part = found["part"]
    if tensor.ndim != (1 if part == "magnitude" else 2):
        raise BadAdapter(f"{file}: {name[:100]!r} has {tensor.ndim} dimensions")
    module = "lm_head" if found["head"] else f"model.layers.{found['layer']}.{_MODULES[found['module']]}"
    make = partial(as_bytes, tensor)
    if rows.are_turned and part != "lora_a.weight" and (heads := rows.heads.get(found["module"])) is not None:
        if tensor.shape[0] != heads * rows.head_dim or rows.head_dim % 2:
            raise BadAdapter(
                f"{file}: {name[:100]!r} has {tensor.shape[0]} rows, but {OF_BASE} says {heads} heads of "
                f"{rows.head_dim}; put the config of the base that was trained beside it"
            )
        make = partial(_turned_back, tensor, heads)
    dtype = stored_dtype(tensor)
    assert dtype is not None  # noqa: S101  (`unpickled_tensors` saw to it)
    return MadeTensor(f"{PREFIX}{module}.{_PARTS[part]}", dtype, tuple(tensor.shape), tensor.nbytes, make)


def _turned_back(tensor: Tensor, heads: int) -> memoryview:
    """The rows in transformers' order. torchtune has pair after pair; transformers has, within each head, the first
    values of all pairs, then the second values."""
    return as_bytes(tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous())

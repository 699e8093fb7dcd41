"""compressed-tensors' rules: which modules its target "Linear" means, and which of them a config must name as ignored.

Not asked of compressed-tensors itself, which need not be installed; tests hold the rules to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from converter.errors import BadCheckpoint
from converter.model.architecture import Shape
from converter.model.meta_model import Names, quantized_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_ROUTER = re.compile(r"^(?!.*ExpertMLP).*(?:Router|Gating|Gate(?![a-z]))")
"""Classes that servers make of a linear layer: `get_vllm_module_type` of compressed-tensors."""


def quantizable(model: PreTrainedModel, names: Names, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Tensors to quantize → their modules: linear layers that bitsandbytes would take, too, and experts.

    Not those with a single output: no server has a kernel for them, and they are gates that weigh an expert. Experts
    are matrices on disk that transformers stacks. It loads them only if they are quantized, and so does vLLM.
    """
    by_default = quantized_modules(model, None)
    linear = {name for name, module in model.named_modules() if _is_linear(module)}
    wanted = {}
    for name, shape in shapes.items():
        module = names.parameter_of.get(name, "").removesuffix(".weight")
        if name.endswith(".weight") and len(shape) == 2 and shape[0] > 1:
            if name in names.converted:
                wanted[name] = name.removesuffix(".weight")
            elif module in linear & by_default:
                wanted[name] = module
    return wanted


def modules_to_ignore(model: PreTrainedModel, names: Names, quantized: Collection[str]) -> tuple[str, ...]:
    """The config's `ignore`: linear layers and routers that are not quantized, as the checkpoint names them.

    In the order of the model, as `QuantizationConfig.from_pretrained` lists them. Where the model has another name for
    a linear layer, that follows at the end: transformers compares with its own names.
    """
    ignored, renamed = [], []
    for name, module in model.named_modules():
        if name in quantized or not (_is_linear(module) or _ROUTER.search(type(module).__name__)):
            continue
        stored = names.tensor_of.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        ignored.append(stored)
        if stored != name and _is_linear(module):
            renamed.append(name)
    return tuple(dict.fromkeys(ignored + renamed))


def tensors_expected(model: PreTrainedModel, names: Names, ignored: object) -> set[str]:
    """Tensors that loading expects to be quantized: `match_named_modules` of compressed-tensors for "Linear".

    transformers expects it of experts, too, whatever is ignored. `BadCheckpoint` where `ignored` is no list of names.
    """
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise BadCheckpoint("config.json: quantization_config.ignore is not a list of names")
    plain = {name for name in ignored if not name.startswith("re:")}
    try:
        patterns = [re.compile(name.removeprefix("re:")) for name in ignored if name.startswith("re:")]
    except re.error as exc:
        raise BadCheckpoint(f"config.json: a pattern in quantization_config.ignore can't be understood: {exc}") from exc
    modules = {
        name
        for name, module in model.named_modules()
        if _is_linear(module) and name not in plain and not any(pattern.match(name) for pattern in patterns)
    }
    experts = {name for name in names.converted if name.endswith(".weight")}
    return experts | {names.tensor_of.get(f"{module}.weight", f"{module}.weight") for module in modules}


def _is_linear(module: nn.Module) -> bool:
    return any(kind.__name__ == "Linear" for kind in type(module).__mro__)

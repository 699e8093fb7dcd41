"""A model on the meta device: transformers' classes, no weights, no code of the checkpoint, milliseconds.

The only module that imports transformers, some of whose private functions it calls;
`tests/model/test_versions.py` watches them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.model.architecture import Kind, Role, Shape, Stack
from converter.silence import quietly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_NAME_CODE = ("auto_map", "attn_implementation", "experts_implementation", "kernel_config", "use_kernels")
_COUNTS = (
    (re.compile(r"(?:num|n)_(?:[a-z]+_)*layers?|[a-z]+_layers|depth"), 128),
    (re.compile(r"(?:[a-z]+_)*experts"), 4_096),
    (re.compile(r"num_labels"), 1_000_000),
)
"""Options that cost time and memory while a model is built, and what is plausible whatever the checkpoint's size."""


def meta_model(
    config: Mapping[str, Any], tensors: Mapping[str, Shape], dtype: str, *, remote_code: bool = False
) -> PreTrainedModel | None:
    import torch

    with quietly():
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM

    model_type = config.get("model_type")
    listed = config.get("architectures")
    class_name = listed[0] if isinstance(listed, list) and listed else CAUSAL_LM.get(str(model_type))
    model_class = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
    is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING or not is_model:
        if remote_code:
            return None
        raise Unsupported(
            f"config.json: transformers {transformers.__version__} has no {class_name!r} of model type {model_type!r}"
        )
    _refuse_absurd_counts(config, len(tensors))
    try:
        with quietly(), torch.device("meta"):
            parsed = transformers.CONFIG_MAPPING[model_type].from_dict(_without_code(config))
            model: PreTrainedModel = model_class._from_config(parsed, dtype=getattr(torch, dtype))  # type: ignore[union-attr]
    except Exception as exc:  # whatever a strange config raises in foreign code is the config's fault
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise BadCheckpoint(f"config.json: transformers can't build {class_name} from it: {reason[:200]}") from exc
    if next(model.parameters(), None) is None:
        raise Unsupported(f"config.json: {class_name} is a class without weights")
    return model


def _without_code(value: Any) -> Any:
    """A config without the keys that name kernels to fetch and code to import; none of them shapes the model."""
    if isinstance(value, Mapping):
        return {
            key: _without_code(part) for key, part in value.items() if not key.startswith("_") and key not in _NAME_CODE
        }
    return [_without_code(part) for part in value] if isinstance(value, list) else value


def _refuse_absurd_counts(config: Mapping[str, Any], tensors: int, depth: int = 8) -> None:
    """Refuse counts that no checkpoint of so many tensors has, before a model is built of them."""
    for key, value in config.items():
        if isinstance(value, Mapping) and depth:
            _refuse_absurd_counts(value, tensors, depth - 1)
        for pattern, plausible in _COUNTS:
            if isinstance(value, int) and pattern.fullmatch(key) and value > max(plausible, tensors):
                found = f"{key} {f'{value:,}'[:40]}"
                raise BadCheckpoint(f"config.json: {found}, but the checkpoint has only {tensors:,} tensors")


class Names:
    """Which parameter of a meta model each tensor of a checkpoint becomes, as transformers 5 resolves it."""

    def __init__(self, model: PreTrainedModel, tensors: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            build_glob_alternation,
            dot_natural_key,
            rename_source_key,
        )

        self.model = model
        self.parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, state = model.base_model_prefix, model.state_dict()
        self._integers = {name for name, value in state.items() if not value.is_floating_point()}
        self.parameter_of: dict[str, str] = {}
        self._converters: dict[str, Any] = {}
        self.converted: set[str] = set()
        """Tensors that loading cuts, stacks or otherwise reshapes on their way to a parameter."""
        for name in sorted(tensors, key=dot_natural_key):
            renamed, converter = rename_source_key(name, renamings, converters, prefix, state)
            if renamed not in state and name in state:
                renamed, converter = rename_source_key(name, [], [], prefix, state)
            if renamed in state:
                self.parameter_of[name] = renamed
                if converter is not None:
                    self.converted.add(name)
                    self._converters[name] = next(one for one in converters if converter in one.source_patterns)
        self.tensor_of = {
            parameter: name for name, parameter in self.parameter_of.items() if name not in self.converted
        }
        plan = list(model._get_dtype_plan(model.dtype))
        self._float32 = build_glob_alternation(plan)[0] if plan else None

    @property
    def missing(self) -> set[str]:
        """Parameters that no tensor becomes and that nothing shares."""
        present = set(self.parameter_of.values())
        tied = self.model.all_tied_weights_keys
        fillable = {target for target, source in tied.items() if source in present}
        fillable |= {source for target, source in tied.items() if target in present}
        absent = self.parameters.keys() - present - fillable
        if self.converted:
            # One tensor that is cut in several names only the first of its parameters; the rest can't be told apart.
            targets = {re.sub(r"[^.]+\.[^.]+$", "", self.parameter_of[name]) for name in self.converted}
            absent = {name for name in absent if not any(name.startswith(target) for target in targets)}
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        return {name for name in absent if not any(re.search(pattern, name) for pattern in ignored)}

    def mismatched(self, shapes: Mapping[str, Shape], transposed: Iterable[str] = ()) -> Iterator[tuple[str, Shape]]:
        """Tensors whose shape is not the model's, with the model's; `transposed` ones may be a turned Conv1D."""
        turned = set(transposed)
        for name, parameter in self.parameter_of.items():
            expected = self.parameters[parameter]
            if name in turned and self.kind(parameter) == "conv1d":
                expected = expected[::-1]
            if name not in self.converted and shapes[name] != expected:
                yield name, expected

    def check(self, shapes: Mapping[str, Shape]) -> None:
        if self.missing:
            first = min(self.missing)
            raise BadCheckpoint(
                f"{first}: {type(self.model).__name__} needs it and the base lacks it ({len(self.missing)} missing)"
            )
        for name, parameter in self.parameter_of.items():
            other = self.tensor_of.get(parameter, name)
            if other != name:
                raise BadCheckpoint(
                    f"{name}: {other} is the same parameter of {type(self.model).__name__}: which of the two a loader "
                    "takes, nobody knows"
                )
        for name, expected in self.mismatched(shapes):
            raise BadCheckpoint(f"{name}: shape {list(shapes[name])}, but the config makes it {list(expected)}")

    def stacks(self, shapes: Mapping[str, Shape]) -> Iterator[Stack]:
        """The parameters that hold a matrix for each expert, where it is known what becomes of each tensor."""
        tensors: dict[str, list[str]] = {}
        for name, parameter in self.parameter_of.items():
            tensors.setdefault(parameter, []).append(name)
        for parameter, shape in self.parameters.items():
            owner = self.model.get_submodule(parameter.rpartition(".")[0])
            if len(shape) != 3 or not hasattr(owner, "is_transposed"):
                continue
            pieces = {name: self._piece(name, shapes[name]) for name in tensors.get(parameter, [])}
            known = {name: piece for name, piece in pieces.items() if piece is not None}
            if known and len(known) == len(pieces):
                yield Stack(parameter, shape, bool(owner.is_transposed), known)

    def _piece(self, name: str, shape: Shape) -> tuple[int | None, int, bool] | None:
        if name not in self.converted:
            return None, 0, False
        converter = self._converters[name]
        operations = [type(one).__name__ for one in converter.operations]
        if operations == ["Transpose"]:
            return None, 0, True
        found = re.search(r"\.(\d+)\.([^.]+)\.weight$", name)
        if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or found is None:
            return None
        order = [source.split(".")[-2].strip("\\") for source in converter.source_patterns]
        return (int(found[1]), order.index(found[2]) * shape[0], False) if found[2] in order else None

    def kind(self, parameter: str) -> Kind:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        owner = self.model.get_submodule(parameter.rpartition(".")[0])
        if not parameter.endswith(".weight"):
            return "other"
        if isinstance(owner, nn.Embedding):
            return "embedding"
        if isinstance(owner, Conv1D):
            return "conv1d"
        if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            plain = owner.groups == 1 and set(owner.dilation) == {1} and owner.padding_mode == "zeros"
            return "convolution" if plain else "other"
        return "linear" if isinstance(owner, nn.Linear) else "other"

    def role(self, name: str, shape: Shape) -> Role:
        parameter = self.parameter_of.get(name)
        if parameter is None:
            return Role(None, "other", quantize=False)
        if name in self.converted:
            # Experts that loading stacks: plain matrices on disk, which is where an adapter's delta is added.
            kind: Kind = "linear" if name.endswith(".weight") and len(shape) == 2 else "other"
        else:
            kind = self.kind(parameter)
        float32 = self._float32 is not None and self._float32.search(parameter) is not None
        return Role(parameter, kind, quantize=False, float32=float32, integer=parameter in self._integers)


def default_skips(model: PreTrainedModel, skip: list[str] | None) -> list[str]:
    """Patterns of modules that transformers 5 leaves unquantized, given the config's skip list."""
    from transformers.quantizers.base import HfQuantizer

    patterns: list[str] = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    return patterns


def quantized_modules(model: PreTrainedModel, skip: Iterable[str] | None) -> set[str]:
    """Modules that transformers 5 quantizes, given the config's skip list; the rule of `replace_with_bnb_linear`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = default_skips(model, None if skip is None else list(skip))
    return {
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, patterns)
    }


def modules_that_loading_quantizes(model: PreTrainedModel, quantization: Mapping[str, Any]) -> set[str]:
    """Modules that loading really replaces, by transformers' own function."""
    with quietly():
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        parsed = BitsAndBytesConfig.from_dict(dict(quantization))
        patterns = default_skips(model, parsed.llm_int8_skip_modules)
        replaced = replace_with_bnb_linear(model, patterns, parsed, pre_quantized=True)
    quantized = ("Linear4bit", "Linear8bitLt")
    return {name for name, module in replaced.named_modules() if type(module).__name__ in quantized}

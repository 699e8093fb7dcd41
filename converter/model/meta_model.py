"""A model on the meta device: transformers' classes, no weights, no code of the checkpoint, milliseconds.

With `skeleton`, the only module that imports transformers, some of whose private functions it calls;
`tests/model/test_versions.py` watches them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.model.architecture import Kind, Role, Shape, Stack
from converter.silence import quietly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_NAME_CODE = ("auto_map", "attn_implementation", "experts_implementation", "kernel_config", "use_kernels")
_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf")}
_PURPOSE = re.compile(r"For[A-Z]\w*$|LMHeadModel$")
"""What a class's name says of the head that its models have."""
_COUNTS = (
    (re.compile(r"(?:num|n)_(?:[a-z]+_)*layers?|[a-z]+_layers|depth"), 128),
    (re.compile(r"(?:[a-z]+_)*experts"), 4_096),
    (re.compile(r"num_labels"), 1_000_000),
)
"""Options that cost time and memory while a model is built, and what is plausible whatever the checkpoint's size."""


def meta_model(
    config: Mapping[str, Any], tensors: Mapping[str, Shape], dtype: str, *, remote_code: bool = False
) -> PreTrainedModel | None:
    """The model that a config describes, without weights; None, with `remote_code`, where transformers has no such
    class. Raises `Unsupported` for that otherwise, and `BadCheckpoint` for a config that no model can be made of."""
    import torch

    with quietly():
        import transformers
        from transformers.initialization import no_tie_weights

    model_type, class_name = config.get("model_type"), class_of(config)
    if class_name is None:
        if remote_code:
            return None
        listed = config.get("architectures")
        stated = listed[0] if isinstance(listed, list) and listed else None
        raise Unsupported(
            f"config.json: transformers {transformers.__version__} has no {stated!r} of model type {model_type!r}"
        )
    _refuse_absurd_counts(config, len(tensors))
    try:
        # As when it is loaded: which parameter is the last one, which transformers keeps, depends on it.
        with quietly(), no_tie_weights(), torch.device("meta"):
            parsed = _parsed(config)
            model_class = getattr(transformers, class_name)
            model: PreTrainedModel = model_class._from_config(parsed, dtype=getattr(torch, dtype))
    except Exception as exc:  # whatever a strange config raises in foreign code is the config's fault
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise BadCheckpoint(f"config.json: transformers can't build {class_name} from it: {reason[:200]}") from exc
    if next(model.parameters(), None) is None:
        raise Unsupported(f"config.json: {class_name} is a class without weights")
    return model


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that a config names, or that its model type explains; None if there is none.

    A name that transformers doesn't have (LLaMAForCausalLM, MyOwnForCausalLM) is a matter of spelling, or of whoever
    wrote it: what the auto classes load is the class of the model type for the same purpose (…ForCausalLM).
    """
    with quietly():
        import transformers
        from transformers.models.auto import modeling_auto

    model_type, listed = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        return None
    stated = listed[0] if isinstance(listed, list) and listed else "ForCausalLM"
    if not isinstance(stated, str):
        return None
    named = getattr(transformers, stated, None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return stated
    purpose = _PURPOSE.search(stated)
    if purpose is None or config.get("auto_map"):
        return None  # with code of its own, it is another model whatever its type is called
    if purpose[0] in ("ForCausalLM", "LMHeadModel"):
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        return causal if isinstance(causal, str) else None
    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    names = [table[model_type] for table in tables if isinstance(table.get(model_type), str)]
    return next((name for name in names if name.endswith(purpose[0])), None)


def reads_alike(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether transformers reads all that it reads of a config in another one, too."""
    with quietly():
        read, also = (_parsed(one).to_dict() for one in (config, other))
    return _holds(also, read)


def _holds(value: Any, part: Any) -> bool:
    """Whether a mapping has all that another one has; of other values, whether they are equal."""
    if isinstance(value, Mapping) and isinstance(part, Mapping):
        return all(key in value and _holds(value[key], inner) for key, inner in part.items())
    return bool(value == part)


def _parsed(config: Mapping[str, Any]) -> Any:
    """The config as transformers' class for its model type."""
    import transformers

    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(_without_code(config))


def _without_code(value: Any) -> Any:
    """A config without the keys that name kernels to fetch and code to import; none of them shapes the model.

    Floats that JSON has no form for become what they stand for: transformers 5 writes {"__float__": "Infinity"}.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and str(value["__float__"]) in _FLOATS:
            return _FLOATS[str(value["__float__"])]
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
        self._all_converters = converters
        self._renamed: Callable[[str], str] = lambda name: rename_source_key(
            name, renamings, converters, prefix, state
        )[0]
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
            if len(shape) != 3 or self.kind(parameter) != "other":
                continue
            owner = self.model.get_submodule(parameter.rpartition(".")[0])
            turned = bool(getattr(owner, "is_transposed", False))
            pieces = {name: self._piece(name, shapes[name]) for name in tensors.get(parameter, [])}
            known = {name: piece for name, piece in pieces.items() if piece is not None}
            if known and len(known) == len(pieces):
                yield Stack(parameter, shape, turned, known, () if turned else self._parts(parameter))

    def _parts(self, parameter: str) -> tuple[str, ...]:
        """The linear layers of an expert that loading puts into a parameter, in their order."""
        owner = parameter.rpartition(".")[0]
        for converter in self._all_converters:
            order = _order(converter)
            if order and all(self._renamed(f"{owner}.0.{part}.weight") == parameter for part in order):
                return order
        return ()

    def _piece(self, name: str, shape: Shape) -> tuple[int | None, int, bool] | None:
        if name not in self.converted:
            return None, 0, False
        converter = self._converters[name]
        if _operations(converter) == ["Transpose"]:
            return None, 0, True
        found, order = re.search(r"\.(\d+)\.([^.]+)\.weight$", name), _order(converter)
        if found is None or found[2] not in order:
            return None
        return int(found[1]), order.index(found[2]) * shape[0], False

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


def _operations(converter: Any) -> list[str]:
    return [type(one).__name__ for one in converter.operations]


def _order(converter: Any) -> tuple[str, ...]:
    """The layers whose matrices a converter stacks by expert, one below the other; empty if it does something else."""
    if _operations(converter) not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        return ()
    if len(converter.operations) > 1 and converter.operations[1].dim != 1:
        return ()
    return tuple(source.split(".")[-2].strip("\\") for source in converter.source_patterns)


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


def swapped_by_loading(model: PreTrainedModel, quantization: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Modules that loading a quantized checkpoint replaces by others, whose tensors have other names: module → its
    class and the other one; the rule of `HfQuantizer._convert_model_for_quantization`."""
    with quietly():
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHES

    method = quantization.get("quant_method")
    found = {name: type(module).__name__ for name, module in model.named_modules() if type(module).__name__ in PATCHES}
    return {
        name: (kind, PATCHES[kind]["module_name"].__name__)
        for name, kind in found.items()
        if method in PATCHES[kind]["quantization_methods"]
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

"""What transformers makes of a checkpoint: which weights it quantizes, transposes, ties and keeps in float32.

The only module that imports transformers. It asks a model on the meta device, which costs milliseconds, holds no
weights and runs no code of the checkpoint. Names are checkpoint names; transformers' own names for the same tensors
(since version 5 they differ for some families) are kept beside them and never written.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from converter.errors import BadCheckpoint, BadRecipe, ConversionRefused, Unsupported
from converter.silence import quietly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d", "embedding", "other"]
Shape = tuple[int, ...]

_NAME_CODE = ("auto_map", "attn_implementation", "experts_implementation", "kernel_config", "use_kernels")
_COUNTS = (
    (re.compile(r"(?:num|n)_(?:[a-z]+_)*layers?|[a-z]+_layers|depth"), 128),
    (re.compile(r"(?:[a-z]+_)*experts"), 4_096),
    (re.compile(r"num_labels"), 1_000_000),
)
"""Options that cost time and memory while a model is built, and what is plausible whatever the checkpoint's size."""


@dataclass(frozen=True)
class Role:
    """What one tensor of the checkpoint is to transformers."""

    parameter: str | None
    """Its name in the model; None if the model has no such parameter."""
    kind: Kind
    quantize: bool
    float32: bool = False
    """Kept in float32 whatever the model's dtype (`_keep_in_fp32_modules_strict`)."""


@dataclass(frozen=True)
class Architecture:
    """What transformers makes of every tensor of one checkpoint."""

    class_name: str
    roles: Mapping[str, Role]
    skip_modules: tuple[str, ...] | None
    """For the config's `llm_int8_skip_modules`. None: every loader's default gives the same set."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Parameter that has no tensor of its own → the checkpoint tensor that it shares."""
    known: bool = True
    """Whether transformers has the class; without it, names and shapes alone were asked."""
    embeddings: frozenset[str] = frozenset()
    """Checkpoint names of the input embedding and of the output head, one that shares the input's tensor included."""

    def as_json(self) -> dict[str, Any]:
        """JSON values, from which `from_json` makes an equal one."""
        roles = {name: [role.parameter, role.kind, role.quantize, role.float32] for name, role in self.roles.items()}
        return {
            "class_name": self.class_name,
            "roles": roles,
            "skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "tied": dict(self.tied),
            "known": self.known,
            "embeddings": sorted(self.embeddings),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        skip = value["skip_modules"]
        return cls(
            class_name=value["class_name"],
            roles={name: Role(*role) for name, role in value["roles"].items()},
            skip_modules=None if skip is None else tuple(skip),
            tied=value["tied"],
            known=value["known"],
            embeddings=frozenset(value["embeddings"]),
        )

    def tensor_of(self, parameter: str) -> str | None:
        """The checkpoint name of a tensor, given that name or the model's; None if there is no such tensor."""
        if parameter in self.roles:
            return parameter
        return self._tensor_of_parameter.get(parameter)

    def module_names(self, tensor: str) -> tuple[str, ...]:
        """The module that owns a tensor: as the checkpoint names it, then as the model does, where that differs."""
        parameter = self.roles[tensor].parameter
        names = [tensor]
        if parameter is not None and self._tensor_of_parameter.get(parameter) == tensor:
            names.append(parameter)
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))

    @cached_property
    def _tensor_of_parameter(self) -> dict[str, str]:
        """Parameters that several tensors become, such as stacked experts, are not among them."""
        counts = Counter(role.parameter for role in self.roles.values())
        return {
            role.parameter: name
            for name, role in self.roles.items()
            if role.parameter is not None and counts[role.parameter] == 1
        }


def describe(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    *,
    quantize: bool,
    dtype: str,
    keep: Iterable[str] = (),
    remote_code: bool = False,
) -> Architecture:
    """Ask transformers about a checkpoint.

    `shapes` are those of the checkpoint's tensors, `dtype` is "bfloat16" or "float16", `keep` are patterns of modules
    to leave in 16 bits: a glob on the full path, or its last parts (`down_proj`, `mlp.down_proj`).
    With `remote_code`, a class that transformers doesn't have is described by the shapes and names alone.

    Raises `Unsupported` for a class that transformers doesn't have, `BadCheckpoint` where config and tensors disagree,
    `BadRecipe` for a pattern that matches nothing.
    """
    model = _meta_model(config, shapes, dtype, remote_code=remote_code)
    if model is None:
        return _described_by_names(config, shapes, quantize=quantize, keep=tuple(keep))
    names = _Names(model, shapes)
    names.check(shapes)
    roles = {name: names.role(name, shape) for name, shape in shapes.items()}
    tied = {
        target: names.tensor_of[source]
        for target, source in model.all_tied_weights_keys.items()
        if target not in names.tensor_of and source in names.tensor_of
    }
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    parameters = [f"{name}.weight" for name, module in model.named_modules() if any(module is end for end in ends)]
    embeddings = frozenset(names.tensor_of.get(name, name) for name in parameters)
    architecture = Architecture(type(model).__name__, roles, None, tied, embeddings=embeddings)
    if not quantize:
        return architecture
    by_default = _quantized_modules(model, None)
    wanted = {
        name: role.parameter.removesuffix(".weight")
        for name, role in roles.items()
        if role.parameter is not None
        and name not in names.converted
        and role.parameter.endswith(".weight")
        and role.parameter.removesuffix(".weight") in by_default
    }
    for name in _kept(wanted, architecture, keep):
        del wanted[name]
    roles = {
        name: Role(role.parameter, role.kind, name in wanted, role.float32) for name, role in architecture.roles.items()
    }
    skip = _skip_modules(model, names, roles, set(wanted.values()))
    return replace(architecture, roles=roles, skip_modules=skip)


def check_output(config: Mapping[str, Any], tensors: Mapping[str, Shape], quantized: Iterable[str]) -> list[str]:
    """The static verifier: what a loader would find wrong with a checkpoint of this config, these tensors (name →
    shape; the quant states of a weight left out) and these quantized weights. Empty: nothing."""
    quantization = config.get("quantization_config")
    dtype = str(config.get("dtype", "bfloat16"))
    model = _meta_model({k: v for k, v in config.items() if k != "quantization_config"}, tensors, dtype)
    assert model is not None  # noqa: S101  (without remote_code a missing class raises)
    names = _Names(model, tensors)
    found = set(quantized)
    wrong_shapes = list(names.mismatched(tensors, transposed=found))
    built: set[str] = set()
    if quantization is not None:
        modules = _modules_that_loading_quantizes(model, quantization)
        built = {names.tensor_of.get(f"{module}.weight", f"{module}.weight") for module in modules}
    problems = [f"{name}: quantized here, not by transformers" for name in sorted(found - built)]
    problems += [f"{name}: not quantized here, but by transformers" for name in sorted(built - found)]
    problems += [f"{name}: missing" for name in sorted(names.missing)]
    problems += [
        f"{name}: shape {list(tensors[name])}, transformers expects {list(expected)}" for name, expected in wrong_shapes
    ]
    return problems


def answer(request: dict[str, Any]) -> Any:
    """The answer, in JSON values, to a question in JSON values."""
    question = request.pop("question")
    if question == "describe":
        shapes = {name: tuple(shape) for name, shape in request.pop("shapes").items()}
        return describe(request.pop("config"), shapes, **request).as_json()
    tensors = {name: tuple(shape) for name, shape in request["tensors"].items()}
    return check_output(request["config"], tensors, request["quantized"])


def serve() -> None:
    """Answer the questions that standard input has, one a line; an error is an answer, too."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever the libraries print is no answer
    for line in sys.stdin:
        try:
            reply = {"answer": answer(json.loads(line))}
        except ConversionRefused as exc:
            reply = {"error": type(exc).__name__, "message": str(exc)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class _Names:
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
        self.parameter_of: dict[str, str] = {}
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
        for name, expected in self.mismatched(shapes):
            raise BadCheckpoint(f"{name}: shape {list(shapes[name])}, but the config makes it {list(expected)}")

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
        return Role(parameter, kind, quantize=False, float32=float32)


def _meta_model(
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


def _default_skips(model: PreTrainedModel, skip: list[str] | None) -> list[str]:
    """Patterns of modules that transformers 5 leaves unquantized, given the config's skip list."""
    from transformers.quantizers.base import HfQuantizer

    patterns: list[str] = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    return patterns


def _quantized_modules(model: PreTrainedModel, skip: Iterable[str] | None) -> set[str]:
    """Modules that transformers 5 quantizes, given the config's skip list; the rule of `replace_with_bnb_linear`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = _default_skips(model, None if skip is None else list(skip))
    return {
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, patterns)
    }


def _modules_that_loading_quantizes(model: PreTrainedModel, quantization: Mapping[str, Any]) -> set[str]:
    """Modules that loading really replaces, by transformers' own function."""
    with quietly():
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        parsed = BitsAndBytesConfig.from_dict(dict(quantization))
        patterns = _default_skips(model, parsed.llm_int8_skip_modules)
        replaced = replace_with_bnb_linear(model, patterns, parsed, pre_quantized=True)
    quantized = ("Linear4bit", "Linear8bitLt")
    return {name for name, module in replaced.named_modules() if type(module).__name__ in quantized}


def _quantized_by_version_4(linear: Iterable[str], skip: Iterable[str]) -> set[str]:
    """Modules that transformers 4.57 quantizes: all linear ones, less those that the list names literally."""
    names = list(skip)
    return {
        module
        for module in linear
        if module.rpartition(".")[2] not in names and not any(f"{n}." in f"{module}." or n == module for n in names)
    }


def _skip_modules(
    model: PreTrainedModel, names: _Names, roles: Mapping[str, Role], wanted: set[str]
) -> tuple[str, ...] | None:
    """None where all loaders' defaults give `wanted` (modules, by the model's names), else full module paths.

    transformers 5 quantizes `nn.Linear` proper; 4.57 its subclasses too, and the modules that 5 has since fused into
    parameters (experts, routers); vLLM everything but embeddings and the head. Full paths mean the same to all.
    """
    output = model.get_output_embeddings()
    head = {name for name, module in model.named_modules() if output is not None and module is output}
    head |= {names.tensor_of[f"{m}.weight"].removesuffix(".weight") for m in head if f"{m}.weight" in names.tensor_of}
    linear_like = {
        name.removesuffix(".weight")
        for name, role in roles.items()
        if role.parameter is not None
        and name.endswith(".weight")
        and len(names.parameters[role.parameter] if name not in names.converted else (0, 0)) == 2
        and role.kind != "embedding"
    }
    kept = {
        module
        for module in linear_like
        if not roles[f"{module}.weight"].quantize
        and str(roles[f"{module}.weight"].parameter).removesuffix(".weight") not in head
    }
    if not kept and _quantized_modules(model, None) == wanted:
        default = _default_skips_of_version_4(model, head)
        quantized = {name.removesuffix(".weight") for name, role in roles.items() if role.quantize}
        if _quantized_by_version_4(linear_like, default) == quantized:
            return None
    skip = set(head)
    for module in kept:
        both = (module, str(roles[f"{module}.weight"].parameter).removesuffix(".weight"))
        # Experts are skipped as one: a list of thousands of paths would say no more.
        skip |= {re.sub(r"\.experts\..*", ".experts", name) for name in both}
    skip |= {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    skip |= _quantized_modules(model, skip) - wanted
    if _quantized_modules(model, skip) != wanted:
        first = min(_quantized_modules(model, skip) ^ wanted)
        raise Unsupported(f"{first}: no list of kept modules makes transformers quantize just the rest")
    return tuple(sorted(skip))


def _default_skips_of_version_4(model: PreTrainedModel, head: set[str]) -> set[str]:
    """Transformers 4.57's `get_keys_to_not_convert`."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    if not tied and head:
        return head
    last = [name for name, _ in model.named_parameters()][-1]
    return {name.removesuffix(".weight").removesuffix(".bias") for name in tied | {last}}


def _kept(wanted: Mapping[str, str], architecture: Architecture, keep: Iterable[str]) -> set[str]:
    """Tensors that the user's patterns leave in 16 bits; `BadRecipe` for a pattern that matches no tensor."""
    kept: set[str] = set()
    for pattern in keep:
        matching = {
            name
            for name in wanted
            if any(
                fnmatchcase(module, pattern) or module == pattern or module.endswith("." + pattern)
                for module in architecture.module_names(name)
            )
        }
        if not matching:
            raise BadRecipe(f"--keep {pattern}: matches no module that would be quantized")
        kept |= matching
    return kept


_NOT_LINEAR = re.compile(r"(?i)embed|wte|wpe|norm|ln_|lm_head|head$|router|\.gate$|conv|experts|score|classifier")


def _described_by_names(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], *, quantize: bool, keep: tuple[str, ...]
) -> Architecture:
    """A model whose code is not ours to run: two-dimensional weights that are not called like something else."""
    listed = config.get("architectures")
    roles = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        matrix = leaf == "weight" and len(shape) == 2
        linear = matrix and not _NOT_LINEAR.search(module)
        embedding = matrix and re.search(r"embed|wte|wpe", module)
        kind: Kind = "embedding" if embedding else "linear" if matrix else "other"
        roles[name] = Role(name, kind, quantize=quantize and linear)
    architecture = Architecture(str(listed[0]) if listed else "unknown", roles, None, known=False)
    quantized = {name: name for name, role in roles.items() if role.quantize}
    kept = _kept(quantized, architecture, keep)
    roles = {n: Role(r.parameter, r.kind, r.quantize and n not in kept) for n, r in roles.items()}
    skip = {
        name.removesuffix(".weight")
        for name, role in roles.items()
        if role.kind == "linear" and not role.quantize and len(shapes[name]) == 2
    }
    skip = {re.sub(r"\.experts\..*", ".experts", module) for module in skip} | {"lm_head"}
    return replace(architecture, roles=roles, skip_modules=tuple(sorted(skip)) if quantize else None)

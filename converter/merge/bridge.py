"""Changes that PEFT's own classes make, one module at a time: every mergeable tuner that has no formula of ours.

A layer with the module's real weight is put at the module's path into an otherwise empty model; PEFT puts its adapter
layer around it, loads the module's tensors, and merges. That gives the bits of a `merge_and_unload` of the whole model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from converter.errors import ConversionFailed, Unsupported
from converter.merge.change import Change, MergedTile, Rounding, read_stored
from converter.silence import quietly
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader

Layer = Literal["linear", "conv1d", "embedding", "convolution"]

_NAME = "default"
"""PEFT's name for the adapter while it merges."""
_WHOLE_MODEL = [
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
]
"""Options that choose modules: there is one, chosen already."""
_SHARED_SIZES = ("VERA", "PVERA", "RANDLORA")
"""Tuners with matrices for all modules, as large as the largest module needs."""
_ROTATIONS = ("OFT", "BOFT", "HRA", "ROAD", "MISS", "PSOFT", "OSF")
"""Tuners that multiply the weight by matrices as long as its rows, or its columns."""
_COPIES, _SQUARES = 8, 4
"""Float32 copies of the weight, and of such matrices, that PEFT makes at the most."""
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Bridged(Change):
    """What PEFT makes of one parameter of one module."""

    parameter: Literal["weight", "bias"]
    layer: Layer
    weight: tuple[int, ...]
    """The shape of the layer's weight, as its class has it."""
    pairs: tuple[tuple[str, TensorHeader], ...]
    """PEFT's name for each part, with the part."""
    config: str
    """The adapter's config, in JSON."""
    bias: bool = False
    """Whether the layer has a bias."""
    sizes: tuple[int, int] | None = None
    """The largest out_features and in_features of the adapter's modules."""
    whole = "PEFT merges a module as a whole"

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        return tuple(part for _, part in self.pairs)

    @property
    def tuner(self) -> str:
        return str(json.loads(self.config)["peft_type"])

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features) of a Conv1D, too."""
        if self.parameter == "bias":
            return (self.weight[1] if self.layer == "conv1d" else self.weight[0],)
        return self.weight[::-1] if self.layer == "conv1d" else self.weight

    @property
    def nbytes(self) -> int:
        # Of the layer PEFT has a copy and some deltas in float32, and some tuners matrices of its in- and outputs.
        rows = self.weight[0]
        columns = math.prod(self.weight[1:])
        working = _COPIES * rows * columns + _SQUARES * (rows * rows + columns * columns) * (self.tuner in _ROTATIONS)
        return 3 * sum(part.nbytes for part in self.parts) + 4 * working

    @property
    def label(self) -> str:
        return f"{self.tuner} by PEFT"

    def as_json(self) -> dict[str, Any]:
        return {"peft": {"module": self.module, "tuner": self.tuner, "sizes": self.sizes}}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> BridgedMerge:
        tensors = {key: read_stored(part, folder) for key, part in self.pairs}
        return BridgedMerge(self, tensors, device, rounding)


@dataclass(frozen=True)
class BridgedMerge:
    """The adapter's tensors for one module, by PEFT's names."""

    change: Bridged
    tensors: Mapping[str, Tensor]
    device: torch.device
    rounding: Rounding

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        """With PEFT's roundings, the sum that `exact` should be isn't known: it is what they leave of it."""
        base = weight.float()
        loaded = base
        if self.rounding.precision == "reference":
            loaded = weight.to(torch_dtype(self.rounding.dtype))
        turned = self.change.layer == "conv1d" and self.change.parameter == "weight"
        shape = self.change.weight if self.change.parameter == "weight" else self.change.shape
        with _one_at_a_time:
            made = self._merged((loaded.T if turned else loaded).reshape(shape))
        values = (made.T if turned else made).reshape(weight.shape)
        exact = values.float()
        return MergedTile(values, exact, base, exact - base)

    def _merged(self, parameter: Tensor) -> Tensor:
        """The module's parameter, merged by PEFT in the parameter's dtype."""
        import torch

        with quietly(), torch.no_grad():
            model = unit(self.change, parameter, self.device)
            problems = load(model, self.tensors)
            if problems:
                raise ConversionFailed(f"{self.change.module}: PEFT {problems[0]}")
            try:
                merged = model.base_model.merge_and_unload()
            except Exception as exc:  # whatever a tuner's class raises
                raise ConversionFailed(f"{self.change.module}: PEFT can't merge it: {exc}") from exc
            found: Tensor = merged.get_submodule(self.change.module).get_parameter(self.change.parameter).data
        return found


def problem_with(change: Bridged) -> str | None:
    """What PEFT says against a module's config, or against its tensors' names and shapes; None: nothing.

    Raises `Unsupported` for options that PEFT doesn't know, and where it is not installed.
    """
    import torch

    try:
        import peft
    except ImportError as exc:
        raise Unsupported(f"{change.tuner} is merged by PEFT, which is not installed: pip install peft") from exc
    settings = json.loads(change.config)
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(change.tuner)
    if known is None:
        raise Unsupported(f"peft {peft.__version__} has no tuner {change.tuner}")
    fields = {one.name for one in dataclasses.fields(known)}
    for option, value in settings.items():
        if option not in fields and value not in (None, False, 0) and value not in ({}, [], ""):
            raise Unsupported(f"{option} = {str(value)[:60]!r} is not an option of {change.tuner} in PEFT")
    shape = change.weight if change.parameter == "weight" else change.shape
    tensors = {key: torch.zeros(part.shape, dtype=torch_dtype(part.dtype)) for key, part in change.pairs}
    with quietly(), torch.no_grad():
        try:
            problems = load(unit(change, torch.zeros(shape), torch.device("cpu")), tensors)
        except Exception as exc:  # whatever a tuner's class raises, it is against this adapter
            return f"PEFT refuses it: {type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
    return f"PEFT {problems[0]}" if problems else None


def unit(change: Bridged, parameter: Tensor, device: torch.device) -> Any:
    """PEFT's model around the one layer; `parameter` is the one of its weight and bias that is wanted."""
    import peft
    from torch import nn

    settings = json.loads(change.config)
    config = peft.PeftConfig.from_peft_type(**settings)
    config.inference_mode = True
    config.target_modules = {change.module}
    for option in _WHOLE_MODEL:
        if hasattr(config, option):
            setattr(config, option, None)
    if hasattr(config, "bias"):
        config.bias = "none"
    kind = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if change.tuner == "ADALORA" and config.rank_pattern:
        config.rank_pattern = {
            key: mask for key, mask in config.rank_pattern.items() if key.startswith(f"{change.module}.lora_E")
        }
    if change.tuner == "IA3":
        is_feedforward = kind._check_target_module_feedforward(config, change.module)
        config.feedforward_modules = {change.module} if is_feedforward else set()
    if change.tuner in _SHARED_SIZES:
        sizes = change.sizes

        class Sized(kind):  # type: ignore[misc, valid-type]
            def _find_dim(self, _config: Any) -> tuple[int, int] | None:
                return sizes

        kind = Sized

    class Model(nn.Module):  # type: ignore[misc]
        """What PEFT's functions ask of a `PeftModel`."""

        def __init__(self) -> None:
            super().__init__()
            self.base_model = kind(_skeleton(change, parameter, device), config, _NAME)

        @property
        def peft_config(self) -> Any:
            return self.base_model.peft_config

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base_model"), name)

    model = Model()
    model.base_model._cast_adapter_dtype(adapter_name=_NAME, autocast_adapter_dtype=True)
    return model


def load(model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Give the adapter's tensors to PEFT's model; what it lacks, or has no use for."""
    import peft

    try:
        found = peft.set_peft_model_state_dict(model, dict(tensors), _NAME)
    except (RuntimeError, KeyError, ValueError) as exc:
        return [f"can't load its tensors: {' '.join(str(exc).split())}"]
    there = {key.rpartition(f".{_NAME}")[0].rpartition(".")[2] for key in found.missing_keys if f".{_NAME}" in key}
    # Modules see what they share with all others, and what was computed from their options.
    known = {key.rpartition(".")[2] for key in tensors} | {"ranknum", "vera_A", "vera_B", "pvera_A", "pvera_B"}
    problems = [f"has no use for {key}" for key in sorted(found.unexpected_keys)]
    return problems + [f"misses {name}" for name in sorted(there - known)]


def _skeleton(change: Bridged, parameter: Tensor, device: torch.device) -> nn.Module:
    """An empty model with the layer at its path."""
    import torch
    from torch import nn

    layer = _layer(change)
    # A copy: PEFT merges in place, and other outputs may need what was read.
    wanted: dict[str, Tensor] = {
        change.parameter: parameter.to(device, copy=True, memory_format=torch.contiguous_format)
    }
    for name, shape in [("weight", change.weight), ("bias", change.shape[:1] if change.bias else None)]:
        if shape is not None and name not in wanted:
            wanted[name] = torch.zeros(shape, dtype=parameter.dtype, device=device)
    for name, value in wanted.items():
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    root = around = nn.Module()
    *outer, last = change.module.split(".")
    for name in outer:
        around.add_module(name, nn.Module())
        around = around.get_submodule(name)
    around.add_module(last, layer)
    return root


def _layer(change: Bridged) -> nn.Module:
    """The layer without its values."""
    import torch
    from peft.tuners.lora.layer import Conv1D  # transformers' own, which PEFT looks for
    from torch import nn

    with torch.device("meta"):
        if change.layer == "embedding":
            return nn.Embedding(*change.weight)
        if change.layer == "conv1d":
            return Conv1D(change.weight[1], change.weight[0])
        if change.layer == "linear":
            return nn.Linear(change.weight[1], change.weight[0], bias=change.bias)
        kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(change.weight)]
        return kind(change.weight[1], change.weight[0], change.weight[2:], bias=change.bias)

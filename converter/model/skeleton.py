"""A model of transformers without weights, whose modules are filled and emptied one after the other.

Imports transformers, of which it calls the functions that load a checkpoint; `tests/layers` holds them to the whole
model's results.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from converter.errors import BadCheckpoint, Unsupported
from converter.model.architecture import Shape
from converter.model.meta_model import Names, meta_model
from converter.silence import quietly

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_SILENT = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
"""What the config may ask a forward for, and nobody here reads."""


class Skeleton:
    """The model that a config describes, on the meta device, with all buffers that no checkpoint has on `device`.

    `shapes` are those of the checkpoint's tensors, by checkpoint names. Raises `Unsupported` for a class that
    transformers doesn't have, `BadCheckpoint` where config and tensors disagree.
    """

    def __init__(
        self, config: Mapping[str, Any], shapes: Mapping[str, Shape], dtype: str, device: torch.device
    ) -> None:
        import torch

        with quietly():
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.modeling_utils import LoadStateDictConfig

        model = meta_model(config, shapes, dtype)
        assert model is not None  # noqa: S101  (without remote_code a missing class raises)
        names = Names(model, shapes)
        names.check(shapes)
        self.device = device
        self.parameter_of: Mapping[str, str] = names.parameter_of
        """Checkpoint name → the model's. Of a tensor that becomes several parameters: the first one's."""
        self._loading = LoadStateDictConfig(
            dtype=getattr(torch, dtype),
            dtype_plan=model._get_dtype_plan(getattr(torch, dtype)),
            device_map={"": device},
            weight_mapping=get_model_conversion_mapping(model),
        )
        ties = model.all_tied_weights_keys
        self.tied = {target: names.tensor_of[source] for target, source in ties.items() if source in names.tensor_of}
        """Parameter that the config ties to another → that one's tensor. It may have a tensor of its own."""
        self.model: nn.Module = model.eval().requires_grad_(requires_grad=False)
        for part in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
            for option, value in _SILENT.items():
                if getattr(part, option, None):
                    setattr(part, option, value)
        self._make_buffers(names)

    def _make_buffers(self, names: Names) -> None:
        """Give the buffers that no tensor becomes their values, by transformers' own initialization."""
        model = names.model
        for value in model.state_dict(keep_vars=True).values():
            value._is_hf_initialized = True
        buffers = {name for name, _ in model.named_buffers()} & names.parameters.keys()
        absent = buffers - set(names.parameter_of.values())
        with quietly():
            model._move_missing_keys_from_meta_to_device(absent, {"": self.device}, None, None)
            model._initialize_missing_keys(False)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Give parameters their values: tensors of the checkpoint by their names there, all that become these
        parameters. They are cast to the model's dtype. `BadCheckpoint` if they don't fit."""
        with quietly(), _no_progress_bar():
            from transformers.core_model_loading import convert_and_load_state_dict_in_model

            found, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), self._loading)
        problems = [*found.conversion_errors.values(), *found.error_msgs]
        problems += [
            f"{name}: shape {list(there)}, expected {list(meant)}" for name, there, meant in found.mismatched_keys
        ]
        problems += [f"{name}: no parameter of the model" for name in found.unexpected_keys]
        if problems:
            raise BadCheckpoint(f"transformers can't fill {type(self.model).__name__}: {problems[0]!s:.300}")
        self.model.requires_grad_(requires_grad=False)

    def empty(self, module: nn.Module) -> None:
        """Let go of a module's parameters."""
        from torch import nn

        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                part.register_parameter(name, nn.Parameter(value.to("meta"), requires_grad=False))

    def cache(self, held: tuple[Tensor, Tensor] | None) -> Any:
        """A cache for one layer's turn, in which all layers hold the same keys and values, (windows, heads, tokens,
        size) each; None: nothing. So the model counts tokens rightly, whichever layer it asks."""
        from transformers.cache_utils import Cache, DynamicLayer

        layer = DynamicLayer()
        if held is not None:
            layer.update(*held)
        return Cache(layers=[layer] * len(self.layers[1]))

    def refuse_other_caches(self) -> None:
        """`Unsupported` for a model whose layers remember more than the keys and values of all tokens."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        kinds = {type(layer) for layer in DynamicCache(config=self.text_config).layers}
        takes_one = "cache" in inspect.signature(self.model.forward).parameters
        if not takes_one or kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            raise self.unsupported("its layers remember more than keys and values, so it can't write a text")

    @property
    def embedding(self) -> tuple[str, nn.Embedding]:
        """The name and the module of the token embedding. `Unsupported` if it is no plain lookup."""
        from torch import nn

        module = self.model.get_input_embeddings()
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            raise self.unsupported(f"its embedding is {type(module).__name__}, expected a lookup of rows")
        return self._name_of(module), module

    @property
    def head(self) -> tuple[str, nn.Linear]:
        """The name and the module of the head. `Unsupported` if it is no linear layer."""
        from torch import nn

        module = self.model.get_output_embeddings()
        if not isinstance(module, nn.Linear):
            raise self.unsupported(f"its head is {type(module).__name__}, expected a linear layer")
        return self._name_of(module), module

    @property
    def layers(self) -> tuple[str, nn.ModuleList]:
        """The name and the list of the decoder layers. `Unsupported` if they can't be told."""
        from torch import nn

        if self.model.config.is_encoder_decoder or not self.model.can_generate():
            raise self.unsupported("it isn't a decoder alone that predicts the next token")
        lists = [(n, m) for n, m in self.model.get_decoder().named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
        if len(outer) != 1:
            raise self.unsupported(f"it has {len(outer)} lists of layers, expected one")
        return self._name_of(outer[0][1]), outer[0][1]

    @property
    def text_config(self) -> Any:
        """The config of the decoder."""
        return self.model.config.get_text_config(decoder=True)

    def unsupported(self, why: str) -> Unsupported:
        return Unsupported(f"{type(self.model).__name__} can't be run a layer at a time: {why}")

    def _name_of(self, module: nn.Module) -> str:
        names: list[str] = [name for name, one in self.model.named_modules() if one is module]
        return names[0]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

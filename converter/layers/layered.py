"""A model whose decoder layers are in memory one at a time. Start reading here.

Everything that surrounds the layers is the model's own forward: it is run again for each layer and each batch of
windows, with layers that stand still. So masks, positions and rotary embeddings are what the model makes of them. The
layer before the one whose turn it is gives the hidden states that were kept, and the forward ends after that one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from converter.errors import BadCheckpoint
from converter.layers.probe import what_prevents
from converter.layers.stubs import Call, Form, Stopped, Stubs, first_of, shared_state
from converter.model.skeleton import Skeleton
from converter.tensors import torch_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from converter.layers.activations import Activations
    from converter.layers.kept import Kept
    from converter.layers.weights import Weights

Step = Callable[[int, int, int], None]
"""Called with a layer's number, and how many batches of how many have gone through it."""


class LayeredModel:
    """A decoder that is filled from `weights` layer by layer. `Unsupported` for what can't be run so.

    `batches`: token ids, (windows, tokens) each. `activations` keeps what passes from layer to layer, one tensor a
    batch.
    """

    def __init__(
        self, skeleton: Skeleton, weights: Weights, batches: Sequence[Tensor], activations: Activations
    ) -> None:
        self._skeleton, self._weights = skeleton, weights
        self._embedding_name, self._embedding = skeleton.embedding
        self._head_name, self._head = skeleton.head
        layers_name, self._layers = skeleton.layers
        self._stubs = Stubs(list(self._layers))
        self._form = Form(None)
        owned = (f"{self._embedding_name}.", f"{self._head_name}.")
        self._of_layer: list[list[str]] = [[] for _ in self._layers]
        rest: dict[str, list[str]] = {}
        for tensor, parameter in skeleton.parameter_of.items():
            if parameter.startswith(f"{layers_name}."):
                number = int(parameter.removeprefix(f"{layers_name}.").partition(".")[0])
                self._of_layer[number].append(tensor)
            elif not parameter.startswith(owned):
                rest.setdefault(parameter.rpartition(".")[0], []).append(tensor)
        for module, tensors in rest.items():
            self._fill_when_called(skeleton.model.get_submodule(module), tensors)
        self._look_up_in_rows()
        self.take(batches, activations)
        self._prepare()

    @classmethod
    def of(
        cls,
        weights: Weights,
        batches: Sequence[Tensor],
        activations: Activations,
        *,
        dtype: str = "float32",
        device: torch.device | None = None,
    ) -> Self:
        """The model of a plan, computed in `dtype` (float32, bfloat16, float16) on `device`; None: the CPU."""
        shapes = {name: tensor.shape for name, tensor in weights.by_name.items()}
        skeleton = Skeleton(weights.plan.config, shapes, dtype, device or torch_device("cpu"))
        return cls(skeleton, weights, batches, activations)

    def take(self, batches: Sequence[Tensor], activations: Activations) -> None:
        """Run over these batches from now on. `BadCheckpoint` for a token without a row in the embedding."""
        self._batches, self._activations = batches, activations
        self._rows = self._rows_of(batches)

    def run(self, step: Step = lambda *_: None, kept: Kept | None = None) -> None:
        """Run all layers over all batches; then `logits` can be asked for. `step` is called after each batch. `kept`:
        what an earlier run has done of it, to which is added what this one does."""
        done = [0] * len(self._batches)
        for batch in range(len(done)):
            if kept is not None and (found := kept.load(batch)) is not None:
                done[batch], hidden = found
                self.keep(batch, hidden)
        for number in range(min(done), len(self._layers)):
            with self.filled(number):
                for batch in range(len(done)):
                    if done[batch] <= number:
                        hidden = self.hidden_after(number, batch)
                        self.keep(batch, hidden)
                        if kept is not None:
                            kept.save(batch, number + 1, hidden)
                    step(number, batch + 1, len(done))

    @contextmanager
    def filled(self, number: int) -> Iterator[None]:
        """A layer's tensors are in memory."""
        layer = self._layers[number]
        self._fill(layer, self._of_layer[number])
        try:
            yield
        finally:
            self._skeleton.empty(layer)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors of a layer that is filled, by their names in the checkpoint."""
        self._skeleton.fill(tensors)

    def hidden_after(self, number: int, batch: int, cache: Any = None) -> Tensor:
        """The hidden states that a layer, which is filled, gives of those that were kept: (windows, tokens, hidden
        size). Several threads may ask at a time. `cache` has keys and values of the tokens before them."""

        def then(call: Call) -> Any:
            before_it = shared_state(call)
            given = self._stubs.run(number, call)
            if number < self.layers - 1 and shared_state(call) != before_it:
                raise self._skeleton.unsupported(f"layer {number} leaves something for later layers besides its output")
            return given

        given = self._up_to(number, batch, then, cache)
        if Form.of(given) != self._form:
            raise self._skeleton.unsupported(f"layer {number} gives another kind of value than the first one")
        return first_of(given)

    def stopped_in(self, number: int, batch: int) -> Any:
        """The value with which a hook in a layer stops it by `Stopped`; None if none does. As `hidden_after`."""

        def then(call: Call) -> None:
            self._stubs.run(number, call)

        return self._up_to(number, batch, then)

    def with_more(self, number: int, batch: int, held: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `hidden_after` gives if the batch has one more token of each window, and its keys and values. `held`:
        those of the tokens before it, (windows, heads, tokens, size) each; None: there is none."""
        cache = self._skeleton.cache(None if held is None else tuple(one.to(self._skeleton.device) for one in held))
        hidden = self.hidden_after(number, batch, cache)
        before = 0 if held is None else held[0].shape[-2]
        if cache.get_seq_length() != before + 1:
            raise self._skeleton.unsupported(f"layer {number} doesn't keep keys and values as others do")
        keys, values = cache.layers[number].keys, cache.layers[number].values
        return hidden, keys[..., before:, :].clone(), values[..., before:, :].clone()

    def refuse_to_write(self) -> None:
        """`Unsupported` for a model that `with_more` can't run."""
        self._skeleton.refuse_other_caches()

    def _up_to(self, number: int, batch: int, then: Callable[[Call], Any], cache: Any = None) -> Any:
        """What `then` makes of what a layer is called with, after the hidden states that were kept."""
        before = self._kept(batch) if number else None

        def answers(called: int, call: Call) -> Any:
            if called < number:
                return self._form.around(before if before is not None and called == number - 1 else call.hidden)
            raise Stopped(then(call))

        return self._forward(self._batches[batch], answers, cache)

    def keep(self, batch: int, hidden: Tensor) -> None:
        """Keep what a layer gave for the next one."""
        self._activations.put(batch, hidden)

    def linear_weights(self, number: int) -> dict[str, str]:
        """Of a layer: the tensors that are the whole weight of a linear layer or a Conv1D → its name in the model."""
        from torch import nn

        shared = Counter(self._skeleton.parameter_of[tensor] for tensor in self._of_layer[number])
        found = {}
        for tensor in self._of_layer[number]:
            parameter = self._skeleton.parameter_of[tensor]
            name, _, last = parameter.rpartition(".")
            module = self._skeleton.model.get_submodule(name)
            is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            is_whole = shared[parameter] == 1 and last == "weight"
            if is_linear and is_whole and tuple(module.weight.shape) == self._weights.by_name[tensor].shape:
                found[tensor] = name
        return found

    def module(self, name: str) -> nn.Module:
        """A module of the model."""
        return self._skeleton.model.get_submodule(name)

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self._layers)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self._weights.by_name[self._head_tensor].shape[0])

    @property
    def width(self) -> int:
        """Columns of the head."""
        return int(self._head.in_features)

    @contextmanager
    def head(self, start: int, end: int) -> Iterator[None]:
        """Rows `start` to `end` of the head are in memory; within, `logits` gives those of these tokens."""
        from torch import nn

        head, device = self._head, self._skeleton.device
        dtype = head.weight.dtype
        tile = self._weights.rows(self._head_tensor, [(start, end)]).to(device, dtype)
        bias = self._tensor_of(f"{self._head_name}.bias")
        before = head.weight, head.bias
        head.weight = nn.Parameter(tile, requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(self._weights.whole(bias)[start:end].to(device, dtype), requires_grad=False)
        try:
            yield
        finally:
            head.weight, head.bias = before

    def logits(self, batch: int) -> Tensor:
        """(windows, tokens, rows of the head that are in memory), as the model gives them."""
        last, kept = len(self._layers) - 1, self._kept(batch)

        def answers(number: int, call: Call) -> Any:
            return self._form.around(kept if number == last else call.hidden)

        found = self._forward(self._batches[batch], answers)
        logits: Tensor = found.logits
        return logits

    @property
    def _head_tensor(self) -> str:
        name = f"{self._head_name}.weight"
        found = self._tensor_of(name) or self._skeleton.tied.get(name)
        if found is None:
            raise self._skeleton.unsupported(f"{name} is not in the checkpoint")
        return found

    def _tensor_of(self, parameter: str) -> str | None:
        return next((tensor for tensor, name in self._skeleton.parameter_of.items() if name == parameter), None)

    def _kept(self, batch: int) -> Tensor:
        return self._activations.get(batch).to(self._skeleton.device)

    def _forward(self, tokens: Tensor, answers: Callable[[int, Call], Any], cache: Any = None) -> Any:
        """The model's forward, or what `Stopped` it."""
        import torch

        self._stubs.answers = answers
        try:
            given = {"use_cache": False} if cache is None else {"use_cache": True, "cache": cache}
            with torch.no_grad():
                return self._skeleton.model(input_ids=tokens.to(self._skeleton.device), **given)
        except Stopped as stopped:
            return stopped.value
        finally:
            self._stubs.answers = None

    def _fill(self, module: nn.Module, tensors: Sequence[str], *, recurse: bool = True) -> None:
        self._skeleton.fill({name: self._weights.whole(name) for name in tensors})
        empty = [name for name, value in module.named_parameters(recurse=recurse) if value.is_meta]
        if empty:
            raise self._skeleton.unsupported(f"{empty[0]} of {type(module).__name__} shares another module's tensor")

    def _fill_when_called(self, module: nn.Module, tensors: Sequence[str]) -> None:
        """Fill a module outside of the layers when the model first calls it: what it doesn't call isn't read."""

        def fill(*_: object) -> None:
            hook.remove()
            self._fill(module, tensors, recurse=False)

        hook = module.register_forward_pre_hook(fill)

    def _rows_of(self, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The tokens that occur, in ascending order, and their rows of the embedding."""
        import torch

        name = f"{self._embedding_name}.weight"
        tensor = self._tensor_of(name) or self._skeleton.tied.get(name)
        if tensor is None:
            raise self._skeleton.unsupported(f"{name} is not in the checkpoint")
        occurring = torch.cat([batch.flatten() for batch in batches]).unique()
        rows = self._weights.by_name[tensor].shape[0]
        if int(occurring[-1]) >= rows:
            raise BadCheckpoint(f"{tensor}: {rows:,} rows, but the text has a token {int(occurring[-1]):,}")
        return occurring, self._weights.rows(tensor, _spans(occurring.tolist()))

    def _look_up_in_rows(self) -> None:
        """Give the embedding the rows of each batch when it is called."""
        import torch
        from torch import nn

        device, embedding, dtype = self._skeleton.device, self._embedding, self._embedding.weight.dtype
        embedding.padding_idx = None  # of no account but for gradients, and it may be no row now
        in_use = threading.Lock()

        def look_up(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            tokens = args[0] if args else kwargs["input"]
            (occurring, values), (here, places) = self._rows, tokens.unique(return_inverse=True)
            in_use.acquire()
            rows = values[torch.searchsorted(occurring, here.cpu())].to(device, dtype)
            embedding.weight = nn.Parameter(rows, requires_grad=False)
            return (places,), {}

        embedding.register_forward_pre_hook(look_up, with_kwargs=True)
        embedding.register_forward_hook(lambda *_: in_use.release(), always_call=True)

    def _prepare(self) -> None:
        """Learn what layers give, and refuse a model whose layers can't be run one after the other."""
        if getattr(self._skeleton.text_config, "num_kv_shared_layers", None):
            raise self._skeleton.unsupported("some of its layers take keys and values of others")
        tokens = self._batches[0][:1, :16]
        stop_at_head = self._head.register_forward_pre_hook(_stop)
        try:
            with self.filled(0):
                given = self._forward(tokens, lambda number, call: _raise(self._stubs.run(number, call)))
            self._form = Form.of(given)
            why = what_prevents(lambda: self._ungated(tokens), self._stubs, len(self._layers), given)
        finally:
            stop_at_head.remove()
        if why is not None:
            raise self._skeleton.unsupported(why)

    def _ungated(self, tokens: Tensor) -> Any:
        try:
            return self._skeleton.model(input_ids=tokens.to(self._skeleton.device), use_cache=False)
        except Stopped as stopped:
            return stopped.value


def _raise(value: Any) -> None:
    raise Stopped(value)


def _stop(_: nn.Module, args: tuple[Any, ...]) -> None:
    raise Stopped(args)


def _spans(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs: the first of each, and the one after its last."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1] = spans[-1][0], number + 1
        else:
            spans.append((number, number + 1))
    return spans

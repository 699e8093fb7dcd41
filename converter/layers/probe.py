"""Whether a model's decoder layers can be run one after the other: whether each needs nothing but what its forward is
called with, and of other layers only the hidden states that the layer before it gives.

Torch's own record of gradients says so: layers that stand still give tensors of which it knows, and it is looked up on
which of them each input of the next layers depends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from converter.layers.stubs import Call, Form, Stopped, Stubs, first_of

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = (str, int, float, bool, type(None))


def what_prevents(forward: Callable[[], Any], stubs: Stubs, count: int, given: Any) -> str | None:
    """Why `count` layers can't be run one after the other; None: they can.

    `forward` runs the model up to its head, which raises `Stopped` with what it is called with. `given` is what the
    first layer gives.
    """
    import torch

    form = Form.of(given)
    more = [] if form.more is None else [value for value in given[1:] if isinstance(value, torch.Tensor)]
    hidden = first_of(given)
    hidden_of: list[Tensor] = []
    others: list[Tensor] = []
    problems: list[str] = []

    def allowed(inputs: Any, number: int) -> bool:
        found = _leaves(inputs)
        earlier = [leaf for leaf in [*hidden_of[: number - 1], *others] if id(leaf) in found]
        return not earlier

    def answers(number: int, call: Call) -> Any:
        if number != len(hidden_of):
            raise Stopped(f"layer {number} is called after layer {len(hidden_of) - 1}")
        if number and not allowed([call.args, call.kwargs], number):
            problems.append(f"layer {number} needs more than the hidden states of layer {number - 1}")
        if (name := _kept_elsewhere(call)) is not None:
            problems.append(f"layer {number} is called with {name}, which is more than values")
        hidden_of.append(hidden.detach().clone().requires_grad_())
        extra = [value.detach().clone().requires_grad_() for value in more if value.is_floating_point()]
        others.extend(extra)
        return form.around(hidden_of[-1], extra)

    stubs.answers = answers
    try:
        with torch.enable_grad():
            at_the_head = forward()
    finally:
        stubs.answers = None
    if isinstance(at_the_head, str):
        return at_the_head
    if problems:
        return problems[0]
    if len(hidden_of) != count:
        return f"{len(hidden_of)} of its {count} layers are called"
    if not allowed(at_the_head, count):
        return "its head needs more than the hidden states of the last layer"
    return None


def _kept_elsewhere(call: Call) -> str | None:
    """The name of an argument that is more than values: a cache, which holds what layers have stored."""
    named: Mapping[str, Any] = {**{f"argument {n}": value for n, value in enumerate(call.args)}, **call.kwargs}
    return next((name for name, value in named.items() if not _is_plain(value)), None)


def _is_plain(value: Any) -> bool:
    import torch

    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (torch.Tensor, torch.dtype, torch.device, *_PLAIN))


def _tensors(value: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def _leaves(inputs: Any) -> set[int]:
    """The ids of the tensors of which the inputs were computed, as far as gradients know; their own among them."""
    tensors = list(_tensors(inputs))
    found = {id(value) for value in tensors}
    waiting: list[Any] = [value.grad_fn for value in tensors if value.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        waiting += [before for before, _ in node.next_functions if before is not None]
    return found

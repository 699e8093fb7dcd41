"""Models whose layers tell each other more than hidden states are told from those that can be run layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from converter.layers.probe import what_prevents
from converter.layers.stubs import Stopped, Stubs
from converter.threads import Buffers


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        given: Tensor = self.linear(hidden)
        return given


LAYERS = 3
Forward = Callable[[Tensor, nn.ModuleList], Tensor]


def plain(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    mask = torch.ones(2, 2)
    for layer in layers:
        hidden = layer(hidden, mask, positions=(mask, None), kind="full")
    return hidden


def with_work_between(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    for layer in layers:
        hidden = layer(hidden * 2)
    return hidden + 1


def skipping(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    first = layers[0](hidden)
    second = layers[1](first)
    return layers[2](second + first)  # type: ignore[no-any-return]


def remembering(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    first = hidden = layers[0](hidden)
    for layer in layers[1:]:
        hidden = layer(hidden, values=first)
    return hidden


def summing(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    total = torch.zeros_like(hidden)
    for layer in layers:
        hidden = layer(hidden)
        total = total + hidden
    return total


def repeating(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    return plain(plain(hidden, layers), layers)


def leaving_one_out(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    return plain(hidden, layers[:-1])


def backwards(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    return plain(hidden, layers[::-1])


def with_a_cache(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    cache = Buffers(pinned=False)
    for layer in layers:
        hidden = layer(hidden, cache=cache)
    return hidden


def found(model: Forward) -> str | None:
    layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    stubs, given = Stubs(list(layers)), torch.ones(1, 2, 4)

    def forward() -> Any:
        try:
            return (model(torch.ones(1, 2, 4), layers),)
        except Stopped as stopped:
            return stopped.value

    return what_prevents(forward, stubs, LAYERS, given)


@pytest.mark.parametrize("model", [plain, with_work_between])
def test_layers_that_need_the_one_before_them_can_be_run_one_at_a_time(model: Forward) -> None:
    assert found(model) is None


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (skipping, "layer 2 needs more than the hidden states of layer 1"),
        (remembering, "layer 2 needs more than the hidden states of layer 1"),
        (summing, "its head needs more than the hidden states of the last layer"),
        (repeating, "layer 0 is called after layer 2"),
        (leaving_one_out, "2 of its 3 layers are called"),
        (backwards, "layer 2 is called after layer -1"),
        (with_a_cache, "layer 0 is called with cache, which is more than values"),
    ],
)
def test_other_models_are_told(model: Forward, why: str) -> None:
    assert found(model) == why


def test_what_a_tuple_has_besides_hidden_states_may_not_reach_other_layers() -> None:
    def passing_on(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
        bias = None
        for layer in layers:
            hidden, bias = layer(hidden, bias)
        return hidden

    layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    given = torch.ones(1, 2, 4), torch.ones(2)

    why = what_prevents(lambda: passing_on(torch.ones(1, 2, 4), layers), Stubs(list(layers)), LAYERS, given)

    assert why == "layer 1 needs more than the hidden states of layer 0"

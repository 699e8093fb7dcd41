"""Decoder layers that stand still: the model's own forward calls them, and says what for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from converter.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

HIDDEN = "hidden_states"


class Stopped(Exception):
    """Ends a forward where nothing more is wanted of it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True)
class Call:
    """What a layer is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """(windows, tokens, hidden size)"""
        if not self.args and HIDDEN not in self.kwargs:
            raise Unsupported(f"a decoder layer is called without {HIDDEN}: this model can't be run a layer at a time")
        value: Tensor = self.args[0] if self.args else self.kwargs[HIDDEN]
        return value


@dataclass(frozen=True)
class Form:
    """What layers give: a tensor, or a tuple that begins with it."""

    more: int | None
    """Values after the first of a tuple; None: no tuple."""

    @classmethod
    def of(cls, given: Any) -> Form:
        return cls(len(given) - 1 if isinstance(given, tuple | list) else None)

    def around(self, hidden: Tensor, more: Sequence[Any] = ()) -> Any:
        """What a layer would give, of hidden states alone."""
        if self.more is None:
            return hidden
        return hidden, *more, *[None] * (self.more - len(more))


def first_of(given: Any) -> Tensor:
    """The hidden states, of what a layer gives."""
    hidden: Tensor = given[0] if isinstance(given, tuple | list) else given
    return hidden


def shared_state(call: Call) -> dict[str, int]:
    """The arguments that a layer can put something into, and how much they hold."""
    named: dict[str, Any] = {**{f"argument {n}": value for n, value in enumerate(call.args)}, **call.kwargs}
    return {name: len(value) for name, value in named.items() if isinstance(value, Mapping | list)}


class Stubs:
    """Takes the calls of decoder layers. While `answers` is set, it is asked in their place."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._own = [layer.forward for layer in layers]
        self._of_thread = threading.local()
        for number, layer in enumerate(layers):
            layer.forward = partial(self._called, number)

    @property
    def answers(self) -> Callable[[int, Call], Any] | None:
        """What is asked: in each thread another one, for several may run the model at a time."""
        found: Callable[[int, Call], Any] | None = getattr(self._of_thread, "answers", None)
        return found

    @answers.setter
    def answers(self, answers: Callable[[int, Call], Any] | None) -> None:
        self._of_thread.answers = answers

    def run(self, number: int, call: Call) -> Any:
        """What the layer itself gives."""
        return self._own[number](*call.args, **call.kwargs)

    def _called(self, number: int, *args: Any, **kwargs: Any) -> Any:
        answers = self.answers
        if answers is None:
            raise Unsupported(f"layer {number} is called when no layer should be")
        return answers(number, Call(args, kwargs))

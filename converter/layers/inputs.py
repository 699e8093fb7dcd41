"""What the inputs of a layer's modules are like: which modules get the same ones, and their second moments.

Second moments are sums over batches, in the order of the batches, of products of tiles of fixed size, each on one
thread. So their bits don't depend on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, TypeVar

from converter.layers.stubs import Stopped
from converter.quantize.rounding.gptq import Moments

if TYPE_CHECKING:
    from torch import Tensor, nn

    from converter.layers.layered import LayeredModel

T = TypeVar("T")

_AHEAD = 2
"""Batches that are computed ahead."""
_TILE = 512
"""Columns of the second moments that are added to at a time."""


def groups_of(model: LayeredModel, number: int, modules: Collection[str]) -> list[tuple[str, ...]]:
    """Modules of a layer that is filled, in the order in which it calls them: together those that are called one after
    the other with the same input. A module that is not called on the first batch is absent."""
    calls: list[tuple[str, Any]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: calls.append((name, args[0]))

    hooks = [model.module(name).register_forward_pre_hook(note(name)) for name in modules]
    try:
        model.hidden_after(number, 0)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[tuple[str, ...]] = []
    latest: Any = None
    known: set[str] = set()
    for name, given in calls:
        if name in known:
            continue
        known.add(name)
        if groups and given is latest:
            groups[-1] = (*groups[-1], name)
        else:
            groups.append((name,))
        latest = given
    return groups


def moments_of(
    model: LayeredModel,
    number: int,
    module: str,
    lengths: Sequence[Sequence[int]],
    workers: Executor | None,
    step: Callable[[], None] = lambda: None,
) -> Moments | None:
    """The second moments of a module's inputs over all batches; None if no token gets to it.

    `lengths`: of the windows of each batch, in tokens, the longest of which isn't padded; padding doesn't count.
    `workers`: threads that compute on one thread each; None: compute here. `step` is called after each batch.
    """
    import torch

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise Stopped(args[0])

    def inputs(batch: int) -> Tensor | None:
        given = model.stopped_in(number, batch)
        return None if given is None else _tokens(given, lengths[batch])

    total: Tensor | None = None
    count = 0
    hook = model.module(module).register_forward_pre_hook(stop)
    try:
        for given in in_order(workers, inputs, range(len(lengths))):
            step()
            if given is None:
                continue
            if total is None:
                total = torch.zeros(given.shape[1], given.shape[1], device=given.device)
            count += given.shape[0]
            _add(total, given, workers)
    finally:
        hook.remove()
    if total is None or not count:
        return None
    total.div_(count)
    total.triu_().add_(total.triu(1).T)
    return Moments(total)


def _tokens(given: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inputs of a module as (tokens, in_features) in float32, without padding."""
    import torch

    given = given.reshape(-1, given.shape[-1])
    longest = max(lengths)
    if given.shape[0] == len(lengths) * longest:  # else some of the tokens, as an expert gets them
        windows = given.view(len(lengths), longest, -1)
        given = torch.cat([window[:length] for window, length in zip(windows, lengths, strict=True)])
    return given.float()


def _add(total: Tensor, given: Tensor, workers: Executor | None) -> None:
    """Add the products of all pairs of columns of which the first isn't behind the second's tile."""

    def add(first: int) -> None:
        last = min(first + _TILE, total.shape[1])
        total[:last, first:last].addmm_(given[:, :last].T, given[:, first:last])

    starts = range(0, total.shape[1], _TILE)
    for _ in map(add, starts) if workers is None else workers.map(add, starts):
        pass


def in_order(workers: Executor | None, compute: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
    """What is computed of each number, in their order; with `workers`, a few are computed ahead."""
    if workers is None:
        yield from map(compute, numbers)
        return
    ahead: deque[Future[T]] = deque()
    for number in numbers:
        ahead.append(workers.submit(compute, number))
        if len(ahead) > _AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()

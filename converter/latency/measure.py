"""Times of generated tokens: warm-up, rounds in turns, medians, ratios. Knows no server and prints nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Protocol

from converter.errors import BadRecipe

UNMERGED, MERGED, OUTPUT = "base + adapter", "merged, 16 bits", "output"
"""What is measured. Ratios are to `MERGED`."""
FIGURES = {"first_token": "first token", "token": "time per token", "rate": "tokens a second"}


class CannotRun(Exception):
    """A server can't run a variant; the message says why."""


@dataclass(frozen=True)
class Workload:
    """What is asked of each variant. `BadRecipe` for a value out of range."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    """Tokens of each answer. The model can't end an answer earlier."""
    rounds: int = 3
    """How often each variant is loaded and measured, in turns with the others."""
    requests: int = 3
    """Answers that are measured in a round, one after the other. One answer before them warms the server up."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = 2 if field.name == "new_tokens" else 1, getattr(self, field.name)
            if value < least:
                raise BadRecipe(f"`{field.name}` {value}: expected at least {least}")

    @property
    def tokens(self) -> int:
        """Tokens of a prompt and its answer; the model must have room for them."""
        return self.prompt_tokens + self.new_tokens

    def prompts(self, vocabulary: int) -> list[list[list[int]]]:
        """Token ids for each request of each round, the first of which is the warm-up; the same for all variants.

        No two begin alike, so that a server that remembers prompts computes each. The ids are from the middle of the
        vocabulary: at its ends are tokens with a meaning of their own.
        """
        chosen = random.Random(0)
        ids = range(vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1))
        numbers = iter(range(self.rounds * (self.requests + 1)))
        return [
            [[ids[next(numbers) % len(ids)], *chosen.choices(ids, k=self.prompt_tokens - 1)] for _ in range(count)]
            for count in [self.requests + 1] * self.rounds
        ]


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared, on this machine's disk."""

    name: str
    folder: Path
    adapter: Path | None = None
    """Served beside the model, unmerged."""


class Session(Protocol):
    """A model that is loaded."""

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Iterator[object]:
        """Generate so many tokens after a prompt, and yield at each as soon as it is there. May raise `CannotRun`."""


class Server(Protocol):
    """The seam: what loads a model and generates with it."""

    name: str
    version: str
    """Known after the first model is loaded; so is `device`."""
    device: str

    def opened(self, variant: Variant) -> AbstractContextManager[Session]:
        """Load a variant; gone at the end. `CannotRun` if it can't be loaded."""


@dataclass(frozen=True)
class Spread:
    """A figure of several requests."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    @property
    def width(self) -> float:
        return self.most - self.least


@dataclass(frozen=True)
class Times:
    """Of one request, in seconds from its start."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Latency:
    """Of one variant, over all its requests."""

    first_token: Spread
    """Seconds until the first token."""
    token: Spread
    """Seconds for each token after the first."""
    rate: Spread
    """Tokens a second, the first one included."""

    @classmethod
    def of(cls, times: Sequence[Times]) -> Latency:
        return cls(
            Spread.of([one.first for one in times]),
            Spread.of([(one.last - one.first) / (one.tokens - 1) for one in times]),
            Spread.of([one.tokens / one.last for one in times]),
        )


@dataclass(frozen=True)
class Measured:
    """What one server showed."""

    through: str
    version: str
    device: str
    latencies: dict[str, Latency]
    """Variant → its figures."""
    ratios: dict[str, dict[str, float]]
    """Variant → figure → its median divided by the merged model's. Empty if the merged model was not measured."""
    why_not: dict[str, str]
    """Variant → why it was not measured."""
    notes: tuple[str, ...] = ()


def measure(
    server: Server,
    variants: Iterable[Variant],
    workload: Workload,
    vocabulary: int,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measure variants in turns. In a round, each variant is loaded, warmed up and measured alone. Each round begins
    with another variant. `clock` gives seconds; `tick` is called with the variant's name before each request.
    """
    times: dict[str, list[Times]] = {variant.name: [] for variant in variants}
    order, why_not = list(variants), dict[str, str]()
    for number, (warm_up, *prompts) in enumerate(workload.prompts(vocabulary)):
        start = number % len(order) if order else 0
        for variant in order[start:] + order[:start]:
            if variant.name in why_not:
                continue
            tick(variant.name)
            try:
                with server.opened(variant) as session:
                    _timed(session, warm_up, workload.new_tokens, clock)
                    for prompt in prompts:
                        tick(variant.name)
                        times[variant.name].append(_timed(session, prompt, workload.new_tokens, clock))
            except CannotRun as exc:
                why_not[variant.name] = str(exc)
    found = {name: Latency.of(some) for name, some in times.items() if name not in why_not}
    return Measured(
        server.name, server.version, server.device, found, _ratios(found), why_not, tuple(within_the_noise(found))
    )


def _timed(session: Session, prompt: Sequence[int], new_tokens: int, clock: Callable[[], float]) -> Times:
    started = clock()
    arrived = [clock() - started for _ in session.generate(prompt, new_tokens)]
    if len(arrived) != new_tokens:
        raise CannotRun(f"it generated {len(arrived)} tokens, expected {new_tokens}")
    return Times(arrived[0], arrived[-1], new_tokens)


def _ratios(found: Mapping[str, Latency]) -> dict[str, dict[str, float]]:
    if MERGED not in found:
        return {}
    one = found[MERGED]
    return {
        name: {figure: getattr(of, figure).median / getattr(one, figure).median for figure in FIGURES}
        for name, of in found.items()
    }


def within_the_noise(found: Mapping[str, Latency]) -> Iterator[str]:
    """A note for each figure whose difference from the merged model's is smaller than the spread of single requests."""
    if MERGED not in found:
        return
    for name, of in found.items():
        for figure in () if name == MERGED else ("first_token", "token"):
            one, other = getattr(of, figure), getattr(found[MERGED], figure)
            difference, width = abs(one.median - other.median), max(one.width, other.width)
            if width > difference:
                yield (
                    f"{name}, {FIGURES[figure]}: the medians differ by {1000 * difference:.1f} ms, single requests by "
                    f"up to {1000 * width:.1f} ms: more rounds would tell more"
                )

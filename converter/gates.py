"""Limits that the figures of an output must reach; else it isn't made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from converter.errors import BadRecipe, GateFailed


class Figures(Protocol):
    """Of one tensor."""

    @property
    def error(self) -> float: ...
    @property
    def survival(self) -> float | None: ...


class Miss(NamedTuple):
    """A tensor that does not reach a gate."""

    tensor: str
    figure: str
    """survival or error"""
    value: float
    gate: float

    def __str__(self) -> str:
        side = "below" if self.figure == "survival" else "above"
        return f"{self.tensor} has {self.figure} {self.value:.4g}, {side} {self.gate:g}"


@dataclass(frozen=True)
class Gates:
    """Limits for every tensor of an output. They change no byte. Raises `BadRecipe` for a value out of range."""

    min_survival: float | None = None
    """Least survival of the delta, of every tensor that the adapter changes."""
    max_error: float | None = None
    """Most relative error, of every tensor."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value <= 1):
                raise BadRecipe(f"`{name}` {value!s:.40}: expected a number above 0, at most 1")

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self != Gates()

    def completed(self, others: Gates) -> Gates:
        """These gates, with those of `others` where these ask for nothing."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return Gates(**asdict(others) | own)

    def refuse_without_adapter(self) -> None:
        """Raises `BadRecipe` if a gate needs an adapter."""
        if self.min_survival is not None:
            raise BadRecipe("`min_survival` needs an adapter: without one there is no delta that could survive")

    def misses(self, figures: Mapping[str, Figures]) -> list[Miss]:
        """The tensors that don't reach a gate, the worst first."""
        found: list[tuple[float, Miss]] = []
        if (least := self.min_survival) is not None:
            survivals = {name: of.survival for name, of in figures.items() if of.survival is not None}
            # Not `<`, which is false for a NaN.
            below = {name: value for name, value in survivals.items() if not value >= least}
            found += [(value - least, Miss(name, "survival", value, least)) for name, value in below.items()]
            if not survivals:
                found.append((-1.0, Miss("the output", "survival", math.nan, least)))
        if (most := self.max_error) is not None:
            above = {name: of.error for name, of in figures.items() if not of.error <= most}
            found += [(most - value, Miss(name, "error", value, most)) for name, value in above.items()]
        return [miss for _, miss in sorted(found, key=lambda one: (one[0], one[1].tensor))]

    def hold(self, figures: Mapping[str, Figures], where: str) -> None:
        """`GateFailed` unless every tensor of the output at `where` reaches every gate."""
        if misses := self.misses(figures):
            raise GateFailed(f"{where}: {in_words(misses)}")


@dataclass(frozen=True)
class QualityGates:
    """Limits for what an output makes of a text, compared with the 16-bit model. `BadRecipe` for a value out of
    range."""

    max_perplexity_ratio: float | None = None
    """Most that the output's perplexity may be, divided by the 16-bit model's."""
    max_kl: float | None = None
    """Most KL divergence a token, in nats."""
    min_top1: float | None = None
    """Least share of tokens for which both hold the same one for the likeliest."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            most = 1 if name == "min_top1" else math.inf
            if value is not None and not (is_number and 0 < value <= most and math.isfinite(value)):
                range_ = "a number above 0" + (", at most 1" if name == "min_top1" else "")
                raise BadRecipe(f"`{name}` {value!s:.40}: expected {range_}")

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self != QualityGates()

    def reaches(self, gate: str, figure: float) -> bool:
        """Whether a figure reaches a gate, by the gate's name. Every figure reaches a gate that isn't asked for. NaN
        reaches no other gate."""
        limit = getattr(self, gate)
        if limit is None:
            return True
        return bool(figure >= limit if gate.startswith("min_") else figure <= limit)

    def misses(self, *, ratio: float, divergence: float, agreement: float) -> list[str]:
        """What doesn't reach a gate, a line each."""
        found = []
        if not self.reaches("max_perplexity_ratio", ratio):
            found.append(f"perplexity ratio {ratio:.4f}, above {self.max_perplexity_ratio:g}")
        if not self.reaches("max_kl", divergence):
            found.append(f"KL divergence {divergence:.4g}, above {self.max_kl:g}")
        if not self.reaches("min_top1", agreement):
            found.append(f"top-1 agreement {agreement:.4f}, below {self.min_top1:g}")
        return found


def in_words(misses: list[Miss]) -> str:
    """The worst one, and how many there are."""
    rest = "" if len(misses) == 1 else f", the worst of {len(misses)} that miss a gate"
    return f"{misses[0]}{rest}"


def report_of(gates: Gates, misses: list[Miss]) -> dict[str, Any]:
    """The same, as JSON values."""
    return asdict(gates) | {
        "missed": [miss._asdict() | {"value": miss.value if math.isfinite(miss.value) else None} for miss in misses]
    }

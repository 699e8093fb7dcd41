"""How well a model predicts, and how far it is from another one: from logits that come by tiles of the vocabulary.

For each token, in float64: the largest logit, Σ exp(logit), the logit of the token that comes, and Σ exp(p) · (p − q).
KL = Σ softmax(p) · (p − q) − log Σ exp(p) + log Σ exp(q), where q are the logits of the model that is judged, and p
those of the one that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LARGEST = 709.0
"""Of which e to the power is a float."""
_AT_A_TIME = 1 << 20
"""Logits that are in float64 at a time."""


class _Softmax:
    """What is known of the logits of some tokens, (tokens,) each."""

    def __init__(self, count: int, device: torch.device) -> None:
        import torch

        self.largest = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
        self.best = torch.zeros(count, dtype=torch.int64, device=device)
        self.total = torch.zeros(count, dtype=torch.float64, device=device)
        self.ahead = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
        """The logit of the token that comes."""

    def add(self, part: slice, logits: Tensor, first: int, next_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take a tile of logits in, (tokens of the part, rows). Gives exp(logits − largest), and exp(largest before −
        largest now), by which earlier sums are to be multiplied."""
        import torch

        largest, best = logits.max(-1)
        before = self.largest[part]
        self.best[part] = torch.where(largest > before, best + first, self.best[part])
        now = torch.maximum(before, largest)
        shrunk = torch.exp(before - now)
        weights = torch.exp(logits - now[:, None])
        self.total[part] = self.total[part] * shrunk + weights.sum(-1)
        self.largest[part] = now
        here = (next_tokens >= first) & (next_tokens < first + logits.shape[-1])
        at = (next_tokens - first).clamp(0, logits.shape[-1] - 1)
        self.ahead[part] = torch.where(here, logits.gather(-1, at[:, None])[:, 0], self.ahead[part])
        return weights, shrunk

    @property
    def log_total(self) -> Tensor:
        return self.largest + self.total.log()

    @property
    def surprise(self) -> Tensor:
        """The negative log-likelihood of each token that comes."""
        return self.log_total - self.ahead


class WindowSums(NamedTuple):
    """Sums over the predicted tokens of one window."""

    tokens: int
    surprise: float
    """Negative log-likelihood, in nats."""
    other_surprise: float = 0.0
    """That of the model that it is compared with."""
    divergence: float = 0.0
    """KL divergence, in nats."""
    agreed: float = 0.0
    """Tokens for which both models hold the same one for the likeliest."""


class BatchSums:
    """The figures of one batch of windows, to which tiles of logits are added."""

    def __init__(self, tokens: Tensor, lengths: Sequence[int], *, compared: bool) -> None:
        import torch

        self._lengths = lengths
        self._next = torch.cat([window[1:length] for window, length in zip(tokens, lengths, strict=True)])
        count = len(self._next)
        self._judged = _Softmax(count, tokens.device)
        self._other = _Softmax(count, tokens.device) if compared else None
        self._apart = torch.zeros(count, dtype=torch.float64, device=tokens.device)

    def add(self, first: int, judged: Tensor, other: Tensor | None = None) -> None:
        """Tiles of logits, (windows, tokens, rows) each, of which the first row is the token `first`."""
        import torch

        flat = [self._predicting(logits) for logits in (judged, other) if logits is not None]
        step = max(1, _AT_A_TIME // judged.shape[-1])
        for start in range(0, len(self._next), step):
            part = slice(start, start + step)
            q = flat[0][part].double()
            self._judged.add(part, q, first, self._next[part])
            if self._other is not None:
                p = flat[1][part].double()
                weights, shrunk = self._other.add(part, p, first, self._next[part])
                # A token that the other model rules out adds nothing, whatever this one says.
                apart = torch.where(weights > 0, weights * (p - q), 0.0).sum(-1)
                self._apart[part] = self._apart[part] * shrunk + apart

    def windows(self) -> list[WindowSums]:
        """Once all tiles are added."""
        judged, other = self._judged, self._other
        columns = [judged.surprise]
        if other is not None:
            divergence = self._apart / other.total - other.log_total + judged.log_total
            columns += [other.surprise, divergence, (judged.best == other.best).double()]
        found, start = [], 0
        for length in self._lengths:
            sums = [float(column[start : start + length - 1].sum()) for column in columns]
            found.append(WindowSums(length - 1, *sums))
            start += length - 1
        return found

    def _predicting(self, logits: Tensor) -> Tensor:
        """The logits that predict a token of their window, (tokens, rows)."""
        import torch

        return torch.cat([window[: length - 1] for window, length in zip(logits, self._lengths, strict=True)])


@dataclass(frozen=True)
class Estimate:
    """A figure, and how far chance may have moved it."""

    value: float
    error: float | None
    """The standard error, by windows: tokens of one window are not independent. None with fewer than two windows."""


@dataclass(frozen=True)
class Comparison:
    """How far a model is from the one that it is compared with."""

    perplexity: Estimate
    """Of the model that it is compared with."""
    ratio: Estimate
    """Perplexity, divided by that of the other model."""
    divergence: Estimate
    """KL divergence of the other model's prediction from this one's, a token, in nats."""
    agreement: Estimate
    """Share of the tokens for which both hold the same one for the likeliest."""


def mean_of(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """The mean over all tokens, given sums and counts of each window; the error as of clusters that are drawn by
    chance: √(n/(n−1) · Σ (sum − mean · count)²) / Σ count."""
    total, n = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if n < 2:
        return Estimate(mean, None)
    spread = math.fsum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return Estimate(mean, math.sqrt(spread * n / (n - 1)) / total)


def exp_of(estimate: Estimate) -> Estimate:
    """E to the power of an estimate; its error to the first order."""
    value = math.exp(estimate.value) if estimate.value < _LARGEST else math.inf
    return Estimate(value, None if estimate.error is None else value * estimate.error)


def perplexity_of(windows: Sequence[WindowSums]) -> Estimate:
    """Exp of the mean surprise."""
    return exp_of(mean_of([one.surprise for one in windows], [one.tokens for one in windows]))


def compared(windows: Iterable[WindowSums]) -> Comparison:
    """The figures of two models that have predicted the same windows. Errors of the ratio are those of pairs."""
    windows = list(windows)
    counts = [one.tokens for one in windows]
    return Comparison(
        perplexity=exp_of(mean_of([one.other_surprise for one in windows], counts)),
        ratio=exp_of(mean_of([one.surprise - one.other_surprise for one in windows], counts)),
        divergence=mean_of([one.divergence for one in windows], counts),
        agreement=mean_of([one.agreed for one in windows], counts),
    )

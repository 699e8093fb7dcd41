"""Figures from tiles of logits are those of whole logits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from converter.layers.figures import BatchSums, Estimate, WindowSums, compared, mean_of, perplexity_of

VOCABULARY = 50


def logits(seed: int, windows: int, tokens: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, logits of the judged model and of another one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (windows, tokens), generator=generator)
    other = torch.randn(windows, tokens, VOCABULARY, generator=generator) * scale
    return ids, other + torch.randn(other.shape, generator=generator) * 0.1, other


@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, VOCABULARY - 1), max_size=5),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_tiles_add_up(seed: int, lengths: list[int], cuts: set[int], scale: float) -> None:
    ids, judged, other = logits(seed, len(lengths), max(lengths), scale)
    sums = BatchSums(ids, lengths, compared=True)
    bounds = [0, *sorted(cuts), VOCABULARY]
    for start, end in pairwise(bounds):
        sums.add(start, judged[..., start:end], other[..., start:end])

    for number, (found, length) in enumerate(zip(sums.windows(), lengths, strict=True)):
        q, p = (one[number, : length - 1].double() for one in (judged, other))
        ahead = ids[number, 1:length]
        divergence = kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
        assert found.tokens == length - 1
        assert found.surprise == pytest.approx(float(cross_entropy(q, ahead, reduction="sum")), rel=1e-12)
        assert found.other_surprise == pytest.approx(float(cross_entropy(p, ahead, reduction="sum")), rel=1e-12)
        assert found.divergence == pytest.approx(float(divergence), rel=1e-9, abs=1e-12)
        assert found.agreed == int((q.argmax(-1) == p.argmax(-1)).sum())


def test_a_token_that_the_other_model_rules_out_adds_nothing() -> None:
    ids, judged, other = logits(0, 1, 3, 1.0)
    other[..., 7] = -math.inf
    ids[ids == 7] = 8
    sums = BatchSums(ids, [3], compared=True)
    sums.add(0, judged, other)

    (found,) = sums.windows()

    log_q, p = judged[0, :2].double().log_softmax(-1), other[0, :2].double().softmax(-1)
    assert found.divergence == pytest.approx(float((torch.special.xlogy(p, p) - p * log_q).sum()))


def test_a_model_is_no_distance_from_itself() -> None:
    ids, judged, _ = logits(1, 2, 8, 5.0)
    sums = BatchSums(ids, [8, 5], compared=True)
    sums.add(0, judged, judged)

    found = compared(sums.windows())

    assert found.ratio == Estimate(1.0, 0.0)
    assert found.divergence.value == pytest.approx(0.0, abs=1e-12)
    assert found.agreement == Estimate(1.0, 0.0)


def test_the_standard_error_is_that_of_clusters() -> None:
    """Of windows of one length it is the standard error of the means of windows."""
    means = [1.0, 2.0, 4.0, 9.0]

    found = mean_of([10 * mean for mean in means], [10] * 4)

    spread = torch.tensor(means, dtype=torch.float64).std()
    assert found.value == 4.0
    assert found.error == pytest.approx(float(spread) / 2)


def test_one_window_has_no_standard_error() -> None:
    found = perplexity_of([WindowSums(4, 4 * math.log(7))])

    assert found.value == pytest.approx(7)
    assert found.error is None


def test_a_perplexity_beyond_all_floats_is_infinite() -> None:
    assert perplexity_of([WindowSums(1, 1e6)]).value == math.inf


def test_the_ratios_error_is_that_of_pairs() -> None:
    """Two models that find the same windows hard, and differ by one factor, have a ratio without error."""
    windows = [WindowSums(10, 10 * (hard + 0.5), 10 * hard) for hard in (1.0, 3.0, 2.0)]

    found = compared(windows)

    assert found.ratio.value == pytest.approx(math.exp(0.5))
    assert found.ratio.error == pytest.approx(0.0, abs=1e-12)
    assert perplexity_of(windows).error == pytest.approx(math.exp(2.5) * math.sqrt(1 / 3))

"""Text that a model writes itself: tokens that are drawn by chance as it predicts them.

All windows grow together, by one token at a time. So each token takes one pass over the layers, whatever the number of
windows, and of what was computed for earlier tokens only keys and values are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from converter.layers.activations import Activations
from converter.layers.inputs import in_order
from converter.layers.texts import window_of
from converter.plan.budget import ACTIVATIONS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.calibration import Calibration
    from converter.layers.layered import LayeredModel
    from converter.model.tokenizer import Tokenizer

_TOGETHER = 64
"""Windows in a batch. Always the same number, since another one would change the last bits of what is computed."""
_TILE = 1 << 23
"""Weights of the head that are in memory at a time."""

Step = Callable[[int, int], None]
"""Called with the number of a token and of a layer, before that layer runs."""


class Draw:
    """Draws one token for each of some windows, by the softmax of logits that come by tiles of the vocabulary.

    In each tile a token is drawn; it replaces that of the tiles before with the probability of its tile among all so
    far. So each token is drawn with its probability in the whole.
    """

    def __init__(self, windows: int) -> None:
        import torch

        self.tokens = torch.zeros(windows, dtype=torch.int64)
        self._log_total = torch.full((windows,), -math.inf, dtype=torch.float64)

    def add(self, first: int, logits: Tensor, chance: Tensor) -> None:
        """Take a tile in: (windows, rows), of which the first row is the token `first`. `chance`: (windows, 2), numbers
        from 0 to below 1, float64."""
        import torch

        logits = logits.cpu().double()
        sums = torch.softmax(logits, -1).cumsum(-1)
        wanted = chance[:, :1] * sums[:, -1:]
        drawn = torch.searchsorted(sums, wanted, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
        of_tile = logits.logsumexp(-1)
        self._log_total = torch.logaddexp(self._log_total, of_tile)
        takes = chance[:, 1] < (of_tile - self._log_total).exp()
        self.tokens = torch.where(takes, first + drawn, self.tokens)


def first_tokens(windows: int, begin: int | None, words: int, generator: torch.Generator) -> Tensor:
    """What windows begin with, (windows,): the token with which the tokenizer begins each text. None: it has none; a
    token of its vocabulary of so many `words` is drawn for each."""
    import torch

    if begin is not None:
        return torch.full((windows,), begin)
    return torch.randint(words, (windows,), generator=generator)


class OwnText:
    """Writes the text by which a calibration without a text of the user's chooses codes. `BadRecipe` if the windows are
    longer than the model takes."""

    def __init__(self, how: Calibration, config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        import torch

        windows, self.size = how.sequences
        window_of(self.size, config, "calibrate_window")
        self._generator = torch.Generator().manual_seed(how.seed or 0)
        self.first = first_tokens(windows, tokenizer.begin, tokenizer.words, self._generator)
        """Of each window."""

    def written_by(
        self, model: LayeredModel, workers: Executor | None, step: Step = lambda *_: None
    ) -> tuple[tuple[int, ...], ...]:
        """The windows, as `Writing` gives them. Call it once: a second call would draw other tokens."""
        with Activations(ACTIVATIONS // 2) as kept:  # many small tensors, of which the heap keeps some of the room
            found = Writing(model, kept, workers, step).windows(self.first, self.size, self._generator)
        return tuple(map(tuple, found))


def in_groups(tokens: Tensor) -> list[Tensor]:
    """Windows of one token, as batches: (windows, 1) each."""
    return list(tokens[:, None].split(_TOGETHER))


class Writing:
    """A model that writes windows. `activations` are for what passes between its layers, and for keys and values.

    `workers`: threads that compute on one thread each; None: compute here.
    """

    def __init__(
        self,
        model: LayeredModel,
        activations: Activations,
        workers: Executor | None = None,
        step: Step = lambda *_: None,
    ) -> None:
        self._model, self._activations, self._workers, self._step = model, activations, workers, step
        rows = max(1, _TILE // model.width)
        self._tiles = list(pairwise([*range(0, model.vocabulary, rows), model.vocabulary]))

    def windows(self, first: Tensor, size: int, generator: torch.Generator) -> list[list[int]]:
        """Windows of `size` tokens, of which the first one is given, (windows,). The model takes their batches.
        `Unsupported` for a layer that doesn't keep keys and values."""
        import torch

        text = [in_groups(first)]
        for count in range(size - 1):
            self._model.take(text[-1], self._activations)
            for layer in range(self._model.layers):
                self._step(count, layer)
                with self._model.filled(layer):
                    self._advance(layer, count, len(text[-1]))
            text.append(self._next(text[-1], generator))
        found: list[list[int]] = torch.cat([torch.cat(group, 1) for group in zip(*text, strict=True)]).tolist()
        return found

    def _advance(self, layer: int, count: int, batches: int) -> None:
        """Run a layer over one token of each window. `count`: how many are before it."""
        import torch

        kept = self._activations

        def place(earlier: int, batch: int) -> int:
            """The number of a token's keys; that of its values comes next. Those of hidden states are before."""
            return batches + 2 * ((earlier * self._model.layers + layer) * batches + batch)

        def compute(batch: int) -> tuple[Tensor, Tensor, Tensor]:
            places = [place(earlier, batch) for earlier in range(count)]
            held = [torch.cat([kept.get(one + which) for one in places], -2) for which in (0, 1)] if places else None
            return self._model.with_more(layer, batch, None if held is None else (held[0], held[1]))

        for batch, (hidden, keys, values) in enumerate(in_order(self._workers, compute, range(batches))):
            self._model.keep(batch, hidden)
            kept.put(place(count, batch), keys)
            kept.put(place(count, batch) + 1, values)

    def _next(self, groups: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The tokens that come after those of the batches, which have gone through all layers."""
        import torch

        draws = [Draw(len(group)) for group in groups]
        for start, end in self._tiles:
            with self._model.head(start, end):
                found = in_order(self._workers, self._model.logits, range(len(groups)))
                for draw, logits in zip(draws, found, strict=True):
                    chance = torch.rand(len(draw.tokens), 2, generator=generator, dtype=torch.float64)
                    draw.add(start, logits[:, -1], chance)
        return [draw.tokens[:, None] for draw in draws]

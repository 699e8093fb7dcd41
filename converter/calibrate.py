"""A conversion whose codes are chosen by a text: the model is run layer by layer while it is quantized.

The text is the user's, or one that the merged model writes first.

A layer gets the text as the layers before it pass it on, which are quantized by then. Its weights are quantized in the
order in which it calls them, each by what comes out of those that are quantized already. Then the layer runs with what
a loader will restore, and the next one has its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from converter.calibration import DEFAULT_WINDOW, sha256_of_text
from converter.errors import ConversionRefused, ConverterError, InputChanged
from converter.layers.activations import Activations
from converter.layers.inputs import groups_of, in_order, moments_of
from converter.layers.layered import LayeredModel
from converter.layers.restored import restored
from converter.layers.sampled import OwnText
from converter.layers.texts import Batch, Text, in_batches, window_of, windows_of
from converter.layers.weights import Weights
from converter.model.tokenizer import Tokenizer
from converter.observer import Observer
from converter.plan.budget import ACTIVATIONS
from converter.plan.decide import make_plan
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan, TensorPlan
from converter.seal.production import Made, Target
from converter.threads import pool, use_one_thread
from converter.tile import Encoding
from converter.write.journal import Sampled

if TYPE_CHECKING:
    from torch import Tensor

Result = tuple[Target, Made | ConverterError]
Convert = Callable[[Iterable[Sequence[Target]]], Iterator[Result]]
"""Converts tensors; when it gives a result, the tensor is written."""


class Making(Protocol):
    """An output whose tensors are made in any order."""

    def targets(self) -> Iterator[list[Target]]:
        """The tensors that are left to be made."""

    def target(self, name: str) -> Target | None:
        """Where a tensor goes; None if it is made already."""

    def written(self, tensor: TensorPlan) -> Mapping[str, bytes]:
        """The bytes of a tensor that is made, by output name."""

    @property
    def sampled(self) -> Sampled | None:
        """The text that the model wrote; None: it hasn't yet."""

    def note_sampled(self, sampled: Sampled) -> None:
        """Take note of it."""


class Calibrator:
    """Calibrates one plan by one text; None: by what the model writes. Refuses, before anything is written, a model
    that can't be run layer by layer.

    `ConversionRefused` for a text without two tokens, `InputChanged` for one that isn't the recipe's.
    """

    def __init__(self, plan: Plan, inputs: Inputs, text: Path | None, encoding: Encoding, observer: Observer) -> None:
        assert plan.recipe.calibration is not None  # noqa: S101  (who calls this has looked)
        self._plan, self._inputs, self._encoding, self._observer = plan, inputs, encoding, observer
        self._recipe = plan.recipe.calibration
        self._planned = {tensor.name: tensor for tensor in plan.tensors()}
        self._done = 0
        self._activations = Activations(ACTIVATIONS)
        self._own = OwnText(self._recipe, inputs.base.config, self._tokenizer()) if text is None else None
        self._batches = [] if text is None else self._in_batches(text)
        tokens = [batch.tokens for batch in self._batches] if self._own is None else [self._own.first[None, :16]]
        self._model = LayeredModel.of(self._weights(), tokens, self._activations, device=encoding.device.place)
        if self._own is not None:
            self._model.refuse_to_write()

    def run(self, output: Making, convert: Convert) -> Iterator[Result]:
        """Make all tensors of the output: those of the layers, layer by layer, then the others. Once."""
        model, threads = self._model, self._plan.resources.threads
        with self._activations, ExitStack() as stack:
            workers: Executor | None = None
            if self._encoding.device.place.type == "cpu" and threads > 1:
                workers = stack.enter_context(pool(threads, "layer", use_one_thread))
            if self._own is not None:
                self._write(self._own, output, workers)
            for number in range(model.layers):
                with model.filled(number):
                    yield from self._layer(number, output, convert, workers)
                    if number < model.layers - 1:
                        self._advance(number, workers)
        yield from convert(output.targets())

    def _write(self, own: OwnText, output: Making, workers: Executor | None) -> None:
        """Let the model write the text, or take what it wrote in an earlier run."""

        def step(token: int, layer: int) -> None:
            self._observer.stop_if_asked("the text was written")
            done = (token + layer / self._model.layers) / own.size
            what = f"token {token + 2} of {own.size}: layer {layer + 1} of {self._model.layers}"
            self._observer.tell("sampling", int(done * self._plan.base_bytes), self._plan.base_bytes, what)

        if (sampled := output.sampled) is None:
            sampled = Sampled(own.written_by(self._model, workers, step))
            output.note_sampled(sampled)
        self._batches = in_batches(sampled.windows, max(own.size, DEFAULT_WINDOW))
        self._model.take([batch.tokens for batch in self._batches], self._activations)

    def _layer(self, number: int, output: Making, convert: Convert, workers: Executor | None) -> Iterator[Result]:
        model = self._model
        weights = {
            module: tensor
            for tensor, module in model.linear_weights(number).items()
            if self._planned[tensor].action == "quantize"
        }
        groups = groups_of(model, number, weights)
        uncalled = weights.keys() - {*chain.from_iterable(groups)}  # with the first batch
        for group in [*groups, *zip(sorted(uncalled))]:
            names = [weights[module] for module in group]
            targets = [target for target in map(output.target, names) if target is not None]
            if targets:
                what = f"layer {number + 1} of {model.layers}: the inputs of {group[0].rpartition('.')[2]}"
                self._observer.tell("converting", self._done, self._plan.base_bytes, what)
                lengths = [batch.lengths for batch in self._batches]
                moments = moments_of(model, number, group[0], lengths, workers, self._stop_if_asked)
                if moments is not None:
                    self._encoding.moments |= dict.fromkeys(names, moments)
                yield from convert([target] for target in targets)
                for name in names:
                    self._encoding.moments.pop(name, None)
            model.put({name: self._restored(name, output) for name in names})
            self._done += sum(self._planned[name].source.nbytes for name in names)

    def _restored(self, name: str, output: Making) -> Tensor:
        tensor = self._planned[name]
        return restored(tensor, output.written(tensor), self._plan.config, self._inputs.base.folder)

    def _advance(self, number: int, workers: Executor | None) -> None:
        """Run a layer over all batches, for the next one."""
        model = self._model

        def after(batch: int) -> Tensor:
            return model.hidden_after(number, batch)

        for batch, hidden in enumerate(in_order(workers, after, range(len(self._batches)))):
            model.keep(batch, hidden)
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        self._observer.stop_if_asked("the text was run")

    def _weights(self) -> Weights:
        """The merged model in 16 bits."""
        base, adapter = self._inputs.base, self._inputs.adapter
        plan = make_plan(base, adapter, self._plan.recipe.merged(), trust_remote_code=True)  # none of the code is run
        if not plan.verifiable:
            raise ConversionRefused(
                f"{base.folder.label}: transformers can't build the model without its code, so no text can be run "
                "through it: convert it without `calibrate`"
            )
        return Weights(plan, base.folder, None if adapter is None else adapter.folder)

    def _in_batches(self, text: Path) -> list[Batch]:
        if sha256_of_text(text) != self._recipe.text:
            raise InputChanged(f"{text}: not the text of the recipe, by its sha256; give the same file again")
        size = window_of(self._recipe.window, self._inputs.base.config, "calibrate_window")
        documents = Text(text, self._recipe.field).documents()
        windows = windows_of(documents, self._tokenizer(), size, self._recipe.tokens)
        if not windows:
            raise ConversionRefused(f"{text}: no two tokens, so nothing can be calibrated by it")
        return in_batches(windows, max(size, DEFAULT_WINDOW))

    def _tokenizer(self) -> Tokenizer:
        """The one that the output gets."""
        adapter = self._inputs.adapter
        own = any(file.name == "tokenizer.json" and file.origin == "adapter" for file in self._plan.side_files)
        path = (adapter if own and adapter is not None else self._inputs.base).folder.path
        assert path is not None  # noqa: S101  (it has been fetched)
        return Tokenizer(path)

"""How well an output predicts a text, and how far it is from the 16-bit model that it was made from.

Both models are run one layer at a time, so none has to fit in memory; their logits are compared tile by tile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from converter.calibration import DEFAULT_WINDOW
from converter.compare import Sources
from converter.errors import AdapterMismatch, BadCheckpoint, BadRecipe, ConversionRefused
from converter.gates import QualityGates
from converter.job import Reference, RunOptions
from converter.layers.activations import Activations
from converter.layers.figures import BatchSums, Comparison, Estimate, WindowSums, compared, perplexity_of
from converter.layers.kept import Kept
from converter.layers.layered import LayeredModel
from converter.layers.texts import Batch, Text, in_batches, window_of, windows_of
from converter.layers.weights import Weights
from converter.model.tokenizer import Tokenizer
from converter.observer import Observer
from converter.plan.adapters import wanted
from converter.plan.decide import make_plan
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan
from converter.recipe import Recipe
from converter.seal.receipt import read_receipt
from converter.tensors import as_bytes, torch_device
from converter.write.journal import job_of

DEFAULT_MEMORY = 1_000_000_000
DTYPES = ("float32", "bfloat16", "float16")
_LOGIT_BYTES = 24
"""Memory that one logit of both models takes: as the models give them, and what is made of them."""
_LEAST_TILE = 256
"""Rows of the head."""
_SIXTEEN_BIT = Recipe(quant_type="none")


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how. `BadRecipe` for a value out of range."""

    text: Text
    window: int | None = None
    """Tokens that a model sees at a time. None: 2048, or as many as the model takes."""
    max_tokens: int | None = None
    """No window begins once there are so many tokens. None: the whole text."""
    dtype: str = "float32"
    """What the models compute in; their weights are in 16 bits."""
    memory: int | None = None
    """Bytes for activations and logits; the weights of a layer come on top. None: `DEFAULT_MEMORY`."""
    scratch: Path | None = None
    """Folder for activations that don't fit into the memory. After each layer its activations are saved there, too, so
    that an interrupted run can be resumed. None: the system's folder for temporary files, and nothing is resumed."""
    gates: QualityGates = QualityGates()

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise BadRecipe(f"`window` {self.window}: expected at least 2 tokens")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise BadRecipe(f"`max_tokens` {self.max_tokens}: expected at least 2")
        if self.dtype not in DTYPES:
            raise BadRecipe(f"`dtype` {self.dtype!s:.40}: expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Evaluation:
    """What was measured. Perplexities are those of the tokens that have another one before them in their window."""

    tokens: int
    """That were predicted."""
    windows: int
    window: int
    """Tokens of a window, at most."""
    dtype: str
    perplexity: Estimate
    comparison: Comparison | None = None
    """With the 16-bit model; None: it was not compared."""
    notes: tuple[str, ...] = ()
    missed: tuple[str, ...] = field(default=())
    """Gates that are missed, one line each."""

    @property
    def is_good(self) -> bool:
        return not self.missed


def evaluate_output(
    out: Reference,
    measuring: Measuring,
    against: Sources | None = None,
    options: RunOptions = RunOptions(),
    observer: Observer = Observer(),
) -> Evaluation:
    """Measure an output: `converter.evaluate`, from values. `against`: base and adapter of the 16-bit model; None:
    don't compare. Of `options`, those of inputs and the device count."""
    if measuring.gates and against is None:
        raise BadRecipe("a gate on KL divergence, top-1 agreement or perplexity ratio needs `base` or `adapter`")
    with ExitStack() as stack:
        judged = _Opened.of(stack.enter_context(Inputs(out, None, **options.of_inputs())), _SIXTEEN_BIT, observer)
        size = window_of(measuring.window, judged.plan.config)
        windows = _windows(measuring, judged.folder, size)
        batches = in_batches(windows, max(size, DEFAULT_WINDOW))
        opened = [judged]
        if against is not None:
            recipe, against = as_made(judged.folder, against)
            inputs = _inputs_of(against, recipe, options)
            opened.append(_Opened.of(stack.enter_context(inputs), recipe, observer))
        reader = _Reader(measuring, batches, torch_device(options.device), observer, opened)
        sums = reader.read(stack)
    figures = compared(sums) if against is not None else None
    missed = [] if figures is None else _missed(measuring.gates, figures)
    return Evaluation(
        tokens=sum(one.tokens for one in sums),
        windows=len(sums),
        window=size,
        dtype=measuring.dtype,
        perplexity=perplexity_of(sums),
        comparison=figures,
        notes=tuple(_notes(judged.stated)),
        missed=tuple(missed),
    )


@dataclass(frozen=True)
class _Opened:
    """A model to be run, and its bytes."""

    inputs: Inputs
    plan: Plan
    stated: Mapping[str, Any]
    """Its own config, which says what it is quantized in."""

    @classmethod
    def of(cls, inputs: Inputs, recipe: Recipe, observer: Observer) -> _Opened:
        inputs.bring(observer.tell, observer.stop)
        plan = make_plan(inputs.base, inputs.adapter, recipe, trust_remote_code=True)  # none of the code is run
        if not plan.verifiable:
            raise ConversionRefused(f"{inputs.base.folder.label}: transformers can't build the model without its code")
        return cls(inputs, plan, inputs.base.config)

    @property
    def folder(self) -> Path:
        """Where it is on this machine."""
        path = self.inputs.base.folder.path
        assert path is not None  # noqa: S101  (`bring` has fetched it)
        return path

    @property
    def label(self) -> str:
        return self.inputs.base.folder.label

    def weights(self) -> Weights:
        adapter = self.inputs.adapter
        return Weights(self.plan, self.inputs.base.folder, adapter.folder if adapter is not None else None)


class _Reader:
    """Runs models over batches, and compares their logits."""

    def __init__(
        self, measuring: Measuring, batches: list[Batch], device: Any, observer: Observer, models: list[_Opened]
    ) -> None:
        self._measuring, self._batches, self._device = measuring, batches, device
        self._observer, self._models = observer, models
        self._memory = measuring.memory or DEFAULT_MEMORY
        self._total = sum(one.plan.base_bytes for one in models)

    def read(self, stack: ExitStack) -> list[WindowSums]:
        """The sums of each window."""
        done = 0
        run: list[LayeredModel] = []
        left: list[Kept] = []
        for opened in self._models:
            model = self._built(stack, opened)
            if run and model.vocabulary != run[0].vocabulary:
                raise AdapterMismatch(
                    f"{self._models[0].label}: its head has {run[0].vocabulary:,} tokens, that of {opened.label} "
                    f"{model.vocabulary:,}"
                )
            kept = self._kept(opened)
            self._run(model, opened, done, kept)
            run.append(model)
            left += [] if kept is None else [kept]
            done += opened.plan.base_bytes
        first, *others = run
        sums = [
            BatchSums(batch.tokens.to(self._device), batch.lengths, compared=bool(others)) for batch in self._batches
        ]
        for start, end in pairwise(self._tiles(first)):
            self._observer.stop_if_asked("it was evaluated")
            part = int(self._total * start / first.vocabulary)
            self._observer.tell("comparing", part, self._total, f"tokens from {start:,} on of {first.vocabulary:,}")
            with first.head(start, end), _all(others, start, end):
                for number, of_batch in enumerate(sums):
                    of_batch.add(start, *[model.logits(number) for model in run])
        for kept in left:
            kept.remove()
        return [window for of_batch in sums for window in of_batch.windows()]

    def _built(self, stack: ExitStack, opened: _Opened) -> LayeredModel:
        share = self._memory // 2 // len(self._models)
        activations = stack.enter_context(Activations(share, self._measuring.scratch))
        tokens = [batch.tokens for batch in self._batches]
        how: dict[str, Any] = {"dtype": self._measuring.dtype, "device": self._device}
        return LayeredModel.of(opened.weights(), tokens, activations, **how)

    def _kept(self, opened: _Opened) -> Kept | None:
        """Files that keep what comes out of each layer, so that an interrupted run can be resumed. They are removed
        once all models have been compared. None: no scratch folder was given."""
        if self._measuring.scratch is None:
            return None
        said = [job_of(opened.plan, opened.inputs), self._measuring.dtype, self._device.type]
        said += [list(batch.tokens.shape) for batch in self._batches]
        about = xxhash.xxh3_128(json.dumps(said).encode())
        for batch in self._batches:
            about.update(as_bytes(batch.tokens))
        return Kept(self._measuring.scratch, about.hexdigest())

    def _run(self, model: LayeredModel, opened: _Opened, done: int, kept: Kept | None) -> None:
        def step(layer: int, batch: int, batches: int) -> None:
            self._observer.stop_if_asked("it was evaluated")
            part = (layer * batches + batch) / (model.layers * batches)
            name = f"{opened.label}: layer {layer + 1} of {model.layers}"
            self._observer.tell("evaluating", done + int(part * opened.plan.base_bytes), self._total, name)

        model.run(step, kept)

    def _tiles(self, model: LayeredModel) -> list[int]:
        """Rows at which the head is cut: (0, …, rows)."""
        tokens = max(batch.tokens.numel() for batch in self._batches)
        row_bytes = _LOGIT_BYTES * tokens + 8 * model.width * len(self._models)
        step = max(_LEAST_TILE, self._memory // 2 // row_bytes)
        return [*range(0, model.vocabulary, step), model.vocabulary]


@contextmanager
def _all(models: list[LayeredModel], start: int, end: int) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.head(start, end))
        yield


def _windows(measuring: Measuring, folder: Path, size: int) -> list[list[int]]:
    windows = windows_of(measuring.text.documents(), Tokenizer(folder), size, measuring.max_tokens)
    if not windows:
        raise ConversionRefused(f"{measuring.text.path}: no two tokens, so there is nothing to predict")
    return windows


def as_made(out: Path, against: Sources) -> tuple[Recipe, Sources]:
    """How the 16-bit model is merged, and of what: as the receipt says, as far as that isn't given."""
    receipt = read_receipt(out) or {}
    origin = receipt.get("origin")
    complete = replace(against, origin=origin).completed() if isinstance(origin, dict) else against
    try:
        made = Recipe.from_json(receipt["recipe"]) if "recipe" in receipt else Recipe()
    except BadRecipe as exc:
        raise BadCheckpoint(f"{out}: the recipe in its receipt can't be understood: {exc}") from exc
    return made.merged(), complete


def _inputs_of(sources: Sources, recipe: Recipe, options: RunOptions) -> Inputs:
    adapter = wanted(sources.adapter, recipe.combine)
    return Inputs(sources.base, adapter, sources.base_revision, sources.adapter_revision, **options.of_inputs())


def _missed(gates: QualityGates, figures: Comparison) -> list[str]:
    return gates.misses(
        ratio=figures.ratio.value, divergence=figures.divergence.value, agreement=figures.agreement.value
    )


def _notes(config: Mapping[str, Any]) -> Iterator[str]:
    """What the figures leave out."""
    quantization = config.get("quantization_config")
    stated: Mapping[str, Any] = quantization if isinstance(quantization, dict) else {}
    groups = stated.get("config_groups")
    rounds_inputs = bool(stated.get("load_in_8bit")) or any(
        isinstance(one, dict) and one.get("input_activations") for one in (groups or {}).values()
    )
    if rounds_inputs:
        yield "loaders of this format round activations, too: these figures are of its weights alone"

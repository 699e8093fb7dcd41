"""Is this OUT whole, unchanged and loadable? And is it what its base and adapter give?

Works on what this tool made, and, as far as that goes, on any checkpoint that transformers and bitsandbytes wrote.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converter.compare import Sources, compare_with, text_or_none
from converter.errors import (
    BadCheckpoint,
    BadRecipe,
    ConversionFailed,
    ConversionRefused,
    Interrupted,
    Undecided,
)
from converter.gates import Gates
from converter.job import RunOptions
from converter.model.ask import check_loaders
from converter.model.loaders import OF_TARGET, TRANSFORMERS
from converter.observer import Observer
from converter.quantize.format import Found
from converter.quantize.formats import all_formats
from converter.quantize.measure import Fidelity
from converter.read.checkpoint import Checkpoint
from converter.read.checksums import SUMS, read_sums
from converter.read.folder import LocalFolder
from converter.read.side_files import is_loaded
from converter.recipe import Recipe
from converter.seal.destination import sizes_in
from converter.seal.receipt import CARD, RECEIPT, fidelity_of, read_receipt
from converter.tensors import all_finite
from converter.write.sha256 import sha256_of

_RECEIPT_SAYS, _SUMS_SAY = "the receipt says", f"{SUMS} says"


@dataclass(repr=False)
class Verification:
    """What was checked, and what is wrong."""

    problems: list[str] = field(default_factory=list)
    """One line each; empty: none was found."""
    files: int = 0
    """Files whose size and sha256 were compared with the receipt or SHA256SUMS."""
    tensors: int = 0
    """Tensors that were searched for NaN and infinity."""
    recomputed: int = 0
    """Tensors that were made again from base and adapter, and compared byte by byte."""
    has_receipt: bool = False
    base_name: str | None = None
    """The base, as the receipt names it."""
    has_adapter: bool | None = None
    """Whether an adapter was merged in, by the receipt."""
    adapter_name: str | None = None
    """The adapter, as the receipt names it."""
    quantized: int = 0
    """Weights that are quantized, in whatever format."""
    missed: list[str] = field(default_factory=list)
    """Tensors that don't reach a gate, one line each, the worst first."""
    loaders: dict[str, list[str]] = field(default_factory=dict)
    """Loader → what it would find wrong, by its rules; empty: nothing that is known."""

    def __repr__(self) -> str:
        wrong = [*self.problems, *self.missed]
        verdict = f"{len(wrong)} problems, the first: {wrong[0]}" if wrong else "good"
        return f"Verification({self.files} files, {self.tensors} tensors, {self.recomputed} made again: {verdict})"

    @property
    def is_converted(self) -> bool:
        """Whether anything says that this is a conversion: a receipt, or a quantized weight."""
        return self.has_receipt or self.quantized > 0

    @property
    def is_good(self) -> bool:
        return not self.problems and not self.missed


@dataclass(frozen=True)
class Checks:
    """What is asked of an output beyond digests, structure and finite values."""

    sources: Sources | None = None
    """Make it again from these and compare; the receipt names the one that is missing. None: don't compare."""
    sample: float = 1.0
    """Share of each shard's tensors to make again, chosen by their names."""
    gates: Gates = Gates()
    require_receipt: bool = False


def verify_output(
    out: Path, checks: Checks = Checks(), options: RunOptions = RunOptions(), observer: Observer = Observer()
) -> Verification:
    """Check a checkpoint: `converter.verify`, from values. Of `options`, those of inputs and plan count."""
    folder = LocalFolder(out)
    receipt = read_receipt(folder.path)
    origin = receipt.get("origin") if receipt is not None else None
    origin = origin if isinstance(origin, dict) else None
    figures: dict[str, Fidelity] = {}
    found = Verification(has_receipt=receipt is not None)
    if origin is not None:
        found.base_name, found.adapter_name = (text_or_none(origin.get(key)) for key in ("base_name", "adapter_name"))
        found.has_adapter = origin.get("adapter") is not None
    if checks.require_receipt and receipt is None:
        found.problems.append(f"{RECEIPT}: missing, or not a receipt of this tool")
    try:
        _check_files(folder.path, receipt, found)
        with Checkpoint(folder) as written:
            found.problems += written.notes
            quantized = _check_structure(written, found, _loader_of(receipt))
            found.quantized = len(quantized.weights)
            _check_values(written, quantized, found, observer)
            if checks.sources is not None:
                recipe = _recipe_of(written, receipt, quantized)
                given = replace(checks.sources, origin=origin)
                options = replace(options, trust_remote_code=True)  # none of the code is run
                problems, figures = compare_with(written, recipe, given, options, checks.sample, observer)
                found.problems += problems
                found.recomputed = len(figures)
        if checks.gates:
            figures = _stated_figures(receipt, figures) | figures
            found.missed = [str(miss) for miss in checks.gates.misses(figures)]
    except BadCheckpoint as exc:
        if receipt is None and not found.tensors:
            raise
        found.problems.append(str(exc))
    except ConversionFailed as exc:
        if isinstance(exc, Undecided | Interrupted):
            raise
        raise Undecided(str(exc)) from exc
    return found


def _stated_figures(receipt: dict[str, Any] | None, made_again: dict[str, Fidelity]) -> dict[str, Fidelity]:
    """The figures that the receipt states. Raises `Undecided` if it has none and none were made again."""
    if receipt is None:
        if not made_again:
            raise Undecided(f"no {RECEIPT}, so error and survival are not known: give `base` and `adapter`")
        return {}
    try:
        return fidelity_of(receipt)
    except ValueError as exc:
        raise Undecided(str(exc)) from exc


def _check_files(out: Path, receipt: dict[str, Any] | None, found: Verification) -> None:
    """Compare files with the receipt; the receipt, and files that it doesn't list, with SHA256SUMS."""
    known = receipt["files"] if receipt is not None else {}
    stated = {name: (_RECEIPT_SAYS, file.get("sha256"), file.get("bytes")) for name, file in known.items()}
    # Names are looked up among what is there: a receipt may have any text for one.
    there = set(os.listdir(out))
    sizes = {name: size for name, size in sizes_in(out).items() if not (out / name).is_symlink()}
    if receipt is not None or SUMS in there:
        sums = _sums(out, there, found)
        sums.pop(CARD, None)  # those of earlier versions cover it
        for name, sha256 in sums.items():
            _, expected, _ = stated.setdefault(name, (_SUMS_SAY, sha256, None))
            if expected != sha256:
                found.problems.append(f"{SUMS}: has another sha256 for {name} than the receipt")
    for name, (said_by, sha256, size) in sorted(stated.items()):
        if name not in sizes:
            found.problems.append(f"{name}: missing")
            continue
        if size not in (None, sizes[name]):
            found.problems.append(f"{name}: {sizes[name]:,} bytes, {said_by} otherwise")
        elif (digest := sha256_of(out / name)) != sha256:
            found.problems.append(f"{name}: sha256 {digest[:12]}…, {said_by} otherwise")
        found.files += 1
    if receipt is not None:
        extra = sorted(name for name in there - known.keys() if name.endswith(".safetensors") or is_loaded(name))
        found.problems += [f"{name}: not in the receipt, and loaders would read it" for name in extra]


def _sums(out: Path, there: Container[str], found: Verification) -> dict[str, str]:
    if SUMS not in there:
        found.problems.append(f"{SUMS}: missing")
        return {}
    folder = LocalFolder(out)
    try:
        return read_sums(folder)
    except BadCheckpoint as exc:
        found.problems.append(str(exc))
        return {}
    finally:
        folder.close()


def _loader_of(receipt: dict[str, Any] | None) -> str:
    """The loader that an output was made for, by its receipt."""
    recipe = receipt.get("recipe") if receipt is not None else None
    return OF_TARGET.get(str(recipe.get("target")), TRANSFORMERS) if isinstance(recipe, dict) else TRANSFORMERS


def _check_structure(written: Checkpoint, found: Verification, loader: str) -> Found:
    """Find the quantized weights, in whatever format, and note what is wrong with them and what a loader would say."""
    quantized = Found()
    for one in (kind.find(written) for kind in all_formats()):
        quantized.weights |= one.weights
        quantized.parts |= one.parts
        quantized.uneven |= one.uneven
        quantized.settings = quantized.settings or one.settings
        found.problems += one.problems
    shapes = {name: tensor.shape for name, tensor in written.tensors.items() if name not in quantized.parts}
    try:
        found.loaders = check_loaders(written.config, shapes | quantized.weights, quantized.weights, quantized.uneven)
        found.problems += found.loaders[loader]
    except ConversionRefused as exc:
        found.problems.append(str(exc))
    return quantized


def _check_values(written: Checkpoint, quantized: Found, found: Verification, observer: Observer) -> None:
    done = 0
    for tensor in written:
        if tensor.name not in quantized.weights and tensor.dtype in ("F32", "F16", "BF16"):
            if not all(all_finite(piece, tensor.dtype) for piece in tensor.pieces(written.folder)):
                found.problems.append(f"{tensor.name}: holds a NaN or an infinity")
            found.tensors += 1
        done += tensor.nbytes
        observer.tell("reading", done, written.nbytes, tensor.name)


def _recipe_of(written: Checkpoint, receipt: dict[str, Any] | None, quantized: Found) -> Recipe:
    """The recipe in the receipt; without a receipt, the usual flow's with the checkpoint's own settings."""
    where = RECEIPT
    if receipt is not None:
        stated = receipt.get("recipe")
    else:
        where, config = written.folder.label, written.config
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        settings = {key: value for key, value in (quantized.settings or {"quant_type": "none"}).items() if value}
        stated = {"double_quant": False, "dtype": dtype, "merge_precision": "reference"} | settings
    try:
        recipe = Recipe.from_json(stated)
        if receipt is not None and stated != recipe.as_json():
            raise BadRecipe("it lacks some of its choices")
    except BadRecipe as exc:
        raise BadCheckpoint(f"{where}: its recipe can't be understood: {exc}") from exc
    return recipe

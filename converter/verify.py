"""Is this OUT whole, unchanged and loadable? And is it what its base and adapter give?

Works on what this tool made, and, as far as that goes, on any checkpoint that transformers and bitsandbytes wrote.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.errors import BadCheckpoint, BadRecipe, ConversionFailed, ConversionRefused, ConverterError
from converter.job import Reference
from converter.model.ask import check_output
from converter.observer import Progress
from converter.pipeline import convert_tensors, crew_of, one_thread
from converter.plan.decide import make_plan
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan, TensorPlan
from converter.quantize.format import Found, Output
from converter.quantize.formats import all_formats
from converter.read.checkpoint import Checkpoint
from converter.read.checksums import SUMS, read_sums
from converter.read.folder import LocalFolder
from converter.read.side_files import is_loaded
from converter.recipe import Recipe
from converter.resources import Resources
from converter.seal.production import Target
from converter.seal.receipt import RECEIPT, read_receipt
from converter.seal.staging import sha256_of
from converter.tensors import all_finite
from converter.tile import Encoding

_RECEIPT_SAYS, _SUMS_SAY = "the receipt says", f"{SUMS} says"


@dataclass
class Verification:
    """What was checked, and what is wrong."""

    problems: list[str] = field(default_factory=list)
    """One line each; empty: nothing was found."""
    files: int = 0
    """Files whose size and sha256 were compared with the receipt or SHA256SUMS."""
    tensors: int = 0
    """Tensors that were searched for NaN and infinity."""
    recomputed: int = 0
    """Tensors that were made again from base and adapter, and compared byte by byte."""
    has_receipt: bool = False

    @property
    def is_good(self) -> bool:
        return not self.problems


def verify(
    out: Path,
    base: Reference | None = None,
    adapter: Reference | None = None,
    *,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    sample: float = 1.0,
    resources: Resources = Resources(),
    device: str = "auto",
    offline: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Verification:
    """Look at a checkpoint: digests, structure, values; with `base` or `adapter`, make it again and compare.

    `sample` is the share of each shard's tensors that are made again, chosen by their names. Raises a
    `ConversionRefused` where there is nothing to look at: no folder, another base.
    """
    folder = LocalFolder(out)
    receipt = read_receipt(out)
    found = Verification(has_receipt=receipt is not None)
    _check_files(out, receipt, found)
    try:
        with Checkpoint(folder) as written:
            quantized = _check_structure(written, found)
            _check_values(written, quantized, found, progress)
            if base is not None or adapter is not None:
                with Inputs(base, adapter, base_revision, adapter_revision, offline=offline) as inputs:
                    recipe = _recipe_of(written, receipt, quantized)
                    plan = make_plan(inputs.base, inputs.adapter, recipe, resources, device=device)
                    inputs.fetch()
                    _compare(written, plan, inputs, sample, found, progress)
    except BadCheckpoint as exc:
        found.problems.append(str(exc))
    return found


def _check_files(out: Path, receipt: dict[str, Any] | None, found: Verification) -> None:
    """Compare files with the receipt; the receipt, and files that it doesn't list, with SHA256SUMS."""
    known = receipt["files"] if receipt is not None else {}
    stated = {name: (_RECEIPT_SAYS, file.get("sha256"), file.get("bytes")) for name, file in known.items()}
    # Names are looked up among what is there: a receipt may have any text for one.
    entries = list(os.scandir(out))
    there = {entry.name for entry in entries}
    sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file(follow_symlinks=False)}
    if receipt is not None or SUMS in there:
        for name, sha256 in _sums(out, there, found).items():
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


def _check_structure(written: Checkpoint, found: Verification) -> Found:
    """Find the quantized weights, in whatever format, and note what is wrong with them and what a loader would say."""
    quantized = Found()
    for one in (kind.find(written) for kind in all_formats()):
        quantized.weights |= one.weights
        quantized.parts |= one.parts
        quantized.settings = quantized.settings or one.settings
        found.problems += one.problems
    shapes = {name: tensor.shape for name, tensor in written.tensors.items() if name not in quantized.parts}
    try:
        found.problems += check_output(written.config, shapes | quantized.weights, quantized.weights)
    except ConversionRefused as exc:
        found.problems.append(str(exc))
    return quantized


def _check_values(
    written: Checkpoint,
    quantized: Found,
    found: Verification,
    progress: Callable[[Progress], None],
) -> None:
    done = 0
    for tensor in written:
        if tensor.name not in quantized.weights and tensor.dtype in ("F32", "F16", "BF16"):
            if not all(all_finite(piece, tensor.dtype) for piece in tensor.pieces(written.folder)):
                found.problems.append(f"{tensor.name}: holds a NaN or an infinity")
            found.tensors += 1
        done += tensor.nbytes
        progress(Progress("looking", done, written.nbytes, tensor.name))


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


class _Comparer:
    """Takes what a conversion would write, and compares it with what is there."""

    def __init__(self, written: Checkpoint, tensors: list[TensorPlan]) -> None:
        self._written = written
        self._outputs: dict[str, Output] = {output.name: output for t in tensors for output in t.outputs}
        self.different: dict[str, str] = {}

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        tensor = self._written.tensors.get(name)
        if tensor is None:
            return len(raw)  # its header is looked at, too
        there = bytearray(len(raw))
        if start + len(raw) > tensor.nbytes or (self._outputs[name].is_state and len(raw) != tensor.nbytes):
            self.different[name] = f"{tensor.nbytes:,} bytes, expected {max(start + len(raw), 1):,}"
        else:
            self._written.folder.read_into(tensor.file, tensor.offset + start, memoryview(there))
            if memoryview(there) != memoryview(raw):
                self.different.setdefault(name, "differs from what base and adapter give")
        return len(raw)


def _compare(
    written: Checkpoint,
    plan: Plan,
    inputs: Inputs,
    sample: float,
    found: Verification,
    progress: Callable[[Progress], None],
) -> None:
    chosen = _sample(plan, written, sample)
    tensors = [tensor for tensor in plan.tensors() if tensor.name in chosen]
    comparer = _Comparer(written, tensors)
    encoding = Encoding(plan)
    with one_thread(), crew_of(plan, encoding) as crew:
        total = sum(tensor.source.nbytes for tensor in tensors)
        done = 0
        adapter = inputs.adapter.folder if inputs.adapter is not None else None
        targets = ([Target(tensor, adapter, comparer)] for tensor in tensors)
        for _, made in convert_tensors(targets, inputs.base.folder, encoding, crew):
            if isinstance(made, ConverterError):
                raise made
            found.recomputed += 1
            done += made.nbytes
            progress(Progress("comparing", done, total, made.name))
    # With too little memory, CPython 3.11 was seen to end a loop early, without an error.
    if found.recomputed < len(tensors):
        count = f"{found.recomputed} of {len(tensors)}"
        raise ConversionFailed(f"only {count} tensors were made again: too little memory")
    planned = {output.name: output for tensor in plan.tensors() for output in tensor.outputs}
    different = comparer.different | _other_headers(written, planned)
    found.problems += [f"{name}: {what}" for name, what in sorted(different.items())]
    found.problems += [
        f"{name}: base and adapter give no such tensor" for name in sorted(written.tensors.keys() - planned.keys())
    ]


def _other_headers(written: Checkpoint, planned: Mapping[str, Output]) -> dict[str, str]:
    """Tensors that are missing, or that have another dtype or shape."""
    other: dict[str, str] = {}
    for name, output in planned.items():
        there = written.tensors.get(name)
        if there is None:
            other[name] = "missing"
        elif there.dtype != output.dtype or (there.shape != output.shape and not output.is_state):
            other[name] = f"{there.dtype} {list(there.shape)}, expected {output.dtype} {list(output.shape)}"
    return other


def _sample(plan: Plan, written: Checkpoint, share: float) -> set[str]:
    """The tensors to make again: of each shard at least one, and the same ones each time."""
    shards: dict[str, list[str]] = {}
    for tensor in plan.tensors():
        there = written.tensors.get(tensor.outputs[0].name)
        shards.setdefault(there.file if there is not None else "", []).append(tensor.name)
    chosen: set[str] = set()
    for names in shards.values():
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        chosen |= {*names[: math.ceil(share * len(names))]}
    return chosen

"""The functions for use from Python, with keyword arguments: `convert`, `plan_conversion`, `verify`, `evaluate`,
`summary`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from converter.calibration import SELF, Calibration
from converter.compare import Sources
from converter.errors import BadRecipe, ConversionRefused
from converter.evaluation import Evaluation, Measuring, evaluate_output
from converter.gates import Gates, QualityGates
from converter.job import Adapters, Job, Reference, RunOptions
from converter.layers.texts import Text, text_file
from converter.observer import Observer, Progress
from converter.pipeline import Report, convert_job, plan_job
from converter.plan.estimate import DryRun
from converter.provenance import provenance_problems
from converter.read.addresses import path_of
from converter.read.folder import LocalFolder
from converter.recipe import Recipe
from converter.resources import Resources
from converter.seal.receipt import RECEIPT, read_receipt
from converter.signing import signature_problems
from converter.verification import Checks, Verification, verify_output
from converter.write.stores.reading import as_folder


def convert(
    base: Reference | None,
    adapter: Adapters | None,
    out: Reference,
    recipe: Recipe = Recipe(),
    resources: Resources = Resources(),
    *,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    resume: bool = True,
    allow_pickle: bool = False,
    check_tiles: int = RunOptions.check_tiles,
    card: str = "",
    gates: Gates = Gates(),
    calibrate: Reference | None = None,
    work: Reference | None = None,
    disk: int | None = None,
    create_pr: bool = False,
    progress: Callable[[Progress], None] | bool = False,
    stop: Callable[[], int | None] = lambda: None,
) -> Report:
    """Merge an adapter into a base and write the result, quantized, as a checkpoint in the folder `out`, or in a store:
    `out` is then an address, hf://ORG/NAME, hf://ORG/NAME@BRANCH, s3://BUCKET/PREFIX, gs://… or az://…

    `base` and `adapter` are folders, ids on the Hub, or addresses of buckets; several adapters become one as
    `recipe.combine` says. Without `base`, the one that the adapter names is taken; without `adapter`, the base is
    quantized as it is.
    `device` is auto, cpu, cuda, cuda:0, … `overwrite` lets `out` be an earlier conversion. `out` appears only whole,
    and only if every tensor reaches the `gates`. `resume`: resume an interrupted run of the same job. `allow_pickle`:
    read pickled weights of a base or an adapter, as weights only. `progress`: True shows a bar in a terminal or a
    notebook, and elsewhere prints a line every ten seconds; a function is called at each step. `stop` is asked before
    each tile, and while the sha256 of the base is checked; once it gives the number of a signal, the conversion ends
    with `Interrupted`. `check_tiles`: of an accelerator's tiles, one in so many is made again on the CPU; 0: none.

    For a store: `work` is the folder in which files gather, and `create_pr` opens a pull request on the Hub instead of
    committing. Each shard is uploaded while the next one is made. `disk`: bytes that OUT and a base on the Hub may
    take of this machine's disk; the base's files are removed after their last tensor then, not kept in the Hub's cache.

    `calibrate`: a file of text, of JSON lines or a Parquet table, or such a file at hf://datasets/ORG/NAME/FILE, by
    which codes are chosen so that what the weights make of their real inputs is kept; `self`: by a text that the merged
    model writes. `recipe.calibration` says how much of it is read, and in which windows.

    Raises a `ConversionRefused` before anything is written, a `ConversionFailed` after.
    """
    path, store = _out(out)
    recipe, text = _calibrated(recipe, calibrate, offline)
    job = Job(path, adapter, base, recipe, base_revision, adapter_revision, card, gates, store, text)
    options = RunOptions(resources, device, overwrite, offline, trust_remote_code, resume, allow_pickle, check_tiles)
    options = replace(options, work=None if work is None else Path(work), disk=disk, create_pr=create_pr)
    if progress is False:
        return convert_job(job, options, Observer(stop=stop))
    if progress is not True:
        return convert_job(job, options, Observer(progress, stop))
    from converter.cli.show.progress import display

    with display("bar" if _in_a_notebook() else "auto") as shown:
        return convert_job(job, options, Observer(shown.progress, stop))


def plan_conversion(
    base: Reference | None,
    adapter: Adapters | None,
    out: Reference | None = None,
    recipe: Recipe = Recipe(),
    resources: Resources = Resources(),
    *,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    calibrate: Reference | None = None,
    work: Reference | None = None,
    disk: int | None = None,
    create_pr: bool = False,
) -> DryRun:
    """What `convert` would do with the same arguments: its plan, and its refusals.

    Nothing is written, and of a base on the Hub no shard is downloaded. The estimate of the time comes from short
    samples of reading and computing.
    """
    path, store = _out(out or "")
    recipe, text = _calibrated(recipe, calibrate, offline)
    job = Job(path, adapter, base, recipe, base_revision, adapter_revision, store=store, text=text)
    options = RunOptions(resources, device, overwrite, offline, trust_remote_code, allow_pickle=allow_pickle)
    options = replace(options, work=None if work is None else Path(work), disk=disk, create_pr=create_pr)
    return plan_job(job, options, with_out=out is not None)


def verify(
    out: Reference,
    base: Reference | None = None,
    adapter: Adapters | None = None,
    *,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    compare: bool = False,
    calibrate: Reference | None = None,
    require_receipt: bool = False,
    gates: Gates = Gates(),
    sample: float = 1.0,
    resources: Resources = Resources(),
    device: str = "auto",
    offline: bool = False,
    allow_pickle: bool = False,
    signature: Reference | None = None,
    public_key: Reference | None = None,
    provenance: Reference | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Verification:
    """Check a checkpoint: digests, structure, values. With `base` or `adapter`, make it again and compare.

    `out` is a folder, hf://ORG/NAME[@REVISION] or s3://BUCKET/PREFIX; the last two are downloaded for it and removed.
    Of base and adapter, the one that isn't given is taken from the receipt if that names it; `compare`: both are.
    `calibrate`: the text by which it was calibrated, unless the model wrote it. `sample` is the share of each shard's
    tensors that are made again, chosen by their names. `require_receipt`: having no receipt is a problem. The figures
    of the tensors that aren't made again are those of the receipt; all must reach the `gates`. `signature` and
    `public_key` are files, as `convert sign` takes and writes them, `provenance` one as `convert provenance` writes it:
    what they say otherwise is a problem.

    Raises a `ConversionRefused` if `out` is no checkpoint, `Undecided` if something that is needed can't be had.
    """
    if (signature is None) != (public_key is None):
        raise BadRecipe("`signature` and `public_key` go together: give both")
    sources = None
    if base is not None or adapter is not None or compare or calibrate is not None:
        text = None if calibrate is None else text_file(calibrate, offline=offline)
        sources = Sources(base, adapter, base_revision, adapter_revision, text=text)
    options = RunOptions(resources, device, offline=offline, allow_pickle=allow_pickle)
    observer, checks = Observer(progress), Checks(sources, sample, gates, require_receipt)
    with as_folder(os.fspath(out), offline=offline, tell=partial(observer.tell, "fetching")) as folder:
        found = verify_output(folder, checks, options, observer)
        if signature is not None and public_key is not None:
            found.problems += signature_problems(folder, Path(signature), Path(public_key))
        if provenance is not None:
            found.problems += provenance_problems(folder, Path(provenance))
        return found


def evaluate(
    out: Reference,
    text: Reference,
    base: Reference | None = None,
    adapter: Adapters | None = None,
    *,
    field: str | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "float32",
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    compare: bool = False,
    gates: QualityGates = QualityGates(),
    memory: int | None = None,
    scratch: Reference | None = None,
    device: str = "auto",
    offline: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
) -> Evaluation:
    """Measure how well a checkpoint predicts a text: its perplexity. With `base` or `adapter`, also how far it is from
    the 16-bit model: perplexity ratio, KL divergence, top-1 agreement, and whether these reach the `gates`.

    One layer is in memory at a time. `text` is a file of text, or of JSON lines, or a Parquet table, whose `field` is a
    text or a list of messages; or such a file in a dataset, at hf://datasets/ORG/NAME[@REVISION]/FILE. It is
    cut into windows of `window` tokens, by default 2048, or as many as the model takes; after `max_tokens`, no other
    window begins. `dtype` is what is computed in: float32, bfloat16, float16. `compare`: base and adapter are those
    that the receipt names. `memory`, in bytes, is for activations and logits; activations that don't fit are in a file
    in the folder `scratch`.

    Raises a `ConversionRefused` if something can't be had or can't be run a layer at a time.
    """
    sources = None
    if base is not None or adapter is not None or compare:
        sources = Sources(base, adapter, base_revision, adapter_revision)
    measuring = Measuring(
        Text.at(text, field, offline=offline),
        window,
        max_tokens,
        dtype,
        memory,
        None if scratch is None else Path(scratch),
        gates,
    )
    options = RunOptions(device=device, offline=offline, allow_pickle=allow_pickle)
    return evaluate_output(out, measuring, sources, options, Observer(progress, stop))


def summary(out: Reference) -> dict[str, Any]:
    """The summary at the head of an output's receipt: counts of tensors, mean and worst error and survival, bytes.

    `ConversionRefused` for an output that has no receipt with one.
    """
    receipt = read_receipt(LocalFolder(Path(out).expanduser()).path)
    found = None if receipt is None else receipt.get("summary")
    if not isinstance(found, dict):
        raise ConversionRefused(f"{Path(out)}: no {RECEIPT} with a summary; convert it anew")
    return found


def _calibrated(recipe: Recipe, text: Reference | None, offline: bool) -> tuple[Recipe, Path | None]:
    """The recipe, which calibrates by a text if one is given, and the text's file."""
    if text is None:
        return recipe, None
    if os.fspath(text) == SELF:
        return recipe if recipe.calibration is not None else replace(recipe, calibration=Calibration(SELF)), None
    file = text_file(text, offline=offline)
    if recipe.calibration is None:
        recipe = replace(recipe, calibration=Calibration.of(file))
    return recipe, file


def _out(out: Reference) -> tuple[Path, str | None]:
    """OUT as a path and, if it lies in a store, as the store's address."""
    place = os.fspath(out)
    path = path_of(place)
    return (Path(place), place) if path is None else (path, None)


def _in_a_notebook() -> bool:
    return "ipykernel" in sys.modules

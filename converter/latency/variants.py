"""The models that are compared: base with the adapter beside it, the merged model in 16 bits, and the output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.compare import Sources
from converter.errors import Unsupported
from converter.evaluation import as_made
from converter.job import Job, RunOptions
from converter.latency.measure import MERGED, OUTPUT, UNMERGED, Variant
from converter.observer import Observer
from converter.pipeline import convert_job
from converter.plan.adapters import wanted
from converter.plan.inputs import Inputs
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder


@dataclass(frozen=True)
class About:
    """What the output's config says."""

    kind: str
    """nf4, fp4, int8, …: what its weights are in, or 16 bits."""
    dtype: str
    vocabulary: int
    config: dict[str, Any]

    @classmethod
    def of(cls, out: Path) -> About:
        """`Unsupported` if it doesn't say how many tokens it knows."""
        with Checkpoint(LocalFolder(out)) as written:
            config = dict(written.config)
        text = config.get("text_config")
        parts = [config, text if isinstance(text, dict) else {}]
        sizes = [part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)]
        if not sizes or sizes[0] < 2:
            raise Unsupported(f"{out}: config.json has no vocab_size, so there is nothing to ask of the model")
        stated = [part.get(name) for part in parts for name in ("dtype", "torch_dtype")]
        dtype = "float16" if "float16" in stated else "bfloat16"
        return cls(_kind_of(config), dtype, sizes[0], config)


def _kind_of(config: dict[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return "16 bits"
    if quantization.get("load_in_8bit"):
        return "int8"
    found = quantization.get("bnb_4bit_quant_type") or quantization.get("format") or quantization.get("quant_method")
    return str(found)


@dataclass(frozen=True)
class Prepared:
    """The variants that can be measured, and why the others can't."""

    variants: tuple[Variant, ...]
    why_not: dict[str, str]
    nbytes: int
    """Of the base."""


@contextmanager
def prepared(
    out: Path, against: Sources, scratch: Path | None, options: RunOptions, observer: Observer
) -> Iterator[Prepared]:
    """The variants of an output, as its receipt says it was merged. The merged one lies in a folder below `scratch`,
    by default the system's, until the end."""
    recipe, sources = as_made(out, against)
    revisions = sources.base_revision, sources.adapter_revision
    with ExitStack() as stack:
        adapter = wanted(sources.adapter, recipe.combine)
        inputs = stack.enter_context(Inputs(sources.base, adapter, *revisions, **options.of_inputs()))
        inputs.bring(observer.tell, observer.stop)
        base = inputs.base.folder.path
        assert base is not None  # noqa: S101  (`bring` has fetched it)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix="benchmark-")))
        merged = place / "merged"
        convert_job(Job(merged, sources.adapter, sources.base, recipe, *revisions), options, observer)
        variants = [Variant(MERGED, merged), Variant(OUTPUT, out)]
        nbytes = inputs.base.nbytes
        beside = inputs.adapter.folder.path if inputs.adapter is not None else None
        if beside is not None and recipe.combine is None:
            yield Prepared((Variant(UNMERGED, base, beside), *variants), {}, nbytes)
        else:
            why = _why_merged_only(inputs, several=recipe.combine is not None)
            yield Prepared(tuple(variants), {UNMERGED: why}, nbytes)


def _why_merged_only(inputs: Inputs, *, several: bool) -> str:
    if inputs.adapter is None:
        return "there is no adapter"
    return "several adapters become one when they are merged" if several else "the adapter is not in PEFT's form"

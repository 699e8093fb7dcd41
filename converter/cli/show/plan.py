"""The plan of a conversion, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from converter.cli.show.words import amount, duration, loader_lines, table, text_of
from converter.plan.estimate import WRITE_RATE, DryRun, Estimate
from converter.plan.plan import TensorPlan


def plan_text(dry_run: DryRun, *, verbose: bool = False) -> str:
    """The plan as a table: alike tensors in one line, or every tensor."""
    plan = dry_run.plan
    rows: list[tuple[str, ...]] = [("tensors", "", "shape", "from", "to", "what happens")]
    rows += [_plan_row(tensors) for tensors in _alike(plan.tensors(), one_by_one=verbose)]
    lines = table(rows)
    lines += [""]
    lines += [f"note: {note}" for note in plan.notes]
    lines += loader_lines(plan.loaders)
    skipped = (plan.config.get("quantization_config") or {}).get("llm_int8_skip_modules")
    if skipped:
        lines.append(
            f"kept in 16 bits, by name in the config: {', '.join(skipped[:6])}{' …' if len(skipped) > 6 else ''}"
        )
    files = f"{len(plan.shards)} shard{'s' if len(plan.shards) > 1 else ''}"
    disk = plan.output_bytes if dry_run.disk is None else dry_run.disk
    lines += [
        f"{plan.class_name}, {plan.recipe.quant_type}, {plan.recipe.dtype}, merged in {plan.recipe.merge_precision}",
        f"read {amount(plan.base_bytes)}, write at most {amount(plan.output_bytes)} in {files}, "
        f"and beside them {', '.join(side.name for side in plan.side_files) or 'no other files'}",
        f"memory: at most {amount(plan.memory)} above the libraries; disk: {amount(disk)}",
        times(dry_run.estimate),
        "dry run: nothing would be done, for OUT is this very conversion, finished"
        if dry_run.nothing_to_do
        else "dry run: nothing was written",
    ]
    return text_of(lines)


def times(found: Estimate) -> str:
    read, compute, write = (duration(seconds) for seconds in (found.read, found.compute, found.write))
    return (
        f"time: about {duration(found.seconds)}: reading {read} and computing {compute} by samples taken now, "
        f"writing {write} to a disk that takes {amount(WRITE_RATE)}/s; they overlap"
        + (f"; before them the sha256 of the base, {duration(found.check)}" if found.check else "")
        + (f"; writing the text reads the base {found.passes} times, {duration(found.write_text)}" * bool(found.passes))
        + (f"; calibrating {duration(found.calibrate)}" if found.calibrate else "")
    )


@dataclass(frozen=True)
class _Likeness:
    name: str
    what: str
    shape: tuple[int, ...]
    source: str
    target: str


def _likeness(tensor: TensorPlan) -> _Likeness:
    what = []
    if tensor.origin == "adapter":
        what.append("replaced by the adapter's")
    if tensor.change is not None and tensor.change.label:
        what.append(tensor.change.label)
    if tensor.action == "quantize":
        what.append("quantize" + (", transposed" if tensor.transpose else ""))
    else:
        what.append("copy" if tensor.is_copy else "keep")
    target = tensor.outputs[0].dtype if tensor.action == "keep" else "quantized"
    return _Likeness(re.sub(r"\d+", "*", tensor.name), ", ".join(what), tensor.shape, tensor.source.dtype, target)


def _alike(tensors: Iterator[TensorPlan], *, one_by_one: bool) -> Iterator[list[TensorPlan]]:
    if one_by_one:
        yield from ([tensor] for tensor in tensors)
        return
    order = sorted(tensors, key=lambda tensor: (_likeness(tensor).name, repr(_likeness(tensor))))
    for _, group in groupby(order, key=_likeness):
        yield list(group)


def _plan_row(tensors: list[TensorPlan]) -> tuple[str, ...]:
    like = _likeness(tensors[0])
    name = like.name if len(tensors) > 1 else tensors[0].name
    shape = " × ".join(map(str, like.shape)) or "scalar"
    return name, f"× {len(tensors)}" if len(tensors) > 1 else "", shape, like.source, like.target, like.what

"""Make an output again from its base and adapter, in memory, and compare it byte by byte with what is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from converter.calibrate import Calibrator, Result
from converter.errors import BadCheckpoint, BadRecipe, ConversionFailed, ConverterError, Interrupted, Undecided
from converter.job import Adapters, Reference, RunOptions
from converter.observer import Observer
from converter.pipeline import convert_tensors, crew_of
from converter.plan.adapters import wanted
from converter.plan.decide import make_plan
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan, TensorPlan
from converter.quantize.format import Output
from converter.quantize.measure import Fidelity
from converter.read.checkpoint import Checkpoint
from converter.recipe import Recipe
from converter.seal.production import Target
from converter.threads import one_thread
from converter.tile import Encoding
from converter.write.journal import Sampled

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Base and adapter that an output is compared with."""

    base: Reference | None = None
    adapter: Adapters | None = None
    base_revision: str | None = None
    adapter_revision: str | None = None
    origin: Mapping[str, Any] | None = None
    """What the output's receipt says of them, if it has one."""
    text: Path | None = None
    """The text by which the output was calibrated."""

    def completed(self) -> Sources:
        """With what isn't given taken from the receipt. `Undecided` if that has no name for it."""
        whole, origin = self, self.origin or {}
        if self.adapter is None and origin.get("adapter") is not None:
            if not isinstance(name := origin.get("adapter_name"), str):
                raise Undecided(
                    "made with an adapter that has no name in the receipt, as it was a folder: give `adapter`"
                )
            revision = self.adapter_revision or text_or_none(origin.get("adapter_commit"))
            whole = replace(whole, adapter=name, adapter_revision=revision)
        if self.base is None:
            if isinstance(name := origin.get("base_name"), str):
                revision = self.base_revision or text_or_none(origin.get("base_commit"))
                whole = replace(whole, base=name, base_revision=revision)
            elif whole.adapter is None:  # else the adapter may name it
                raise Undecided("made from a base that has no name in the receipt, as it was a folder: give `base`")
        return whole


def compare_with(
    written: Checkpoint,
    recipe: Recipe,
    given: Sources,
    options: RunOptions = RunOptions(),
    sample: float = 1.0,
    observer: Observer = Observer(),
) -> tuple[list[str], dict[str, Fidelity]]:
    """Make a share of each shard's tensors again, chosen by their names: the problems, and the figures of each.

    Raises `Undecided` if base or adapter can't be had or can't be converted.
    """
    sources = given.completed()
    if recipe.calibration is None and given.text is not None:
        raise BadRecipe("`calibrate`: no text calibrated this output, by its receipt; leave it out")
    if recipe.calibration is not None and recipe.calibration.is_self and given.text is not None:
        raise BadRecipe(
            "`calibrate`: no text of yours calibrated this output, but one that the model wrote: leave it out"
        )
    if recipe.calibration is not None and not recipe.calibration.is_self and given.text is None:
        raise Undecided(
            f"calibrated by a text, of which the sha256 begins with {recipe.calibration.text[:12]}: give its file as "
            "`calibrate`"
        )
    try:
        with Inputs(
            sources.base,
            wanted(sources.adapter, recipe.combine),
            sources.base_revision,
            sources.adapter_revision,
            **options.of_inputs(),
        ) as inputs:
            plan = make_plan(inputs.base, inputs.adapter, recipe, **options.of_plan())
            problems = _another_adapter(plan, given)
            inputs.bring(observer.tell, observer.stop)
            different, made = _made_again(written, plan, inputs, given, sample, observer)
    except (Undecided, Interrupted):
        raise
    except ConverterError as exc:
        raise Undecided(f"not compared with base and adapter: {exc}") from exc
    return problems + different, made


def _another_adapter(plan: Plan, given: Sources) -> list[str]:
    recorded = (given.origin or {}).get("adapter")
    if given.origin is None or recorded == plan.adapter_digest:
        return []
    if given.adapter is None:
        raise Undecided("the adapter that the receipt names is not the one that was merged in: give `adapter`")
    was = "none" if recorded is None else f"sha256 {str(recorded)[:12]}…"
    return [
        f"adapter: not the one that was merged in, by the receipt ({was}, this one {plan.adapter_digest or '':.12}…)"
    ]


def _made_again(
    written: Checkpoint, plan: Plan, inputs: Inputs, given: Sources, sample: float, observer: Observer
) -> tuple[list[str], dict[str, Fidelity]]:
    chosen = _sample(plan, written, sample)
    tensors = [tensor for tensor in plan.tensors() if tensor.name in chosen]
    recorded = (given.origin or {}).get("base")
    recorded = recorded if isinstance(recorded, dict) else {}  # of a base on the Hub: by file, not by tensor
    comparer = _Comparer(written, tensors)
    encoding = Encoding(plan)
    foreign = 0
    figures = {}
    with one_thread(), crew_of(plan, encoding) as crew:
        total = sum(tensor.source.nbytes for tensor in tensors)
        done = 0
        adapter = inputs.adapter.folder if inputs.adapter is not None else None
        making = _MadeAgain(written, [Target(tensor, adapter, comparer) for tensor in tensors])

        def convert(targets: Iterable[Sequence[Target]]) -> Iterator[Result]:
            return convert_tensors(targets, inputs.base.folder, encoding, crew, observer)

        if plan.recipe.calibration is None:
            results = convert(making.targets())
        else:
            results = Calibrator(plan, inputs, given.text, encoding, observer).run(making, convert)
        for target, made in all_of(results, len(tensors)):
            if isinstance(made, ConverterError):
                raise made
            foreign += target.tensor.origin == "base" and recorded.get(made.name, made.digest) != made.digest
            figures[made.name] = made.fidelity
            done += made.nbytes
            observer.tell("comparing", done, total, made.name)
    problems = []
    if foreign:
        if given.base is None:
            raise Undecided("the base that the receipt names is not the one that was converted: give `base`")
        problems.append(f"base: {foreign} of {len(tensors)} tensors are not those that were converted, by the receipt")
    planned = {output.name: output for tensor in plan.tensors() for output in tensor.outputs}
    different = comparer.different | _other_headers(written, planned)
    problems += [f"{name}: {what}" for name, what in sorted(different.items())]
    extra = sorted(written.tensors.keys() - planned.keys())
    return problems + [f"{name}: base and adapter give no such tensor" for name in extra], figures


def all_of(results: Iterable[Result], count: int) -> Iterator[Result]:
    """So many results; `ConversionFailed` if there are fewer.

    With too little memory, CPython 3.11 was seen to end a loop early, without an error.
    """
    made = 0
    for result in results:
        made += 1
        yield result
    if made < count:
        raise ConversionFailed(f"only {made} of {count} tensors were made again: too little memory")


class _MadeAgain:
    """The tensors that are made again. Where one is asked for that isn't, or is already, what is written is taken."""

    def __init__(self, written: Checkpoint, targets: Iterable[Target]) -> None:
        self._written = written
        self._left = {target.tensor.name: target for target in targets}

    def targets(self) -> Iterator[list[Target]]:
        for name in list(self._left):
            yield [self._left.pop(name)]

    def target(self, name: str) -> Target | None:
        return self._left.pop(name, None)

    @property
    def sampled(self) -> None:
        """The model writes its text again."""

    def note_sampled(self, _: Sampled) -> None:
        pass

    def written(self, tensor: TensorPlan) -> dict[str, bytes]:
        found = {}
        for output in tensor.outputs:
            there = self._written.tensors.get(output.name)
            if there is None:
                raise BadCheckpoint(f"{output.name}: missing, and what comes after it can't be made again without it")
            raw = bytearray(there.nbytes)
            self._written.folder.read_into(there.file, there.offset, memoryview(raw))
            found[output.name] = bytes(raw)
        return found


class _Comparer:
    """Takes what a conversion would write, and compares it with what is there."""

    def __init__(self, written: Checkpoint, tensors: list[TensorPlan]) -> None:
        self._written = written
        self._outputs: dict[str, Output] = {output.name: output for t in tensors for output in t.outputs}
        self.different: dict[str, str] = {}

    def write(self, name: str, start: int, raw: bytes | memoryview) -> int:
        tensor = self._written.tensors.get(name)
        if tensor is None:
            return len(raw)  # its header is compared, too
        there = bytearray(len(raw))
        if start + len(raw) > tensor.nbytes or (self._outputs[name].is_state and len(raw) != tensor.nbytes):
            self.different[name] = f"{tensor.nbytes:,} bytes, expected {max(start + len(raw), 1):,}"
        else:
            self._written.folder.read_into(tensor.file, tensor.offset + start, memoryview(there))
            if memoryview(there) != memoryview(raw):
                self.different.setdefault(name, "differs from what base and adapter give")
        return len(raw)


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


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None

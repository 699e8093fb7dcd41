"""The conversion: for each output shard, for each tensor, for each tile of rows: read, merge, quantize, write.

Start reading here.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from converter.calibrate import Calibrator, Result
from converter.effect import Comparison, may_be_without_effect, without_change
from converter.errors import BadRecipe, ConverterError, GateFailed, NoEffect
from converter.gates import in_words, report_of
from converter.job import Job, RunOptions
from converter.observer import Observer
from converter.plan.decide import make_plan
from converter.plan.estimate import DryRun, estimate
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan
from converter.quantize.agreement import Agreement, total_of
from converter.quantize.measure import Fidelity
from converter.read.digests import remember_digests
from converter.read.folder import Folder
from converter.read.side_files import read_side_files
from converter.seal.card import CardOf, metadata_of, model_card
from converter.seal.destination import BASE, Place, already_made
from converter.seal.production import Made, Production, Target
from converter.seal.published import Published, place_of
from converter.seal.receipt import CARD, GATES, fidelity_of, fingerprint, origin_of, read_receipt, summary_of
from converter.seal.staging import Staging
from converter.supply import arrives, room_for, supplied
from converter.telling import telling
from converter.tensors import torch_device
from converter.threads import Crew, one_thread
from converter.tile import Conversion, Encoding, convert_tile, open_tensor, read_tile, spans_of_part, survey_tile
from converter.write.journal import job_of


@dataclass(frozen=True)
class Stored:
    """An output that lies in a store."""

    address: str
    """As the user gave it."""
    seen_at: str
    """Where to look at it: on the Hub, the commit or the pull request."""
    nbytes: int
    """Of its shards."""
    receipt: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Report:
    """What a conversion did."""

    out: Path
    plan: Plan
    fingerprint: str
    fidelity: dict[str, Fidelity]
    """By tensor name. Empty if there was nothing to do."""
    nothing_to_do: bool = False
    """Whether OUT already was a finished conversion of the same inputs by the same recipe."""
    store: Stored | None = None
    """Where OUT lies, if that is no folder of this machine."""
    checked: dict[str, dict[str, str]] = field(default_factory=dict)
    """base or adapter → weights file → who stated the sha256 that it has: `checksums.HUB`, `CACHE`, `DOWNLOAD` or
    `SUMS`. Files without a known sha256 are absent."""
    agreement: Agreement | None = None
    """Of the tiles that an accelerator made and the CPU made again; None on a CPU."""

    @property
    def summary(self) -> dict[str, Any]:
        """Counts of tensors, mean and worst error and survival: as at the head of the receipt, without bytes."""
        return summary_of(self.plan, self.fidelity)

    @property
    def label(self) -> str:
        """OUT as the user gave it."""
        return str(self.out) if self.store is None else self.store.address

    @property
    def output_bytes(self) -> int:
        """Bytes of the shards."""
        if self.store is not None:
            return self.store.nbytes
        return sum(path.stat().st_size for path in self.out.glob("*.safetensors"))

    def __repr__(self) -> str:
        if self.nothing_to_do:
            return f"Report({self.label!r}: nothing to do)"
        found = self.summary
        parts = [f"{count} {what}" for what, count in found["tensors"].items() if count]
        for key, said in (("relative_error", "error"), ("survival", "survival")):
            if found[key] is not None:
                parts.append(f"{said} {found[key]['mean']:.4f}")
        return f"Report({self.label!r}: {', '.join(parts)})"

    def _repr_html_(self) -> str | None:
        """For notebooks: the head of the report of what lies at `out`."""
        from converter.page import head

        receipt = self.store.receipt if self.store is not None else read_receipt(self.out)
        return None if receipt is None else head(receipt)


def convert_job(job: Job, options: RunOptions = RunOptions(), observer: Observer = Observer()) -> Report:
    """Merge an adapter into a base and write the result: `converter.convert`, from values."""
    with Inputs.of(job, options) as inputs:
        if inputs.adapter is None:
            job.gates.refuse_without_adapter()
        before = inputs.identities()
        plan = make_plan(inputs.base, inputs.adapter, job.recipe, **options.of_plan())
        encoding = Encoding(plan, options.open_device(plan.device), options.check_tiles)
        destination = place_of(job, options, inputs.folders, observer.stop, telling(job))
        if (known := already_made(destination, plan, inputs, encoding.device.place.type)) is not None:
            job.gates.hold(_figures(destination), destination.label)
            return Report(job.out, plan, known, {}, nothing_to_do=True, store=_stored(destination))
        destination.refuse_if_taken()
        room = room_for(destination, plan, inputs, options.disk)
        destination.refuse_if_too_full(room.of_base + room.of_out)
        if plan.beforehand:
            observer.tell("planned", 0, plan.base_bytes, plan.beforehand)
        is_calibrated = plan.recipe.calibration is not None
        if is_calibrated and options.disk is not None and room.is_limited:
            raise BadRecipe("`disk` is for a base that is read once, and `calibrate` reads it twice: leave one out")
        is_whole = is_calibrated or not arrives(inputs)
        if is_whole:
            inputs.bring(observer.tell, observer.stop)
        before = inputs.identities() | before  # what was fetched, and what the plan is of
        calibrator = Calibrator(plan, inputs, job.text, encoding, observer) if is_calibrated else None

        files, kept = [shard.file for shard in plan.shards], {BASE} if room.is_limited else ()
        staging = Staging(destination, job_of(plan, inputs), files, resume=options.resume, keep=kept)
        plan = replace(plan, notes=plan.notes + staging.notes)
        with Production(plan, inputs.adapter.folder if inputs.adapter else None, staging) as output, one_thread():
            with (
                inputs.unchanged(before),
                supplied(inputs, output, room, observer, whole=is_whole) as supply,
                crew_of(plan, encoding) as crew,
            ):

                def convert(targets: Iterable[Sequence[Target]]) -> Iterator[Result]:
                    return convert_tensors(targets, supply.folder, encoding, crew, observer)

                one_by_one = chain.from_iterable(map(convert, supply.stretches(output.targets())))
                for target, made in one_by_one if calibrator is None else calibrator.run(output, convert):
                    if isinstance(made, ConverterError):
                        raise made
                    output.note(made)
                    supply.made(target.tensor.name)
                    observer.tell("converting", output.done, plan.base_bytes, target.tensor.name)

            observer.tell("sealing", plan.base_bytes, plan.base_bytes, plan.shards[-1].file)
            digests = {name: tensor.digest for name, tensor in output.made.items()}
            remember_digests(inputs.base, {t.name: digests[t.name] for t in plan.tensors() if t.origin == "base"})
            return replace(seal(output, inputs, digests, job), store=_stored(destination))


def _stored(place: Place) -> Stored | None:
    """Where an output lies that was published."""
    if not isinstance(place, Published) or place.receipt is None:
        return None
    return Stored(place.label, place.seen_at, place.receipt["summary"]["bytes"]["output"], place.receipt)


def seal(output: Production, inputs: Inputs, digests: Mapping[str, str], job: Job) -> Report:
    """Seal an output whose tensors are all made. `digests`: xxh3-128 of the base's tensors."""
    plan = output.plan
    origin = origin_of(plan, inputs, torch_device(plan.device).type, digests)
    fidelity = {tensor.name: output.made[tensor.name].fidelity for tensor in plan.tensors()}
    adapter = inputs.adapter.folder if inputs.adapter else None
    if may_be_without_effect(plan, fidelity) and output.staging.is_thinned:
        raise NoEffect(
            f"{job.label}: nothing shows that the adapter's change survives in any tensor, and the values of finished "
            "shards are gone from this disk, so they can't be compared with the base's. Check lora_alpha and the "
            "adapter's values, or convert to a folder"
        )
    if may_be_without_effect(plan, fidelity) and plan.recipe.calibration is not None:
        raise NoEffect(
            f"{job.label}: nothing shows that the adapter's change survives in any tensor. Check lora_alpha and the "
            "adapter's values, or convert without `calibrate`, where output and base can be compared"
        )
    if may_be_without_effect(plan, fidelity) and not _has_effect(output, inputs.base.folder, adapter):
        rounded = plan.recipe.dtype if plan.recipe.quant_type == "none" else plan.recipe.quant_type
        raise NoEffect(
            f"{job.label}: what the adapter changes is not zero, but rounding to {rounded} takes all of it away: the "
            "output would equal the base. Check lora_alpha and the values of the adapter's tensors"
        )
    if misses := job.gates.misses(fidelity):
        found = json.dumps(report_of(job.gates, misses), indent=2, sort_keys=True)
        receipt = output.staging.receipt(plan, origin, fidelity)
        output.staging.put(GATES, f"{found}\n".encode())
        failed = GateFailed(f"{job.label}: {in_words(misses)}; {output.staging.folder / GATES} lists them")
        failed.staging, failed.receipt = str(output.staging.folder), json.loads(receipt)
        raise failed
    cards = CardOf(metadata_of(inputs.folder_of("base")), metadata_of(adapter), job.card)
    side_files = read_side_files(plan.side_files, inputs.folder_of) | {CARD: model_card(plan, origin, fidelity, cards)}
    agreement = total_of(output.made[tensor.name].agreement for tensor in plan.tensors())
    output.staging.seal(plan, origin, side_files, fidelity, agreement)
    return Report(job.out, plan, fingerprint(plan, origin), fidelity, checked=inputs.checked, agreement=agreement)


def _has_effect(output: Production, base: Folder, adapter: Folder | None) -> bool:
    """Whether a tensor that the adapter changes is another one than the base alone gives. They are made again."""
    with Comparison(output) as written, crew_of(output.plan, encoding := Encoding(output.plan)) as crew:
        targets = ([Target(without_change(one), adapter, written)] for one in output.plan.tensors() if one.is_touched)
        for _, made in convert_tensors(targets, base, encoding, crew):
            if isinstance(made, ConverterError):
                raise made
            if written.differs:
                return True
    return False


def _figures(made: Place) -> dict[str, Fidelity]:
    """Of an output that is made already; none that are altogether wrong."""
    try:
        return fidelity_of(made.receipt or {})
    except ValueError:
        return {}


def plan_job(job: Job, options: RunOptions = RunOptions(), *, with_out: bool = True) -> DryRun:
    """What `convert_job` would do: `converter.plan_conversion`, from values. `with_out`: whether to check OUT, too."""
    with Inputs.of(job, options) as inputs:
        plan = make_plan(inputs.base, inputs.adapter, job.recipe, **options.of_plan())
        if with_out:
            destination = place_of(job, options, inputs.folders)
            if already_made(destination, plan, inputs, torch_device(plan.device).type) is not None:
                return DryRun(plan, estimate(plan, inputs.base), nothing_to_do=True)
            destination.refuse_if_taken()
            room = room_for(destination, plan, inputs, options.disk)
            destination.refuse_if_too_full(room.of_base + room.of_out)
            plan = replace(plan, notes=plan.notes + room.notes)
            if isinstance(destination, Published):
                notes = (
                    f"OUT lies in {destination.label}; its files gather in {destination.staging}",
                    destination.note,
                )
                plan = replace(plan, notes=plan.notes + tuple(filter(None, notes)))
            return DryRun(plan, estimate(plan, inputs.base), disk=room.of_base + room.of_out)
        return DryRun(plan, estimate(plan, inputs.base), disk=plan.output_bytes)


def convert_tensors(
    tensors: Iterable[Sequence[Target]],
    base: Folder,
    encoding: Encoding,
    crew: Crew,
    observer: Observer = Observer(),
) -> Iterator[Result]:
    """Convert tensors and write them, in order. Tiles are read here, one after the other; the crew converts them.

    Each element of `tensors` says what becomes of one tensor, in one output or in several; its tiles are read once for
    all of them. Where one output fails, its error comes in place of what was made.
    """
    under_way: deque[_UnderWay] = deque()
    for targets in tensors:
        tensor = targets[0].tensor
        folder = base if tensor.origin == "base" else targets[0].adapter
        assert folder is not None  # noqa: S101  (what comes from an adapter has one)
        current = _UnderWay([Conversion(target, encoding) for target in targets])
        under_way.append(current)
        opened = open_tensor(tensor, folder)
        for raw in opened.raw:
            current.digest.update(raw)
        for conversion in current.conversions:
            _find_largest(conversion, base, crew, observer)
        if any(conversion.surveys for conversion in current.conversions):
            for start, end in tensor.spans():
                observer.stop_if_asked(f"{tensor.name} was made")
                buffers = crew.buffers()
                tile, _ = read_tile(tensor, opened, start, end, buffers)
                crew.submit(buffers, survey_tile, current.conversions, tile).result()
        for start, end in tensor.spans():
            observer.stop_if_asked(f"{tensor.name} was made")
            buffers = crew.buffers()
            tile, raw = read_tile(tensor, opened, start, end, buffers)
            current.digest.update(raw)
            current.tiles.append(crew.submit(buffers, convert_tile, current.conversions, tile))
        while under_way and under_way[0].is_done():
            yield from under_way.popleft().finish()
    while under_way:
        yield from under_way.popleft().finish()


def _find_largest(conversion: Conversion, base: Folder, crew: Crew, observer: Observer) -> None:
    """Find the largest value of all weights that share a scale with a tensor, if it isn't known yet."""
    target = conversion.target
    found: list[Future[float]] = []
    for part, merge in conversion.unseen():
        folder = base if part.origin == "base" else target.adapter
        assert folder is not None  # noqa: S101  (what comes from an adapter has one)
        opened = open_tensor(part, folder)
        for start, end in spans_of_part(part, target.tensor):
            observer.stop_if_asked(f"{target.tensor.name} was made")
            buffers = crew.buffers()
            tile, _ = read_tile(part, opened, start, end, buffers)
            found.append(crew.submit(buffers, conversion.largest_of, part, merge, tile))
        wait(found)
    if found:
        conversion.note_largest(found)


@dataclass
class _UnderWay:
    """A tensor whose tiles are on their way."""

    conversions: Sequence[Conversion]
    tiles: list[Future[None]] = field(default_factory=list)
    digest: Any = field(default_factory=xxhash.xxh3_128)

    def is_done(self) -> bool:
        return all(tile.done() for tile in self.tiles)

    def finish(self) -> Iterator[Result]:
        """Wait for the tiles; say what became of the tensor."""
        for tile in self.tiles:
            tile.result()
        for conversion in self.conversions:
            tensor = conversion.target.tensor
            made = conversion.made()
            if isinstance(made, Fidelity):
                yield (
                    conversion.target,
                    Made(tensor.name, made, self.digest.hexdigest(), tensor.source.nbytes, conversion.agreement),
                )
            else:
                yield conversion.target, made


def crew_of(plan: Plan, encoding: Encoding) -> Crew:
    """The threads that convert a plan's tiles. Their compiled code is loaded first."""
    encoding.load(plan)
    # Only from pinned memory do copies to an accelerator overlap its work.
    return Crew(plan.resources.threads, plan.resources.slots, pinned=encoding.device.place.type == "cuda")

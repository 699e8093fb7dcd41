"""The conversion: for each output shard, for each tensor, for each tile of rows: read, merge, quantize, write.

Start reading here.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from converter.budget import Resources
from converter.compute import TileResult, convert_tile
from converter.crew import Crew
from converter.decide import make_plan
from converter.digests import remember
from converter.errors import Interrupted, ReadFailed, WriteFailed
from converter.estimate import estimate
from converter.inputs import Inputs, Reference
from converter.journal import Entry, job_of
from converter.measure import Fidelity, Tally
from converter.origin import already_made, origin_of
from converter.plan import Plan, ShardPlan, TensorPlan
from converter.quantize import Quantizer
from converter.receipt import fingerprint
from converter.recipe import Recipe
from converter.seal import Destination, Staging
from converter.side_files import read_side_files
from converter.tiles import as_bytes, read_factors, read_tile, torch_device
from converter.write import ShardWriter, Writer


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    stage: str
    """fetching, converting or sealing"""
    done: int
    """Bytes of the base."""
    total: int
    name: str
    """The tensor, or the file that is fetched."""


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    out: Path
    plan: Plan
    fingerprint: str
    fidelity: dict[str, Fidelity]
    """By tensor name; empty if there was nothing to do."""
    nothing_to_do: bool = False
    """OUT was a finished conversion of the same inputs by the same recipe already."""


def convert(
    base: Reference | None,
    adapter: Reference | None,
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
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
) -> Report:
    """Merge an adapter into a base and write the result, quantized, as a checkpoint in the folder `out`.

    `base` and `adapter` are folders or ids on the Hub. Without `base`, the one that the adapter names is taken; without
    `adapter`, the base is quantized as it is. `device` is auto, cpu, cuda, cuda:0, … `overwrite` lets `out` be an
    earlier conversion. `out` appears only whole. `resume`: go on with what a run of the same job left that died.
    `stop` is asked before each tile; once it gives the number of a signal, the conversion ends with `Interrupted`.

    Raises a `ConversionRefused` before anything is written, a `ConversionFailed` after.
    """
    with Inputs(base, adapter, base_revision, adapter_revision, offline=offline) as inputs:
        plan = make_plan(
            inputs.base, inputs.adapter, recipe, resources, device=device, trust_remote_code=trust_remote_code
        )
        processor = torch_device(plan.device)
        destination = Destination(Path(out), inputs=inputs.folders, overwrite=overwrite)
        if (known := already_made(destination, plan, inputs, processor.type)) is not None:
            return Report(Path(out), plan, known, {}, nothing_to_do=True)
        destination.refuse_if_taken()
        destination.refuse_if_too_full(plan.output_bytes)
        inputs.fetch(lambda name, done: progress(Progress("fetching", done, plan.base_bytes, name)))

        job, shards = job_of(plan, inputs), [shard.file for shard in plan.shards]
        with Staging(destination, job, shards, resume=resume) as staging, one_thread():
            quantizer = Quantizer(plan.recipe, processor, kernels=plan.resources.kernels)
            made: dict[str, Made] = {}
            done = 0
            with inputs.unchanged():
                for shard in plan.shards:
                    with closing(convert_shard(shard, plan, inputs, quantizer, staging, stop)) as tensors:
                        for tensor in tensors:
                            made[tensor.name] = tensor
                            done += tensor.nbytes
                            progress(Progress("converting", done, plan.base_bytes, tensor.name))

            progress(Progress("sealing", plan.base_bytes, plan.base_bytes, plan.shards[-1].file))
            digests = {name: tensor.digest for name, tensor in made.items()}
            remember(inputs.base, {t.name: digests[t.name] for t in plan.tensors() if t.origin == "base"})
            origin = origin_of(plan, inputs, processor.type, digests)
            fidelity = {tensor.name: made[tensor.name].fidelity for tensor in plan.tensors()}
            staging.seal(plan, origin, read_side_files(plan.side_files, inputs.folder_of), fidelity)
        return Report(Path(out), plan, fingerprint(plan, origin), fidelity)


def plan_conversion(
    base: Reference | None,
    adapter: Reference | None,
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
) -> Plan:
    """What `convert` would do with the same arguments: its plan, and its refusals.

    Nothing is written, and of a base on the Hub no shard is downloaded. The plan has an estimate of the time, from
    short samples of reading and computing.
    """
    with Inputs(base, adapter, base_revision, adapter_revision, offline=offline) as inputs:
        plan = make_plan(
            inputs.base, inputs.adapter, recipe, resources, device=device, trust_remote_code=trust_remote_code
        )
        if out is not None:
            destination = Destination(Path(out), inputs=inputs.folders, overwrite=overwrite)
            destination.refuse_if_taken()
            destination.refuse_if_too_full(plan.output_bytes)
        return replace(plan, estimate=estimate(plan, inputs.base))


@dataclass(frozen=True)
class Made:
    """A tensor that is converted and written."""

    name: str
    fidelity: Fidelity
    digest: str
    """xxh3-128 of the bytes that were read."""
    nbytes: int
    """How many those were."""


def convert_shard(
    shard: ShardPlan,
    plan: Plan,
    inputs: Inputs,
    quantizer: Quantizer,
    staging: Staging,
    stop: Callable[[], int | None],
) -> Generator[Made, None, None]:
    """Make one output file: what an earlier run has made of it is taken over, what is made is noted in the journal."""
    journal = staging.journal
    with ShardWriter(staging.folder, shard, journal.written(shard.file)) as writer, _crew(plan) as crew:
        left = [tensor for tensor in shard.tensors if tensor.name not in writer.resumed]
        for tensor in shard.tensors:
            if tensor.name in writer.resumed:
                entry = journal.entries[tensor.name]
                yield Made(tensor.name, Fidelity(entry.error, entry.survival), entry.digest, tensor.source.nbytes)
        try:
            for made in convert_tensors(left, inputs, quantizer, writer, crew, stop):
                figures, pieces, states = made.fidelity, writer.pieces(made.name), writer.states(made.name)
                journal.add(Entry(made.name, shard.file, pieces, states, figures.error, figures.survival, made.digest))
                yield made
                if journal.is_due():
                    writer.sync()
                    journal.commit()
            writer.sync()
            journal.commit()
        except (Interrupted, ReadFailed, WriteFailed) as exc:
            with suppress(WriteFailed):
                writer.sync()
                journal.commit()
            if writer.is_lost:
                journal.forget(shard.file)
            if journal.entries:
                exc.args = (f"{exc}; what is done is kept in {staging.folder}: the same command goes on with it",)
            raise
        writer.finish()
    staging.digest_soon(shard.file)


def convert_tensors(
    tensors: Iterable[TensorPlan],
    inputs: Inputs,
    quantizer: Quantizer,
    writer: Writer,
    crew: Crew,
    stop: Callable[[], int | None] = lambda: None,
) -> Iterator[Made]:
    """Convert tensors and write them, in order: tiles are read here, one after the other, and converted by the crew."""
    under_way: deque[_UnderWay] = deque()
    for tensor in tensors:
        folder = inputs.folder_of(tensor.origin)
        factors = read_factors(tensor.pair, inputs.folder_of("adapter"), quantizer.device) if tensor.pair else None
        current = _UnderWay(tensor)
        under_way.append(current)
        for start, end in tensor.spans():
            if (signum := stop()) is not None:
                raise Interrupted(signum, f"{signal.Signals(signum).name} while {tensor.name} was made")
            buffers = crew.buffers()
            stored, raw = read_tile(tensor, folder, start, end, buffers)
            current.digest.update(raw)
            job = (tensor, start, end, stored, factors, quantizer, buffers, writer)
            current.tiles.append(crew.submit(buffers, convert_tile, *job))
        while under_way and under_way[0].is_done():
            yield under_way.popleft().finish(quantizer, writer)
    while under_way:
        yield under_way.popleft().finish(quantizer, writer)


@dataclass
class _UnderWay:
    """A tensor some of whose tiles may not be converted yet."""

    tensor: TensorPlan
    tiles: list[Future[TileResult]] = field(default_factory=list)
    digest: Any = field(default_factory=xxhash.xxh3_128)

    def is_done(self) -> bool:
        return all(tile.done() for tile in self.tiles)

    def finish(self, quantizer: Quantizer, writer: Writer) -> Made:
        """Wait for the tiles, and write what takes the whole tensor: its quant state."""
        import torch

        tensor, tally = self.tensor, Tally()
        results = [tile.result() for tile in self.tiles]
        for result in results:
            if result.sums is not None:
                tally.add_rows(result.sums)
        if tensor.action == "quantize":
            absmax = torch.cat([result.absmax for result in results if result.absmax is not None])
            for name, value in quantizer.statistics(tensor.name, absmax, tensor.shape).items():
                writer.write(name, 0, as_bytes(value))
        return Made(tensor.name, tally.fidelity(), self.digest.hexdigest(), tensor.source.nbytes)


def _crew(plan: Plan) -> Crew:
    # Copies to and from an accelerator overlap its work only from memory that is pinned.
    return Crew(plan.resources.threads, plan.resources.slots, pinned=plan.device.startswith("cuda"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: the mean of absmax depends on their number, and so do the output's bytes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

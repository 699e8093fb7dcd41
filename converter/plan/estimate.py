"""How long a conversion will take, from short samples of what it will do."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from converter.merge.change import MergedTile, Rounding, add
from converter.plan.plan import Plan
from converter.quantize.format import Rows
from converter.quantize.formats import format_of
from converter.read.checksums import READERS, remembered_sha256, stated
from converter.tensors import torch_device

if TYPE_CHECKING:
    from torch import Tensor

    from converter.plan.plan import TensorPlan
    from converter.read.checkpoint import Checkpoint

WRITE_RATE = 400e6
"""Assumed rate of durable writes, in bytes a second. A dry run writes nothing, so it can't be sampled."""
_SAMPLE_BYTES = 64 << 20
_SAMPLE_VALUES = 4 << 20
_START_SECONDS = 2.0
_FILL_RATE = 250e6
"""Bytes of a base whose layers are merged and filled in a second, as a model writes text. Measured on one thread."""


@dataclass(frozen=True)
class Estimate:
    """Seconds that each stage would take alone. They overlap, so the longest decides."""

    read: float
    """At the rate at which the first bytes of the base were read just now; 0 for a base on the Hub."""
    compute: float
    """At the rate at which random weights were quantized just now, on as many threads."""
    write: float
    """At `WRITE_RATE`."""
    check: float = 0.0
    """First of all: the sha256 of weights that are checked for the first time, at a sampled rate."""
    calibrate: float = 0.0
    """Running a text through the layers, and choosing codes by it, at a sampled rate of products."""
    passes: int = 0
    """How many times the base is read while the model writes its text; 0: it writes none."""
    write_text: float = 0.0
    """Seconds for these passes, at `_FILL_RATE` and the sampled rate of products."""

    @property
    def seconds(self) -> float:
        """The whole: start, check, calibration, the longest stage, and a tenth of the others, which overlap in part."""
        stages = (self.read, self.compute, self.write)
        before = _START_SECONDS + self.check + self.write_text + self.calibrate
        return before + max(stages) + 0.1 * (sum(stages) - max(stages))

    def as_json(self) -> dict[str, Any]:
        written = ("passes", "write_text") if not self.passes else ()
        return {name: value for name, value in asdict(self).items() if name not in written} | {"seconds": self.seconds}


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do, and how long that would take. Nothing was written for it."""

    plan: Plan
    estimate: Estimate
    nothing_to_do: bool = False
    """Whether OUT already is a finished conversion of the same inputs by the same recipe."""
    disk: int | None = None
    """Bytes of this machine's disk that it takes, if that was asked."""

    def as_json(self) -> dict[str, Any]:
        """The plan's JSON values, the estimate's, and what loaders would find wrong."""
        found: dict[str, Any] = {"nothing_to_do": True} if self.nothing_to_do else {}
        found["loaders"] = {loader: list(problems) for loader, problems in self.plan.loaders.items()}
        if self.disk is not None and self.disk != self.plan.output_bytes:
            found["disk_bytes"] = self.disk
        return self.plan.as_json() | {"estimate": self.estimate.as_json()} | found


def estimate(plan: Plan, base: Checkpoint) -> Estimate:
    """Sample reading and quantizing, for some tenths of a second. `BadCheckpoint` if SHA256SUMS can't be understood."""
    values, read_rate = computed(plan.tensors()), _read_rate(base)
    unchecked = _unchecked(base)
    by = plan.recipe.calibration
    products_rate = 1.0 if by is None else _product_rate(plan)
    windows, passes = by.sequences if by is not None and by.is_self else (0, 0)
    weights = sum(tensor.rows * tensor.columns for tensor in plan.tensors())
    return Estimate(
        read=plan.base_bytes / read_rate,
        compute=values / _compute_rate(plan) if values else 0.0,
        write=plan.output_bytes / WRITE_RATE,
        check=unchecked / min(read_rate, READERS * _hash_rate()) if unchecked else 0.0,
        calibrate=0.0 if by is None else _products(plan) / products_rate,
        passes=passes,
        write_text=passes * (plan.base_bytes / _FILL_RATE + windows * weights / products_rate),
    )


def _products(plan: Plan) -> float:
    """Products of two numbers that calibration sums up.

    A layer runs about three times; its inputs' second moments, of which half are summed up, are those of about two
    weights; GPTQ carries each column's error to half of the others, after three steps of in_features³ / 3.
    """
    tokens = plan.recipe.calibration.tokens if plan.recipe.calibration is not None else 0
    total: float = 0.0
    for tensor in plan.tensors():
        if tensor.action == "quantize":
            rows, columns = tensor.rows, tensor.columns
            square = columns * columns
            total += tokens * (3 * rows * columns + square / 4) + (rows + columns) * square / 2
    return total


def _product_rate(plan: Plan) -> float:
    """Products a second, on as many threads."""
    import torch

    device = torch_device(plan.device)
    sample = torch.randn(1024, 1024, device=device)
    sums = sample @ sample
    started = time.perf_counter()
    sums = sample @ sample
    float(sums[0, 0])  # waits for an accelerator
    seconds = time.perf_counter() - started
    threads = plan.resources.threads / torch.get_num_threads() if device.type == "cpu" else 1
    return float(1024**3 / seconds * threads)


def computed(tensors: Iterable[TensorPlan]) -> int:
    """Weights that are merged or quantized, and not just copied."""
    # What shares a scale is merged twice: once for that scale, once to be quantized.
    return sum(tensor.rows * tensor.columns * (2 if tensor.fused else 1) for tensor in tensors if not tensor.is_copy)


def _unchecked(base: Checkpoint) -> int:
    """Bytes that are read for their sha256 first. None of a base on the Hub: its shards are hashed as they arrive."""
    folder = base.folder
    return sum(folder.size(name) for name in stated(folder, base.shards) if remembered_sha256(folder, name) is None)


def _hash_rate() -> float:
    """Bytes a second, of one thread."""
    sample = bytes(_SAMPLE_BYTES // 8)
    started = time.perf_counter()
    hashlib.sha256(sample)
    return len(sample) / (time.perf_counter() - started)


def _read_rate(base: Checkpoint) -> float:
    if base.folder.path is None:
        return float("inf")
    shard = base.shards[0]
    size = min(_SAMPLE_BYTES, base.folder.size(shard))
    buffer = memoryview(bytearray(size))
    started = time.perf_counter()
    base.folder.read_into(shard, 0, buffer)
    return size / max(time.perf_counter() - started, 1e-6)


def _compute_rate(plan: Plan) -> float:
    """Weights a second."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from converter.threads import Buffers

    recipe, resources = plan.recipe, plan.resources
    if recipe.quant_type == "none":
        return 500e6 * resources.threads  # a sum and a rounding: reading and writing take longer
    device = torch_device(plan.device)
    encoder = format_of(recipe).encoder(device, kernels=resources.kernels)
    weight = torch.randn(_SAMPLE_VALUES // 4096, 4096).bfloat16().to(device)
    rows = Rows("a sample", 0, weight, _NoDelta(Rounding.of(recipe)), Rounding.of(recipe), "BF16")

    def once() -> None:
        encoder.encode(rows, Buffers(pinned=False))

    once()  # loads what is compiled
    started = time.perf_counter()
    with ThreadPoolExecutor(resources.threads) as pool:
        for done in [pool.submit(once) for _ in range(resources.threads)]:
            done.result()
    seconds = time.perf_counter() - started
    return resources.threads * int(weight.numel()) / seconds


@dataclass(frozen=True)
class _NoDelta:
    """A merge that adds nothing, in the time that adding takes."""

    rounding: Rounding
    scaling: float = 1.0

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        return add(weight, weight.float().zero_(), self.rounding)

    def product(self, start: int, end: int, out: Tensor) -> None:
        out.zero_()

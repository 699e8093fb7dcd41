"""Each stage that computes, alone, on one tile over and over: its rate on one thread and on all.

Prints, as JSON, stage → GB of the base (bfloat16) a second. Reading and writing are `plain.py`'s.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from converter.quantize import kernels
from converter.quantize.jit import ADDED, EXACT, SUMS, Source
from converter.silence import quietly
from converter.tensors import refuse_not_finite

ROWS, COLUMNS, RANK, BLOCK = 2048, 4096, 16, 64
SECONDS = 0.5
"""How long a stage is repeated, at least."""


def main() -> None:
    torch.set_num_threads(1)
    threads = len(os.sched_getaffinity(0))
    several = f"{threads} threads"
    rates = {
        "digest (xxh3)": {"1 thread": rate(Digest, 1)},
        "merge (B·A)": {"1 thread": rate(Merge, 1), several: rate(Merge, threads)},
        "quantize": {"1 thread": rate(Quantize, 1), several: rate(Quantize, threads)},
        "merge and quantize": {"1 thread": rate(Both, 1), several: rate(Both, threads)},
        "check for NaN (copied tensors)": {"1 thread": rate(Check, 1), several: rate(Check, threads)},
    }
    torch.set_num_threads(threads)
    rates["bitsandbytes.quantize_4bit"] = {several: rate(Bitsandbytes, 1)}
    print(json.dumps(rates))


def rate(stage: Callable[[], Callable[[], object]], threads: int) -> float:
    """GB a second, each thread with a stage of its own."""
    work = [stage() for _ in range(threads)]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda once: once(), work))  # compile, load, touch the memory
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < SECONDS:
            # Threads are joined rarely enough not to matter.
            list(pool.map(_several, work))
            done += _TIMES * threads
        seconds = time.perf_counter() - started
    return done * ROWS * COLUMNS * 2 / seconds / 1e9


_TIMES = 4


def _several(once: Callable[[], object]) -> None:
    for _ in range(_TIMES):
        once()


class _Tile:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).bfloat16()
        self.bits = self.values.flatten().view(torch.uint16).numpy()


class Digest(_Tile):
    def __call__(self) -> None:
        xxhash.xxh3_128(memoryview(self.bits))


class Check(_Tile):
    def __call__(self) -> None:
        refuse_not_finite("w", self.values)


class Merge:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(RANK, COLUMNS, generator=generator) * 0.02
        self.b = torch.randn(ROWS, RANK, generator=generator) * 0.02
        self.delta = torch.empty(ROWS, COLUMNS)

    def __call__(self) -> None:
        torch.mm(self.b, self.a, out=self.delta)


class Quantize(_Tile):
    def __init__(self) -> None:
        super().__init__()
        self.merge = Merge()
        self.merge()
        self.packed = np.empty(ROWS * COLUMNS // 2, np.uint8)
        self.absmax = np.empty(ROWS * COLUMNS // BLOCK, np.float32)
        self.sums = np.empty((ROWS, SUMS))

    def __call__(self) -> None:
        kernels.quantize_rows(
            Source(self.bits, COLUMNS, EXACT, self.merge.delta.numpy().ravel(), 1.0, ADDED),
            quant_type="nf4",
            block=BLOCK,
            packed=self.packed,
            absmax=self.absmax,
            sums=self.sums,
        )


class Both(Quantize):
    def __call__(self) -> None:
        self.merge()
        super().__call__()


class Bitsandbytes(_Tile):
    def __init__(self) -> None:
        super().__init__()
        with quietly():
            import bitsandbytes.functional
        self.quantize = bitsandbytes.functional.quantize_4bit

    def __call__(self) -> None:
        self.quantize(self.values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")


if __name__ == "__main__":
    main()

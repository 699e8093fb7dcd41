"""What the weights of an output are in: the seam behind which every output format lies."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from converter.merge.change import Merge, MergedTile, Rounding, add
from converter.read.header import DTYPE_BYTES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from converter.quantize.rounding.gptq import Moments
    from converter.read.checkpoint import Checkpoint
    from converter.threads import Buffers

Shape = tuple[int, ...]

BY_TORCH = 44.0
"""Bytes of memory that a weight takes in a tile where torch computes: stored, base, delta and sum in float32, and what
is made of them on the way."""


@dataclass(frozen=True)
class Output:
    """One tensor of an output file."""

    name: str
    dtype: str
    """As safetensors spells it."""
    shape: Shape
    """Of a quant state: (its longest length,)."""
    is_state: bool = False
    """A JSON quant state: its length is known only when its weight is quantized."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def header_bytes(self) -> int:
        """What it takes of a shard's header, at the most."""
        return len(json.dumps(self.name)) + 100 + 20 * len(self.shape)


@dataclass(frozen=True)
class Rows:
    """Rows of one weight on their way into an output."""

    name: str
    start: int
    """The number of the first row."""
    stored: Tensor
    """(rows, columns), as the base stores them, on the encoder's device."""
    merge: Merge | None
    """What the adapter makes of them; None: nothing."""
    rounding: Rounding
    dtype: str
    """That of the output, where the weight stays as it is; safetensors' name."""
    transposed: bool = False
    """Whether the output has rows and columns exchanged; such a weight comes as a whole."""
    largest: float = 0.0
    """The largest absolute value of all weights that share a scale for their scales, where the format has one."""
    moments: Moments | None = None
    """What the inputs of the weight's module are like, where a text says so; such a weight comes as a whole."""

    @property
    def end(self) -> int:
        return self.start + int(self.stored.shape[0])

    @property
    def first(self) -> int:
        """The number of the first weight."""
        return self.start * int(self.stored.shape[1])

    def merged(self) -> MergedTile:
        """The rows merged, by torch."""
        if self.merge is None:
            return add(self.stored, None, self.rounding)
        return self.merge(self.stored, self.start, self.end)


@dataclass(frozen=True)
class Encoded:
    """What has become of some rows."""

    pieces: tuple[tuple[str, int, Tensor], ...]
    """Output name, the byte of it at which these values begin, the values."""
    scales: Tensor | None = None
    """What `Encoder.finish` needs of each tile: float32, one a block, one a row, or one in all."""
    sums: np.ndarray[Any, Any] | None = None
    """The sums of the rows, as `measure.row_sums` gives them."""
    outputs: tuple[float, float] | None = None
    """The two arguments of `measure.Tally.add_outputs`, for rows that a text calibrated; else None."""


class Encoder(Protocol):
    """Encodes on one device. Several threads may call it at a time."""

    def load(self, dtypes: Collection[str]) -> None:
        """Load what is compiled for weights of these dtypes, before there are threads."""

    def encode(self, rows: Rows, buffers: Buffers) -> Encoded:
        """Merge and encode some rows, whole blocks of them; the result is valid until `buffers` are used again.

        Raises `NotFinite`, naming the weight, for a NaN or an infinity.
        """

    def finish(self, name: str, shape: Shape, scales: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Everything that takes the whole weight, by output name; `scales` are those of its tiles, in order.

        The mean of absmax is taken as torch takes it on one thread; the caller sees to that. Raises `NotFinite` where a
        loader would restore an infinity.
        """


@runtime_checkable
class Sharing(Protocol):
    """An encoder whose weights share a scale for their scales, which the largest value of all of them gives."""

    def largest(self, rows: Rows) -> float:
        """The largest absolute value of some rows as they are quantized. Raises what `encode` raises."""


@dataclass
class Found:
    """What a checkpoint holds of one format's weights."""

    weights: dict[str, Shape] = field(default_factory=dict)
    """Weight → its shape before it was encoded."""
    parts: set[str] = field(default_factory=set)
    """Names of the tensors that belong to these weights; the weights' own are among them if tensors have them."""
    uneven: set[str] = field(default_factory=set)
    """Weights whose size is no multiple of the block size."""
    problems: list[str] = field(default_factory=list)
    """One line each, naming the weight."""
    settings: dict[str, Any] | None = None
    """The recipe's choices, as one of these weights states them."""


class Format(Protocol):
    """One output format, with its settings."""

    @property
    def description(self) -> str:
        """For people: "4-bit NF4 weights of bitsandbytes"."""

    @property
    def tags(self) -> tuple[str, ...]:
        """For the model card."""

    @property
    def settings(self) -> Mapping[str, str]:
        """What was chosen, for the model card."""

    @property
    def library(self) -> str:
        """Whose rules say which modules loaders expect to be quantized: bitsandbytes or compressed-tensors."""

    def block(self, columns: int) -> int:
        """Consecutive weights, across rows, that a tile must hold whole."""

    def outputs(self, name: str, shape: Shape) -> tuple[Output, ...]:
        """What becomes of a weight of `shape` (out_features, in_features)."""

    def config(self, skip_modules: Sequence[str] | None) -> dict[str, Any] | None:
        """The config's `quantization_config`; None: the config has none. `skip_modules`: None: loaders' default."""

    def state_bytes(self, rows: int, columns: int) -> int:
        """Bytes of memory that a weight takes until its last tile is encoded."""

    def tile_bytes(self, dtype: str, *, kernels: bool) -> float:
        """Bytes of memory that one weight of a tile takes; `dtype` is the base's."""

    def encoder(self, device: torch.device, *, kernels: bool = False) -> Encoder:
        """`kernels`: whether the CPU kernels may compute."""

    def find(self, written: Checkpoint) -> Found:
        """The weights of this kind in a checkpoint, whoever wrote it, and what is wrong with them."""

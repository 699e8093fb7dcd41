"""What an adapter does to one weight: the seam behind which every kind of change lies.

A `Change` is a value of the plan. Loaded, it is a `Merge`, which makes merged rows of the base's rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from converter.errors import Unsupported
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.read.folder import Folder
    from converter.read.header import TensorHeader
    from converter.recipe import MergePrecision, Recipe


@dataclass(frozen=True)
class MergedTile:
    """Some merged rows before they are encoded. All four tensors have the shape (rows, in_features)."""

    values: Tensor
    """What is quantized or kept: float32, the recipe's dtype, or the base's own where nothing is merged."""
    exact: Tensor
    """The merged weight in float32, which `values` may have rounded."""
    base: Tensor
    """The base's values in float32."""
    delta: Tensor | None
    """What the change adds, in float32; None where nothing is changed."""
    is_sum: bool = False
    """Whether `exact` is the sum of base and delta; else delta is their difference."""

    def rows(self, part: slice) -> MergedTile:
        """Some of its rows."""
        delta = None if self.delta is None else self.delta[part]
        return MergedTile(self.values[part], self.exact[part], self.base[part], delta, self.is_sum)


@dataclass(frozen=True)
class Rounding:
    """To what base and sum are rounded when they are merged."""

    precision: MergePrecision
    """float32: to nothing. reference: to `dtype`, as PEFT does on a model loaded in it."""
    dtype: str
    """bfloat16 or float16."""

    @classmethod
    def of(cls, recipe: Recipe) -> Rounding:
        return cls(recipe.merge_precision, recipe.dtype)


class Merge(Protocol):
    """A change whose tensors are in memory. Several threads may call it at a time."""

    def __call__(self, weight: Tensor, start: int, end: int) -> MergedTile:
        """Merge rows `start` to `end`; `weight` is (end - start, in_features), as the base stores it."""


@runtime_checkable
class Additive(Protocol):
    """A merge that adds scaling · product to the base, so that a kernel may add it while it quantizes."""

    scaling: float

    def product(self, start: int, end: int, out: Tensor) -> None:
        """Fill `out`, (end - start, in_features) in float32, with the product's rows, not yet scaled."""


@runtime_checkable
class Transforming(Protocol):
    """A merge that is no sum, but makes rows of the base's alone, so that a kernel may round them."""

    def transform(self, weight: Tensor, start: int, end: int, out: Tensor) -> None:
        """Fill `out` with merged rows `start` to `end`, not yet rounded. `weight` and `out` are (end - start,
        in_features), both in float32."""


@runtime_checkable
class Surveying(Protocol):
    """A merge that must see all rows of the weight, in order, before it merges the first."""

    def survey(self, weight: Tensor, start: int, end: int) -> None:
        """See rows `start` to `end`; `weight` is (end - start, in_features), as the base stores it."""


@runtime_checkable
class Directed(Protocol):
    """A merge whose factors say on which directions of the input it acts."""

    @property
    def inputs(self) -> Tensor:
        """(rank, in_features) in float32: the adapter's A."""


@dataclass(frozen=True)
class Change(ABC):
    """What an adapter does to one weight: a frozen value."""

    module: str
    """As the adapter's file names it."""
    source: TensorHeader | None = field(default=None, kw_only=True)
    """The adapter's tensor that is read in the place of the base's; None: the base's own is read."""
    whole: ClassVar[str | None] = None
    """Why the weight must be in memory as a whole; None where some of its rows will do."""
    is_additive: ClassVar[bool] = False
    """Whether `load` gives an `Additive`, or nothing to merge."""
    is_transforming: ClassVar[bool] = False
    """Whether `load` gives a `Transforming`."""
    is_of_stack: ClassVar[bool] = False
    """Whether the weight is a stack of matrices, so that its rows are those of one after the other."""

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorHeader, ...]:
        """The adapter's tensors that are merged; none where a tensor is only replaced."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it fits; (out_features, in_features) of a matrix."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory that loading and holding it takes."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What it does, in a few words for people."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """What shapes the merged bytes, for plan and receipt: {kind: {"module": …, …}}; empty: nothing is merged."""

    @abstractmethod
    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> Merge | None:
        """Read its parts; None where there is nothing to merge. Raises what reading raises."""

    def scaled(self, factor: float) -> Change:
        """The same change, `factor` times as large. `Unsupported` for a kind that has no size of its own."""
        raise Unsupported(f"{self.module}: {self.label}: `scale` has no meaning for this kind of adapter")

    def read(self, folder: Folder, device: torch.device) -> list[Tensor]:
        """Its parts in float32, on the device."""
        return [read_float32(part, folder).to(device) for part in self.parts]


@dataclass(frozen=True)
class Replacement(Change):
    """A whole tensor of the adapter that takes the place of the base's: modules_to_save, biases, resized embeddings."""

    source: TensorHeader = field(kw_only=True)
    parts: ClassVar[tuple[TensorHeader, ...]] = ()
    nbytes: ClassVar[int] = 0
    label: ClassVar[str] = ""
    is_additive = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def as_json(self) -> dict[str, Any]:
        return {}

    def load(self, folder: Folder, device: torch.device, rounding: Rounding) -> None:
        """Nothing to merge: the values are read like any tensor's."""


def add(weight: Tensor, delta: Tensor | None, rounding: Rounding) -> MergedTile:
    """Base plus delta, (rows, in_features) each.

    float32: the sum in float32, of the base's own values, is what is encoded.
    reference: the base is cast to `rounding.dtype`, the sum is computed in float32 and cast to that dtype again, as
    PEFT's `merge_and_unload` does on a model loaded in it.
    """
    base = weight.float()
    exact = base if delta is None else base + delta
    if rounding.precision == "float32":
        return MergedTile(weight if delta is None else exact, exact, base, delta, is_sum=True)
    rounded = torch_dtype(rounding.dtype)
    values = weight.to(rounded)
    if delta is not None:
        values = (values.float() + delta).to(rounded)
    return MergedTile(values, exact, base, delta, is_sum=True)


def read_float32(header: TensorHeader, folder: Folder) -> Tensor:
    """A tensor of an adapter in float32, which holds every dtype that an adapter's file may have."""
    return read_stored(header, folder).float()


def read_stored(header: TensorHeader, folder: Folder) -> Tensor:
    """A tensor of an adapter, in the dtype of its file."""
    import torch

    raw = bytearray(header.nbytes)
    folder.read_into(header.file, header.offset, memoryview(raw))
    return torch.frombuffer(raw, dtype=torch_dtype(header.dtype)).view(header.shape)


def add_rounded(weight: Tensor, delta: Tensor, rounding: Rounding) -> MergedTile:
    """`add`, where PEFT rounds the delta to the base's dtype before it adds it: two roundings, not one."""
    exact = add(weight, delta, Rounding("float32", rounding.dtype))
    if rounding.precision == "float32":
        return exact
    rounded = torch_dtype(rounding.dtype)
    values = weight.to(rounded) + delta.to(rounded)
    return MergedTile(values, exact.exact, exact.base, delta, is_sum=True)


def transform(weight: Tensor, formula: Callable[[Tensor], Tensor], rounding: Rounding) -> MergedTile:
    """Rows that `formula` makes of the base's, both in float32, where the change is no sum.

    reference: the base is cast to `rounding.dtype` before, and the result after.
    """
    base = weight.float()
    exact = formula(base)
    if rounding.precision == "float32":
        return MergedTile(exact, exact, base, exact - base)
    rounded = torch_dtype(rounding.dtype)
    loaded = exact if weight.dtype is rounded else formula(weight.to(rounded).float())
    return MergedTile(loaded.to(rounded), exact, base, exact - base)

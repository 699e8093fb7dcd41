"""A tile for the CPU kernels, strip by strip: what a strip takes is still in the processor's cache when it is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from converter.merge.change import Additive, Transforming
from converter.quantize.cut import STRIP_ELEMENTS, tile_bounds
from converter.tensors import torch_dtype

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from converter.merge.change import Rounding
    from converter.quantize.format import Rows
    from converter.quantize.jit import Source
    from converter.threads import Buffers


@dataclass(frozen=True)
class Strip:
    """Some rows of a tile as the kernels take them, valid until the next strip is made."""

    first: int
    """In the tile."""
    last: int
    source: Source


def kernels_take(rows: Rows) -> bool:
    """Whether the kernels can merge rows, or round what the merge makes of them.

    They round merged values once, and no others; with the roundings of PEFT's flow, a merge may have more.
    """
    merge: object = rows.merge
    if merge is None or isinstance(merge, Additive) or rows.rounding.precision == "float32":
        return True
    return _transforming(rows) is not None and rows.stored.dtype is torch_dtype(rows.rounding.dtype)


def strips(rows: Rows, buffers: Buffers, *, block: int = 1) -> Iterator[Strip]:
    """The strips of a tile that `kernels_take`, in whole blocks; it is stored in bfloat16, float16 or float32."""
    import torch

    from converter.quantize.jit import ADDED, REPLACED, Source

    (count, columns), rounding = rows.stored.shape, kernel_rounding(rows.rounding)
    merge: object = rows.merge
    product, transforming = merge if isinstance(merge, Additive) else None, _transforming(rows)
    # Any other merge makes the whole tile at once.
    tile = rows.merged() if merge is not None and product is None and transforming is None else None
    for first, last in pairwise(tile_bounds(count, columns, block=block, most=STRIP_ELEMENTS)):
        part, where = rows.stored[first:last], (rows.start + first, rows.start + last)
        if part.dtype is torch.float16:
            part = buffers.take("float32", torch.float32, last - first, columns).copy_(part)
        source = Source(_as_bits(part), columns, rounding)
        if product is not None:
            change = buffers.take("change", torch.float32, last - first, columns)
            product.product(*where, change)
            source = source._replace(change=_as_bits(change), scaling=product.scaling, how=ADDED)
        elif transforming is not None:
            if part.dtype is not torch.float32:
                part = buffers.take("float32", torch.float32, last - first, columns).copy_(part)
            change = buffers.take("change", torch.float32, last - first, columns)
            transforming.transform(part, *where, change)
            source = source._replace(change=_as_bits(change), how=REPLACED)
        elif tile is not None:
            made = tile.delta if tile.is_sum and tile.delta is not None else tile.exact
            how = ADDED if made is tile.delta else REPLACED
            source = source._replace(change=_as_bits(made[first:last]), how=how)
        yield Strip(first, last, source)


def _transforming(rows: Rows) -> Transforming | None:
    """The merge, if it can take a strip at a time. The bits of a row's length depend on how its matrix lies in memory,
    so one that is turned is merged as torch does it."""
    merge: object = rows.merge
    return merge if isinstance(merge, Transforming) and rows.stored.is_contiguous() else None


def _as_bits(values: Tensor) -> np.ndarray[Any, Any]:
    """Values as the kernels take them: float32, or bfloat16 as uint16."""
    import torch

    flat = values.contiguous().flatten()
    found: np.ndarray[Any, Any] = (flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat).numpy()
    return found


def kernel_rounding(rounding: Rounding) -> int:
    """What base and sum are rounded to, as the kernels say it."""
    from converter.quantize import jit

    if rounding.precision != "reference":
        return jit.EXACT
    return jit.BFLOAT16 if rounding.dtype == "bfloat16" else jit.FLOAT16


def kernel_dtypes(dtypes: Iterable[str]) -> list[str]:
    """The dtypes of arrays in which weights of some dtypes come to the kernels."""
    return sorted({"uint16" if dtype == "BF16" else "float32" for dtype in dtypes})

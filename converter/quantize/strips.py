"""A tile for the CPU kernels, strip by strip: what a strip takes is still in the processor's cache when it is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from converter.merge.change import Additive
from converter.quantize.cut import STRIP_ELEMENTS, tile_bounds

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from converter.merge.change import Rounding
    from converter.quantize.format import Rows
    from converter.threads import Buffers


@dataclass(frozen=True)
class Strip:
    """Some rows of a tile as the kernels take them, valid until the next strip is made."""

    first: int
    """In the tile."""
    last: int
    base: np.ndarray[Any, Any]
    """rows · columns values: float32, or bfloat16 as uint16."""
    delta: np.ndarray[Any, Any] | None
    """The product in float32, of the same number, not yet scaled; None: no delta."""
    scaling: float


def is_additive(merge: object) -> bool:
    """Whether a kernel can add what a merge adds."""
    return merge is None or isinstance(merge, Additive)


def strips(rows: Rows, stored: Tensor, buffers: Buffers, *, block: int = 1) -> Iterator[Strip]:
    """The strips of a tile, in whole blocks. `stored` are the tile's values: (rows, columns) in bfloat16, float16 or
    float32. A merge that is no `Additive` is left to the caller, who gives merged values."""
    import torch

    count, columns = stored.shape
    merge: object = rows.merge
    product = merge if isinstance(merge, Additive) else None
    for first, last in pairwise(tile_bounds(count, columns, block=block, most=STRIP_ELEMENTS)):
        part = stored[first:last]
        if stored.dtype is torch.float16:
            part = buffers.take("float32", torch.float32, last - first, columns).copy_(part)
        flat = part.contiguous().flatten()
        delta = None
        if product is not None:
            delta = buffers.take("delta", torch.float32, last - first, columns)
            product.product(rows.start + first, rows.start + last, delta)
        yield Strip(
            first,
            last,
            (flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat).numpy(),
            None if delta is None else delta.numpy().ravel(),
            1.0 if product is None else product.scaling,
        )


def kernel_rounding(rounding: Rounding) -> int:
    """What base and sum are rounded to, as the kernels say it."""
    from converter.quantize import jit

    if rounding.precision != "reference":
        return jit.EXACT
    return jit.BFLOAT16 if rounding.dtype == "bfloat16" else jit.FLOAT16


def kernel_dtypes(dtypes: Iterable[str]) -> list[str]:
    """The dtypes of arrays in which weights of some dtypes come to the kernels."""
    return sorted({"uint16" if dtype == "BF16" else "float32" for dtype in dtypes})

"""The proof of a quantized base: what a few of its weights are read as must give their own codes again.

Where it doesn't, something else quantized them, with another absmax or another rounding, and what an adapter changes is
not only rounded anew, but in another way than the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from converter.errors import BadCheckpoint, NotFinite
from converter.merge.change import Rounding
from converter.plan.quantized_base import settings_of
from converter.quantize.cut import tile_bounds
from converter.quantize.format import Rows
from converter.quantize.formats import format_of
from converter.tensors import as_bytes, torch_device
from converter.threads import Buffers

if TYPE_CHECKING:
    from converter.read.folder import Folder
    from converter.read.stored.schemes import Sources
    from converter.read.stored.stored import Stored
    from converter.recipe import Recipe

SAMPLES = 8
"""Weights that are tried, spread over the base."""
SAMPLE_WEIGHTS = 1 << 16
"""Values of each that are tried, in whole rows and blocks; more where one row has more."""


def proved(sources: Sources, folder: Folder, recipe: Recipe, *, kernels: bool) -> list[str]:
    """What a user should know of the sample. Raises what reading raises, and `BadCheckpoint`."""
    tried = _sample([weight for weight in sources.stored if settings_of(weight) is not None])
    failed = [weight.name for weight in tried if not _gives_its_own_codes(weight, folder, recipe, kernels=kernels)]
    if not failed:
        return []
    return [
        f"{len(failed)} of {len(tried)} weights of the base that were tried don't give their own codes when they are "
        f"quantized again ({failed[0]}): another library or another rounding made them, so what the adapter changes is "
        "quantized in another way than the rest"
    ]


def _sample(weights: Sequence[Stored]) -> list[Stored]:
    count = min(SAMPLES, len(weights))
    return [weights[number * len(weights) // count] for number in range(count)]


def _gives_its_own_codes(weight: Stored, folder: Folder, recipe: Recipe, *, kernels: bool) -> bool:
    settings = settings_of(weight)
    assert settings is not None  # noqa: S101  (`proved` took those that have some)
    quant_type, double_quant, block = settings
    own = replace(
        recipe,
        quant_type=quant_type,
        double_quant=double_quant,
        block_size=block,
        rounding="nearest",
        merge_precision="float32",
        group_size=None,
        scale_search=False,
    )
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    _, some, *_ = tile_bounds(rows, columns, block=weight.block, most=SAMPLE_WEIGHTS)
    buffers = Buffers(pinned=False)
    opened = weight.open(folder)
    raw = opened.read(0, some, buffers)
    values = opened.decode(0, some, raw, buffers)
    encoder = format_of(own).encoder(torch_device("cpu"), kernels=kernels)
    try:
        encoded = encoder.encode(Rows(weight.name, 0, values, None, Rounding.of(own), weight.dtype), buffers)
    except NotFinite as exc:
        raise BadCheckpoint(str(exc)) from exc
    [(_, _, codes)] = encoded.pieces
    return bytes(as_bytes(codes)) == bytes(raw)

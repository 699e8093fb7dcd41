"""A conversion on an accelerator checks itself: a sample of its tiles is made again on the CPU and compared."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.errors import DeviceDisagrees
from converter.quantize.agreement import MOST_CODES, agreement, most_of_scales
from converter.threads import Buffers

if TYPE_CHECKING:
    from torch import Tensor

    from converter.plan.plan import Plan
    from converter.quantize.agreement import Agreement
    from converter.quantize.format import Encoded, Encoder, Rows
    from converter.recipe import Recipe

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def sampled(plan: Plan, every: int) -> dict[str, frozenset[int]]:
    """Tensor → the numbers of its tiles that are made again: the first of each kind of module, then one in `every`.

    Tensors are of one kind if their names differ by numbers only, and the adapter changes both or none. 0: none.
    """
    kinds: set[tuple[str, bool]] = set()
    chosen: dict[str, set[int]] = {}
    count = 0
    for tensor in plan.tensors() if every else ():
        if tensor.is_copy:
            continue
        kind = _NUMBER.sub("N", tensor.name), tensor.is_touched
        for number in range(len(tensor.tiles) - 1):
            if kind not in kinds or count % every == 0:
                chosen.setdefault(tensor.name, set()).add(number)
                kinds.add(kind)
            count += 1
    return {name: frozenset(numbers) for name, numbers in chosen.items()}


class Recheck:
    """Makes tiles again and compares them, one at a time, so that it needs the memory of one."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self._recipe, self._device = recipe, device
        self._one_at_a_time = threading.Lock()
        self._buffers = Buffers(pinned=False)

    def __call__(self, encoder: Encoder, rows: Rows, encoded: Encoded, made: Sequence[Tensor]) -> Agreement:
        """Compare a tile with what a CPU's encoder makes of its rows. `DeviceDisagrees` if more differs than may."""
        with self._one_at_a_time:
            again = encoder.encode(rows, self._buffers)
            found = agreement(made, encoded, again)
        if not found.is_explained(self._recipe):
            raise DeviceDisagrees(
                f"{rows.name}: rows {rows.start} to {rows.end} of {self._device} were made again on the CPU: "
                f"{found.codes:.2%} of the codes differ (at most {MOST_CODES:.1%} may), and scales by up to "
                f"{found.scales:.2g} of their value (at most {most_of_scales(self._recipe):.2g}). The card, its driver "
                "or this tool is at fault: convert with `device` cpu, and test the card"
            )
        return found

"""The tensors of a plan, merged, in 16 bits: whole, or some of their rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from converter.merge.change import Surveying, add
from converter.read.stored.rows import open_source
from converter.tensors import refuse_not_finite, torch_device, torch_dtype
from converter.threads import Buffers, one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from converter.merge.change import Merge
    from converter.plan.plan import Plan, TensorPlan
    from converter.read.folder import Folder
    from converter.read.stored.stored import Opened


class Weights:
    """What a plan in 16 bits gives, tensor by tensor, with the bits of the checkpoint that it would write."""

    def __init__(self, plan: Plan, base: Folder, adapter: Folder | None) -> None:
        self.plan = plan
        self.by_name = {tensor.name: tensor for tensor in plan.tensors()}
        self._base, self._adapter = base, adapter
        self._buffers = Buffers(pinned=False)

    def whole(self, name: str) -> Tensor:
        """One tensor, in its shape and dtype. Raises what reading raises, and `NotFinite`."""
        import torch

        tensor = self.by_name[name]
        values = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
        rows = values.T if tensor.transpose else values.view(tensor.rows, tensor.columns)
        for start, part in self._tiles(tensor, [(0, tensor.rows)]):
            rows[start : start + part.shape[0]] = part
        return values

    def rows(self, name: str, spans: Iterable[tuple[int, int]]) -> Tensor:
        """Rows of a matrix, (rows, columns) in its dtype: those of each span, a first row and the row after the last.

        Spans are in order and don't overlap. Only the tiles in which they lie are read.
        """
        import torch

        tensor, spans = self.by_name[name], list(spans)
        if tensor.transpose:
            return torch.cat([self.whole(name)[start:end] for start, end in spans])
        values = torch.empty(sum(end - start for start, end in spans), tensor.columns, dtype=torch_dtype(tensor.dtype))
        done = 0
        waiting = list(reversed(spans))
        for first, part in self._tiles(tensor, spans):
            last = first + part.shape[0]
            while waiting and waiting[-1][0] < last:
                start, end = waiting.pop()
                values[done : done + min(end, last) - start] = part[start - first : min(end, last) - first]
                done += min(end, last) - start
                if end > last:
                    waiting.append((last, end))
        return values

    def _tiles(self, tensor: TensorPlan, spans: list[tuple[int, int]]) -> Iterable[tuple[int, Tensor]]:
        """First row and merged rows, of each tile in which a span lies; each is valid until the next one."""
        change, rounding = tensor.change, tensor.rounding(self.plan.recipe)
        folder = self._base if tensor.origin == "base" else self._adapter
        assert folder is not None  # noqa: S101  (what comes from an adapter has one)
        with one_thread():  # as a conversion computes
            merge: Merge | None = None
            if change is not None and self._adapter is not None:
                merge = change.load(self._adapter, torch_device("cpu"), rounding)
            opened = open_source(tensor.source, folder, tensor.rows, turned=tensor.transpose)
            surveying: object = merge
            if isinstance(surveying, Surveying):
                for start, end in tensor.spans():
                    surveying.survey(self._stored(opened, start, end), start, end)
        for start, end in tensor.spans():
            if any(first < end and last > start for first, last in spans):
                with one_thread():
                    stored = self._stored(opened, start, end)
                    merged = add(stored, None, rounding) if merge is None else merge(stored, start, end)
                    values = merged.values.to(torch_dtype(tensor.dtype))
                if tensor.checked:
                    refuse_not_finite(tensor.name, values)
                yield start, values

    def _stored(self, opened: Opened, start: int, end: int) -> Tensor:
        return opened.decode(start, end, opened.read(start, end, self._buffers), self._buffers)

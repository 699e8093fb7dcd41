"""Where tiles are computed: on the CPU, or on an accelerator, to which values are copied and from which they come back.

On an accelerator all computing is on the default stream: bitsandbytes' kernels that quantize take no other one. Only
copies have streams of their own, one for each direction, so that a tile's copy overlaps the work on another tile.
Events order them: the work waits for the copy that brings its values, the copy back waits for the work, and the host
waits for the copy back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from converter.tensors import torch_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.threads import Buffers


class Device(Protocol):
    """Several threads may use it at a time."""

    place: torch.device
    """Where the tensors lie that are computed with."""
    is_accelerator: bool
    """Whether values are copied to it, and what it computes is checked by the CPU."""

    def bring(self, values: Tensor) -> Tensor:
        """Host values on the device, for the work that follows. They must stay as they are until `settle` returns."""

    def fetch(self, made: Sequence[Tensor], buffers: Buffers) -> list[Tensor]:
        """The bytes of what the work so far has made, on the host; valid until `buffers` are used again."""

    def settle(self) -> None:
        """Wait until all work so far is done, and with it the copies that it waits for."""


class Synchronous:
    """The CPU; and any device whose copies and work are done when their calls return."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.is_accelerator = place.type != "cpu"

    def bring(self, values: Tensor) -> Tensor:
        return values.to(self.place)

    def fetch(self, made: Sequence[Tensor], buffers: Buffers) -> list[Tensor]:
        return list(made)

    def settle(self) -> None:
        """There is nothing to wait for."""


class Event(Protocol):
    """A point in a stream, as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Let the host wait for it."""


class Stream(Protocol):
    """Work in order, as `torch.cuda.Stream`."""

    def record_event(self) -> Event:
        """The point after what is in the stream so far."""

    def wait_event(self, event: Event) -> None:
        """Let what comes into this stream from now on wait for an event."""


class Streams(Protocol):
    """What `Accelerator` needs of a device."""

    place: torch.device

    def default(self) -> Stream:
        """The stream of all computing."""

    def new(self) -> Stream:
        """A stream of its own."""

    def to_device(self, values: Tensor, stream: Stream) -> Tensor:
        """Begin to copy host values, in a stream. The copy's memory stays until the default stream is done with it."""

    def to_host(self, values: Tensor, into: Tensor, stream: Stream) -> None:
        """Begin to copy values into host memory, in a stream. The caller keeps both until the copy is done."""


class Accelerator:
    """Copies in streams of their own, ordered by events; from and to memory that is pinned, if `buffers` are."""

    is_accelerator = True

    def __init__(self, streams: Streams) -> None:
        self.place = streams.place
        self._streams = streams
        self._computing, self._in, self._out = streams.default(), streams.new(), streams.new()

    def bring(self, values: Tensor) -> Tensor:
        brought = self._streams.to_device(values, self._in)
        self._computing.wait_event(self._in.record_event())
        return brought

    def fetch(self, made: Sequence[Tensor], buffers: Buffers) -> list[Tensor]:
        import torch

        flat = [values.contiguous().flatten().view(torch.uint8) for values in made]  # the last work of this tile
        host = buffers.take("fetched", torch.uint8, sum(values.numel() for values in flat))
        self._out.wait_event(self._computing.record_event())
        pieces = list(host.split([values.numel() for values in flat]))
        for values, piece in zip(flat, pieces, strict=True):
            self._streams.to_host(values, piece, self._out)
        self._out.record_event().synchronize()
        return pieces

    def settle(self) -> None:
        self._computing.record_event().synchronize()


class CudaStreams:
    """Those of a CUDA device."""

    def __init__(self, place: torch.device) -> None:
        self.place = place

    def default(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.default_stream(self.place)

    def new(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.Stream(self.place)

    def to_device(self, values: Tensor, stream: torch.cuda.Stream) -> Tensor:
        import torch

        with torch.cuda.stream(stream):
            copy = values.to(self.place, non_blocking=True)
        copy.record_stream(self.default())
        return copy

    def to_host(self, values: Tensor, into: Tensor, stream: torch.cuda.Stream) -> None:
        import torch

        with torch.cuda.stream(stream):
            into.copy_(values, non_blocking=True)


OpenDevice = Callable[[str], Device]


def open_device(name: str) -> Device:
    """The device of this name, as `torch_device` knows it."""
    place = torch_device(name)
    return Accelerator(CudaStreams(place)) if place.type == "cuda" else Synchronous(place)

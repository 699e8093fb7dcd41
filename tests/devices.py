"""Devices for tests: they compute on the CPU, and copy as late as the order of events allows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from converter.device import Accelerator, Device, Event, Stream

Copy = Callable[[], None]


@dataclass
class LateStream:
    """Copies wait in it until somebody waits for an event that lies behind them."""

    name: str
    device: LateCopies
    waiting: list[Copy] = field(default_factory=list)

    def record_event(self) -> LateEvent:
        self.device.log(f"{self.name}: event")
        return LateEvent(self, len(self.waiting))

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, LateEvent)
        self.device.log(f"{self.name}: waits for {event.stream.name}")
        if self.name == "computing" and self.device.forgets:
            return
        event.happen()


@dataclass
class LateEvent:
    stream: LateStream
    position: int

    def happen(self) -> None:
        with self.stream.device.lock:
            for number, copy in enumerate(self.stream.waiting[: self.position]):
                copy()
                self.stream.waiting[number] = _done

    def synchronize(self) -> None:
        self.stream.device.log(f"host: waits for {self.stream.name}")
        self.happen()


def _done() -> None:
    """What is copied is not copied again."""


class LateCopies:
    """An accelerator's streams. Memory that a copy is to fill holds zeros until it has happened.

    `forgets`: the work does not wait for the copies that bring its values. `spoil` may change what is copied back; it
    gets the number of that copy and its bytes.
    """

    def __init__(self, *, forgets: bool = False, spoil: Callable[[int, Tensor], None] = lambda *_: None) -> None:
        self.place = torch.device("cpu")
        self.forgets = forgets
        self.lock = threading.RLock()
        self.logs: dict[int, list[str]] = {}
        """Thread → what was asked for, in order."""
        self._spoil = spoil
        self._copied = 0
        self._names = iter(("in", "out"))
        self._default = LateStream("computing", self)

    def log(self, what: str) -> None:
        self.logs.setdefault(threading.get_ident(), []).append(what)

    def default(self) -> LateStream:
        return self._default

    def new(self) -> LateStream:
        return LateStream(next(self._names), self)

    def to_device(self, values: Tensor, stream: Stream) -> Tensor:
        assert isinstance(stream, LateStream)
        self.log(f"{stream.name}: copy to the device")
        arrived = torch.zeros_like(values)

        def copy() -> None:
            arrived.copy_(values)

        with self.lock:
            stream.waiting.append(copy)
        return arrived

    def to_host(self, values: Tensor, into: Tensor, stream: Stream) -> None:
        assert isinstance(stream, LateStream)
        self.log(f"{stream.name}: copy to the host")
        into.zero_()
        with self.lock:
            number, self._copied = self._copied, self._copied + 1

            def copy() -> None:
                into.copy_(values)
                self._spoil(number, into)

            stream.waiting.append(copy)


def opened(streams: LateCopies) -> Callable[[str], Device]:
    """For `RunOptions.open_device`: one device, whatever its name."""
    device = Accelerator(streams)
    return lambda _: device

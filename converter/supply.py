"""How the base's files come to where they are read: all before the first tensor is made, or one by one on the way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from converter.errors import BadOutput, InputChanged
from converter.observer import Observer
from converter.plan.inputs import Inputs
from converter.plan.needs import Need, most_at_once, needs_of
from converter.plan.plan import Plan
from converter.read.arrivals import Arrivals, held_bytes
from converter.read.folder import Folder
from converter.read.header import read_header
from converter.seal.destination import BASE, Place
from converter.seal.production import Production, Target

MOST_EARLY = 2
"""Files that come before they are needed, if the disk has room."""

Targets = Sequence[Target]


class Supply(Protocol):
    """The files of the base while tensors are made of them."""

    @property
    def folder(self) -> Folder:
        """Where they are read."""

    def stretches(self, targets: Iterable[Targets]) -> Iterator[Iterable[Targets]]:
        """The targets in their order, in groups of which all files are there. A group is made before the next begins,
        and `made` is told."""

    def made(self, name: str) -> None:
        """Take note that a tensor is made."""


class Present:
    """A base whose files are all there."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def stretches(self, targets: Iterable[Targets]) -> Iterator[Iterable[Targets]]:
        yield targets

    def made(self, name: str) -> None:
        """Nothing to do."""


class Arriving:
    """A base on the Hub or in a bucket whose files come while tensors are made of those that came before.

    Where their room is limited, they lie in the staging folder, and a file is removed after its last tensor. Otherwise
    they come into the Hub's cache, and stay.
    """

    def __init__(self, inputs: Inputs, output: Production, room: Room, observer: Observer) -> None:
        self._inputs, self._output, self._observer = inputs, output, observer
        left = output.left()
        self._number = {tensor.name: number for number, tensor in enumerate(left)}
        self._needs: list[Need] = needs_of(left)
        self._first = [need.first for need in self._needs]
        self._is_limited = room.is_limited
        remote = inputs.opened.remote
        assert remote is not None  # noqa: S101  (the base arrives)
        files = [need.file for need in self._needs]
        if room.is_limited:
            self._arrivals = Arrivals(remote, files, output.staging.folder / BASE, room.of_base)
        else:
            inputs.opened.fetch_small()
            self._arrivals = Arrivals(remote, files)
        self.folder = self._arrivals.folder

    def stretches(self, targets: Iterable[Targets]) -> Iterator[Iterable[Targets]]:
        come = 0
        for stage, stretch in groupby(targets, self._stage_of):
            for need in self._needs[come:stage]:
                self._await(need.file)
            come = max(come, stage)
            yield stretch

    def made(self, name: str) -> None:
        over = [need.file for need in self._needs if need.last == self._number[name]]
        if over and self._is_limited:
            self._output.make_durable()  # or another run would need the file once more
        for file in over:
            self._arrivals.release(file)

    def close(self, *, remove: bool) -> None:
        """End what is under way; `remove` what is left of the base in the staging folder."""
        self._arrivals.close()
        if remove:
            self._arrivals.remove()

    def _stage_of(self, targets: Targets) -> int:
        """How many files are needed up to these."""
        return bisect_right(self._first, self._number[targets[0].tensor.name])

    def _await(self, file: str) -> None:
        total = self._inputs.base.nbytes

        def tell(stage: str, done: int, name: str) -> None:
            self._observer.tell(stage, done, total, name)

        stated = self._arrivals.wait(file, tell, self._observer.stop)
        planned = {tensor.name: tensor for tensor in self._inputs.base if tensor.file == file}
        if read_header(self.folder, file) != planned:
            raise InputChanged(f"{self._inputs.base.folder.label}: {file}: its header is another than a moment ago")
        if stated is not None:
            self._inputs.opened.checked[file] = stated.by


def arrives(inputs: Inputs) -> bool:
    """Whether the base's files come one by one."""
    return inputs.opened.comes_by_file


@contextmanager
def supplied(inputs: Inputs, output: Production, room: Room, observer: Observer, *, whole: bool) -> Iterator[Supply]:
    """The base's files for a conversion; `whole`: all are there. What came into the staging folder is removed at the
    end of it, but for an error, after which another run may need it."""
    if whole:
        yield Present(inputs.base.folder)
        return
    arriving = Arriving(inputs, output, room, observer)
    try:
        yield arriving
    except BaseException:
        arriving.close(remove=False)
        raise
    arriving.close(remove=True)


@dataclass(frozen=True)
class Room:
    """Bytes of this machine's disk that are taken at one time."""

    of_out: int
    of_base: int = 0
    """None of a base that is here, or that comes into the Hub's cache."""
    is_limited: bool = False
    """Whether the base's files are removed when they are of no more use."""
    notes: tuple[str, ...] = ()
    """What a plan says of it."""


def room_for(place: Place, plan: Plan, inputs: Inputs, disk: int | None) -> Room:
    """What OUT and the base take of this machine's disk, if they may take `disk` bytes together.

    `BadOutput` says how many bytes would do if they are too few.
    """
    usual, least = place.room_for(plan), place.least_room_for(plan)
    remote = inputs.opened.remote
    stays = remote is None or inputs.opened.is_kept or plan.recipe.calibration is not None
    if disk is None and stays:
        return Room(usual)
    if remote is not None and not arrives(inputs):
        raise BadOutput(
            f"{remote.label}: the Hub does not say what its files are, so they come all at once: omit `disk`"
        )
    needs = needs_of(list(plan.tensors())) if remote is not None else []
    sizes = {need.file: held_bytes(remote, need.file) for need in needs} if remote is not None else {}
    in_use, *early = [most_at_once(needs, sizes.__getitem__, ahead) for ahead in range(MOST_EARLY + 1)]
    if disk is None:
        disk = early[-1] + usual  # without a cache, files go after their last tensor, too
    for of_base, out in (*((base, usual) for base in reversed(early)), (early[0], least), (in_use, least)):
        if of_base + out <= disk:
            of_out = place.room_for(plan, disk - of_base)
            if remote is None:
                return Room(of_out)
            note = f"{len(needs)} files of the base come one by one: at most {of_base:,} bytes of it are here at a time"
            return Room(of_out, of_base, is_limited=True, notes=(note,))
    parts = f": {in_use:,} for the base's files that are read at one time, {least:,} for OUT" if needs else ""
    raise BadOutput(
        f"`disk` is {disk:,} bytes, and {in_use + least:,} are needed{parts}; give at least {in_use + least:,}, or a "
        "smaller `max_shard_size`"
    )

"""Files that come to this machine one after the other, while those that came before are read."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Protocol

from converter.errors import BadCheckpoint, InputChanged, Interrupted, WriteFailed
from converter.read.checksums import SUMS, Hashing, Stated
from converter.read.folder import Folder, LocalFolder, Progress
from converter.threads import pool

Tell = Callable[[str, int, str], None]
"""Told a stage, fetching or checking, the bytes that are done, and a file's name."""

_TICK = 0.1
"""Seconds after which somebody is told how far it is, and asked whether to go on."""


class Remote(Folder, Protocol):
    """A folder whose files lie elsewhere, and can be brought here."""

    is_kept: bool
    """Whether later runs find what `fetch` brings where no `place` is given."""
    is_pinned: bool
    """Whether each request names the contents that were listed. Then a file is the right one even without a sha256."""

    def refuse_if_too_full(self, names: Iterable[str]) -> None:
        """`StoreRefused` if `snapshot` is ours alone, and its disk has no room for these files."""

    @property
    def snapshot(self) -> Path:
        """The folder in which `fetch` puts files if no `place` is given. It exists after the first fetch."""

    def stated(self, name: str) -> Stated | None:
        """The sha256 that somebody states for a file, and who; None if nobody does."""

    def cached(self, name: str) -> Path | None:
        """Where this machine's shared cache has the whole file; None if it doesn't."""

    def fetch(self, names: Iterable[str], progress: Progress | None = None, place: Path | None = None) -> LocalFolder:
        """Download those of these files that are not in `place` already, and open that folder; None: `snapshot`."""


class Arrivals:
    """Downloads files in their order, in a thread of its own. Leaving it ends the download that is under way.

    Without `place`, files come into the Hub's cache, which must have a file of this commit already, and stay there.
    With it, they come into this folder, which is ours alone; of those that the Hub's cache has, it gets links. At most
    `room` bytes lie there at a time: the next download waits until `release` has made room. So `room` must be enough
    for all files that are in use at one time.
    """

    def __init__(
        self, remote: Remote, names: Sequence[str], place: Path | None = None, room: int | None = None
    ) -> None:
        self._remote, self._names, self._place, self._room = remote, tuple(names), place, room
        self._there: dict[str, Future[LocalFolder]] = {name: Future() for name in self._names}
        self._held: dict[str, int] = {}
        self._arrived: dict[str, int] = {}
        self._identities: dict[str, list[int]] = {}
        self._changed = threading.Condition()
        self._awaited = ""
        self._ended = False
        if place is not None:
            _prepare(place, self._kept_from_before())
        self.folder = LocalFolder(remote.snapshot if place is None else place)
        """Where a file may be read once `wait` has returned for it."""
        self._hashing = Hashing()
        self._thread = pool(1, "arrivals")
        self._thread.submit(self._fetch_all)

    def wait(
        self, name: str, tell: Tell = lambda *_: None, stop: Callable[[], int | None] = lambda: None
    ) -> Stated | None:
        """Wait until a file is there, and hold it against its sha256; what is stated of it, if anything is.

        Raises what fetching raises; `BadCheckpoint` if the sha256 is another; `Interrupted` once `stop` gives the
        number of a signal.
        """
        with self._changed:
            self._awaited = name
            self._changed.notify()
        future = self._there[name]
        while not wait([future], _TICK).done:
            tell("fetching", sum(self._arrived.copy().values()), name)
            if (signum := stop()) is not None:
                raise Interrupted(signum, f"{signal.Signals(signum).name} while {name} was fetched")
        where = future.result()
        found = self._check(where, name, tell, stop)
        self._identities[name] = self.folder.identity(name)
        return found

    def refuse_if_changed(self, name: str) -> None:
        """`InputChanged` if a file is not the one that was checked."""
        if self.folder.identity(name) != self._identities[name]:
            raise InputChanged(f"{self.folder.path / name}: changed while it was being read")

    def release(self, name: str) -> None:
        """Say that a file is of no more use. In a folder of our own it is removed."""
        self.refuse_if_changed(name)
        self.folder.let_go(name)
        if self._place is None:
            return
        (self._place / name).unlink()
        with self._changed:
            self._held.pop(name, None)
            self._changed.notify()

    def close(self) -> None:
        """End the download that is under way, and begin no other. What has come stays."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.shutdown()
        self._hashing.close()
        self.folder.close()

    def remove(self) -> None:
        """Remove the folder of our own, with all that is left in it."""
        if self._place is not None:
            shutil.rmtree(self._place)

    def _kept_from_before(self) -> set[str]:
        """Files that an earlier run may have brought and that are needed first, as many as there is room for."""
        kept, left = set(), self._room
        for name in self._names:
            nbytes = held_bytes(self._remote, name)
            if left is not None and nbytes > left:
                break
            left = None if left is None else left - nbytes
            kept.add(name)
        return kept

    def _fetch_all(self) -> None:
        for name in self._names:
            try:
                if not self._may_begin(name):
                    return
                folder = self._bring(name)
            except BaseException as exc:  # for whoever waits for the file
                self._there[name].set_exception(exc)
                return
            self._there[name].set_result(folder)

    def _may_begin(self, name: str) -> bool:
        """Wait for room; whether somebody still wants the file."""
        nbytes = 0 if self._place is None else held_bytes(self._remote, name)
        with self._changed:
            while not self._ended and self._room is not None and sum(self._held.values()) + nbytes > self._room:
                if self._awaited == name:  # who waits for it has given up all that can be given up
                    raise WriteFailed(
                        f"{self._place}: `disk` has no room for the {nbytes:,} bytes of {name}, which the Hub's cache "
                        "had and has no more"
                    )
                self._changed.wait()
            self._held[name] = nbytes
            return not self._ended

    def _bring(self, name: str) -> LocalFolder:
        def count(_: str, done: int) -> None:
            if self._ended:
                raise _Ended
            self._arrived[name] = done

        cached = None if self._place is None else self._remote.cached(name)
        if self._place is not None and cached is not None:
            (self._place / name).unlink(missing_ok=True)
            (self._place / name).symlink_to(cached)
            folder = LocalFolder(self._remote.snapshot)  # where its sha256 may be remembered
        else:
            folder = self._remote.fetch([name], count, self._place)
        if self._remote.stated(name) is not None:
            self._hashing.begin(folder, name)
        return folder

    def _check(self, where: LocalFolder, name: str, tell: Tell, stop: Callable[[], int | None]) -> Stated | None:
        stated = self._remote.stated(name)
        if stated is None:
            return None
        try:
            self._hashing.check(where, {name: stated}, lambda done, _, of: tell("checking", done, of), stop)
        except BadCheckpoint as exc:
            refused = exc if where.path != self._place else self._remove_damaged(name, stated)
            refused.resumable = True  # what is made of other files is right
            raise refused from None
        finally:
            where.close()
        return stated

    def _remove_damaged(self, name: str, stated: Stated) -> BadCheckpoint:
        (self.folder.path / name).unlink()
        where = "on the way or where it lies" if stated.by == SUMS else "on the way"
        return BadCheckpoint(
            f"{self._remote.label}: {name}: its sha256 is not {stated.sha256[:12]}…, which {stated.by} states: it was "
            f"damaged {where}, and is removed here"
        )


class _Ended(Exception):
    """Nobody waits for the file any more."""


def held_bytes(remote: Remote, name: str) -> int:
    """What a file takes of the disk in a folder of our own: nothing if a cache has it."""
    return 0 if remote.cached(name) is not None else remote.size(name)


def _prepare(place: Path, kept: set[str]) -> None:
    """Make the folder, or remove from it what an earlier run left that is of no more use."""
    if place.is_symlink():
        place.unlink()
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            for unfinished in path.rglob("*.incomplete"):  # the Hub's library begins a download anew
                unfinished.unlink()
        elif path.name not in kept:
            path.unlink()

"""Progress while a conversion runs: a bar in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from converter.cli.show.words import amount
from converter.observer import Progress

Clock = Callable[[], float]


class _Terminal:
    """Standard error, for a bar: the terminal may go meanwhile, which is no reason to fail."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[tuple[Callable[[Progress], None], Clock]]:
    """A function to report progress to, and a clock of seconds since the start. The bar needs a terminal."""
    started = time.monotonic()

    def clock() -> float:
        return time.monotonic() - started

    if not shown or not sys.stderr.isatty():
        yield (lambda _: None), clock
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Bar(*columns, console=Console(file=cast(TextIO, _Terminal(sys.stderr))), transient=True) as bar:
        task = bar.add_task("planning", total=None, memory="")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.stage,
                completed=progress.done,
                total=progress.total,
                memory=f"{amount(_memory())} of memory",
            )

        yield show, clock


def _memory() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)

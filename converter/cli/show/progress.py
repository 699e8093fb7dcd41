"""Progress while a command runs, on stderr: a bar in a terminal, lines or JSON elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO, cast

from converter.cli.printing import complain
from converter.cli.show.words import amount, duration, share, text_of
from converter.observer import Progress
from converter.samples import resident_memory

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import ProgressColumn

Kind = Literal["auto", "bar", "plain", "json", "none"]

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""
EVENT_SECONDS = 1.0
"""Between two JSON events of one stage."""
SETTLED_SECONDS = 2.0
"""Of a stage, before its rate says anything about the time that is left."""
WITH_SIZE, WITH_MEMORY = 60, 100
"""Columns that a terminal needs for the bar to say more than the stage and the time left."""


class Display(Protocol):
    """Where progress and errors are shown while a command runs."""

    def progress(self, progress: Progress) -> None: ...
    def ended(self, outcome: str, error: str | None) -> None:
        """One of several outputs has ended; `error` says what is wrong with it."""

    def seconds(self) -> float:
        """Since the start."""


@contextmanager
def display(
    kind: Kind = "auto",
    *,
    outputs: int = 1,
    file: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Display]:
    """Show progress on `file`, stderr by default, while a command makes so many outputs.

    auto: a bar in a terminal, else a line every ten seconds. `clock` gives seconds.
    """
    file = sys.stderr if file is None else file
    if kind == "auto":
        kind = "bar" if file.isatty() else "plain"
    if kind == "bar":
        with _bar(file) as bar:
            yield _Bar(outputs, bar, clock)
    else:
        yield {"plain": _Lines, "json": _Events, "none": _Nothing}[kind](outputs, file, clock)


class _Nothing:
    """Shows errors only; what the others build on."""

    def __init__(self, outputs: int, file: TextIO, clock: Callable[[], float]) -> None:
        self.outputs, self.made, self.file = outputs, 0, file
        self._clock, self._started = clock, clock()

    def progress(self, progress: Progress) -> None:
        pass

    def ended(self, outcome: str, error: str | None) -> None:
        self.made += 1
        if error is not None:
            complain(f"{outcome}: {error}")

    def seconds(self) -> float:
        return self._clock() - self._started

    @property
    def count(self) -> str:
        """Of several outputs, which one is being made."""
        return f"{min(self.made + 1, self.outputs)} of {self.outputs}" if self.outputs > 1 else ""


class _Lines(_Nothing):
    """A line every ten seconds, for logs."""

    def __init__(self, outputs: int, file: TextIO, clock: Callable[[], float]) -> None:
        super().__init__(outputs, file, clock)
        self._rate = Rate()
        self._last: float | None = None

    def progress(self, progress: Progress) -> None:
        if progress.stage == "planned":
            with suppress(OSError):
                self.file.write(text_of([f"note: {progress.name}"]))
                self.file.flush()
            return
        now = self.seconds()
        self._rate.note(progress, now)
        if self._last is None:
            self._last = now  # short conversions need no line
        if now - self._last >= LINE_SECONDS and progress.total:
            self._last = now
            with suppress(OSError):
                self.file.write(line_of(progress, self._rate, self.count) + "\n")
                self.file.flush()


class _Events(_Nothing):
    """One JSON object per line, for programs."""

    def __init__(self, outputs: int, file: TextIO, clock: Callable[[], float]) -> None:
        super().__init__(outputs, file, clock)
        self._last: tuple[str, float] = ("", 0.0)

    def progress(self, progress: Progress) -> None:
        stage, last = self._last
        if progress.stage == stage and self.seconds() - last < EVENT_SECONDS and progress.done < progress.total:
            return
        self._last = (progress.stage, self.seconds())
        self._tell({"event": "progress", **vars(progress)})

    def ended(self, outcome: str, error: str | None) -> None:
        self.made += 1
        self._tell({"event": "output", "out": outcome, "error": error})

    def _tell(self, event: dict[str, Any]) -> None:
        event |= {"made": self.made, "outputs": self.outputs, "seconds": round(self.seconds(), 3)}
        with suppress(OSError):
            self.file.write(json.dumps(event) + "\n")
            self.file.flush()


class _Bar(_Nothing):
    """A bar in a terminal; errors are printed above it."""

    def __init__(self, outputs: int, bar: RichBar, clock: Callable[[], float]) -> None:
        super().__init__(outputs, cast(TextIO, bar.console.file), clock)
        self._bar, self._rate = bar, Rate()
        self._task = bar.add_task("planning", total=None, count="", left="", size="", memory="")

    def progress(self, progress: Progress) -> None:
        if progress.stage == "planned":
            said = text_of([f"note: {progress.name}"])
            self._bar.console.print(said, end="", markup=False, highlight=False, soft_wrap=True)
            return
        self._rate.note(progress, self.seconds())
        self._bar.update(
            self._task,
            description=progress.stage,
            completed=progress.done,
            total=progress.total or None,
            count=self.count,
            size=progress.name if not progress.total else share(progress.done, progress.total),
            left=self._rate.left(progress),
            memory=f"{amount(resident_memory())} memory" if progress.total else "",
        )

    def ended(self, outcome: str, error: str | None) -> None:
        self.made += 1
        if error is not None:
            self._bar.console.print(f"error: {outcome}: {error}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bar(file: TextIO) -> Iterator[RichBar]:
    from rich.console import Console
    from rich.constrain import Constrain
    from rich.progress import BarColumn
    from rich.progress import Progress as RichBar

    class Narrow(RichBar):
        """Less wide than the terminal: some go to the next line once the last column is written, and what was written
        before would stay above an error."""

        def get_renderables(self) -> Iterator[Constrain]:
            yield Constrain(self.make_tasks_table(self.tasks), max(console.width - 1, 1))

    console = Console(file=cast(TextIO, _Terminal(file)))
    parts: list[str | ProgressColumn] = [_text("description"), _text("fields[count]"), BarColumn(bar_width=None)]
    parts += [_text("fields[size]")] if console.width >= WITH_SIZE else []
    parts += [_text("fields[left]")]
    parts += [_text("fields[memory]")] if console.width >= WITH_MEMORY else []
    with Narrow(*parts, console=console, transient=True, expand=True) as bar:
        yield bar


def _text(field: str) -> ProgressColumn:
    from rich.progress import TextColumn

    return TextColumn(f"{{task.{field}}}", markup=False)


class Rate:
    """How fast a stage is, and how long it will still take."""

    def __init__(self) -> None:
        self._stage, self._started, self._first, self._last, self._now = "", 0.0, 0, 0, 0.0

    def note(self, progress: Progress, now: float) -> None:
        """Progress at a time in seconds."""
        if progress.stage != self._stage or progress.done < self._last:  # another pass
            self._stage, self._started, self._first = progress.stage, now, progress.done
        self._last, self._now = progress.done, now

    def per_second(self, progress: Progress) -> float | None:
        """Bytes a second; None as long as that is a guess."""
        seconds = self._now - self._started
        done = progress.done - self._first
        return done / seconds if seconds >= SETTLED_SECONDS and done > 0 else None

    def left(self, progress: Progress) -> str:
        """Such as `20 s left`."""
        rate = self.per_second(progress)
        if rate is None or progress.done >= progress.total:
            return ""
        return f"{duration((progress.total - progress.done) / rate, whole=True)} left"


def line_of(progress: Progress, rate: Rate, count: str) -> str:
    """Progress as a line of a log."""
    parts = [f"{100 * progress.done // progress.total} %", share(progress.done, progress.total)]
    if (per_second := rate.per_second(progress)) is not None:
        parts.append(f"{amount(per_second)}/s")
    if left := rate.left(progress):
        parts.append(left)
    return f"{progress.stage}{count and f' {count}'}: {', '.join(parts)}"


class _Terminal:
    """A terminal that may go away meanwhile, which is no reason to fail."""

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

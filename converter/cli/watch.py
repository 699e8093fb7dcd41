"""Who hears of a run besides the terminal: a file of metrics for Prometheus, spans for OpenTelemetry."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from converter.cli.options import Printing
    from converter.cli.show.progress import Display
    from converter.observer import Progress
    from converter.samples import Samples

_NO_NAME = re.compile(r"[^a-zA-Z0-9]+")


class Hearing(Protocol):
    """Hears how far a run is."""

    def progress(self, progress: Progress) -> None: ...


class Listener(Hearing, Protocol):
    """Hears all of a run. Raises nothing once it is made."""

    def ended(self, outcome: str, error: str | None) -> None:
        """One of several outputs has ended; `error` says what is wrong with it."""

    def result(self, figures: Mapping[str, float]) -> None:
        """The figures of the result, by name."""

    def close(self, code: int, why: str) -> None:
        """The run has ended with this exit code. `why` says what failed; it is empty if nothing did."""


class Watch:
    """A run, as its listeners hear of it."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners

    def beside(self, shown: Display, samples: Samples | None = None) -> Display:
        """A display that passes everything on to the listeners, too, and progress also to `samples`."""
        hearing: list[Hearing] = [*self._listeners]
        if samples is not None:
            hearing.append(samples)
        return _Beside(shown, hearing, self._listeners) if hearing else shown

    def result(self, found: Mapping[str, Any]) -> None:
        """The result as JSON values."""
        for listener in self._listeners:
            listener.result(figures_in(found))


class _Beside:
    def __init__(self, shown: Display, hearing: Sequence[Hearing], listeners: Sequence[Listener]) -> None:
        self._shown, self._hearing, self._listeners = shown, hearing, listeners
        self.seconds = shown.seconds

    def progress(self, progress: Progress) -> None:
        self._shown.progress(progress)
        for one in self._hearing:
            one.progress(progress)

    def ended(self, outcome: str, error: str | None) -> None:
        self._shown.ended(outcome, error)
        for listener in self._listeners:
            listener.ended(outcome, error)


def watch_run(printing: Printing, subject: object) -> Watch:
    """Watch the command that runs, until it ends. `subject`: what it makes or looks at.

    A `ConversionRefused` if a listener that is asked for can't be had.
    """
    context = click.get_current_context()
    command = context.command_path.removeprefix("convert ")
    return context.with_resource(_watched(printing, command, str(subject)))


@contextmanager
def _watched(printing: Printing, command: str, subject: str) -> Iterator[Watch]:
    listeners: list[Listener] = []
    if printing.metrics is not None:
        from converter.cli.metrics import MetricsFile

        listeners.append(MetricsFile(printing.metrics, command, subject))
    if any(os.environ.get(name) for name in ENDPOINTS):
        from converter.cli.spans import spans

        listeners += spans(command, subject)
    try:
        yield Watch(listeners)
    except BaseException as exc:
        for listener in listeners:
            listener.close(_code_of(exc), _why(exc))
        raise
    for listener in listeners:
        listener.close(0, "")


ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Environment variables that say where spans go. Without them no spans are made."""


def _code_of(exc: BaseException) -> int:
    """The exit code that `cli.main` will give the process."""
    code = getattr(exc, "exit_code", 1)
    return code if isinstance(code, int) else 1


def _why(exc: BaseException) -> str:
    from converter.cli.printing import as_options

    return "" if isinstance(exc, click.exceptions.Exit) else as_options(str(exc)) or type(exc).__name__


def figures_in(found: Mapping[str, Any], of: str = "") -> dict[str, float]:
    """All numbers among JSON values: {"error": {"mean": 0.1}} has error_mean. Of a list, how many it has."""
    figures: dict[str, float] = {}
    for key, value in found.items():
        name = of + _NO_NAME.sub("_", key).strip("_").lower()
        if isinstance(value, Mapping):
            figures |= figures_in(value, f"{name}_")
        elif isinstance(value, list | tuple):
            figures[f"{name}_count"] = float(len(value))
        elif isinstance(value, bool | int | float):
            figures[name] = float(value)
    return figures

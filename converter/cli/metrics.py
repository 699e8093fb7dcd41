"""A run as a file of metrics, for the textfile collector of Prometheus. The only import of prometheus_client."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import ConversionRefused
from converter.samples import Samples, stages
from converter.write.durable import writing

if TYPE_CHECKING:
    from converter.observer import Progress

PREFIX = "nf4_converter_"
SECONDS = 10.0
"""Between two updates of the file during a run."""
_SAID = {
    "running": "1 while the run is under way",
    "start_timestamp_seconds": "When the run began",
    "end_timestamp_seconds": "When the run ended",
    "exit_code": "0 done, 1 failed, 2 refused, 3 undecided, 4 below a gate",
    "memory_bytes": "Memory that the process holds",
    "outputs_made": "Outputs of a batch or a pipeline that are made",
    "outputs_failed": "Outputs of a batch or a pipeline that failed or were refused",
    "stage_seconds": "How long each stage took so far",
    "stage_bytes": "Bytes of the base that each stage is done with",
    "stage_bytes_planned": "Bytes of the base that each stage takes in all",
}


class MetricsFile:
    """Writes a run's metrics to a file: when it begins, every ten seconds, and when it ends.

    The file is replaced each time, so that a reader sees all or nothing. `clock` gives seconds since 1970.
    `ConversionRefused` without prometheus_client, `WriteFailed` if the file can't be written.
    """

    def __init__(self, file: Path, command: str, subject: str, clock: Callable[[], float] = time.time) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            raise ConversionRefused(
                "`metrics`: prometheus-client is not installed: pip install 'nf4-converter[telemetry]'"
            ) from None
        self._file, self._clock, self._labels = file, clock, {"command": command, "subject": subject}
        self._registry: Any = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._samples = Samples(clock)
        self._written = clock()
        self._outputs = {"outputs_made": 0, "outputs_failed": 0}
        self._set("running", 1)
        self._set("start_timestamp_seconds", self._written)
        with writing(file):
            self._write()

    def progress(self, progress: Progress) -> None:
        self._samples.progress(progress)
        if progress.stage != "planned" and progress.total:
            self._set("stage_bytes", progress.done, stage=progress.stage)
            self._set("stage_bytes_planned", progress.total, stage=progress.stage)
        if self._clock() - self._written >= SECONDS:
            self._write_if_possible()

    def ended(self, outcome: str, error: str | None) -> None:
        which = "outputs_made" if error is None else "outputs_failed"
        self._outputs[which] += 1
        self._set(which, self._outputs[which])

    def result(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._set(f"result_{name}", value)

    def close(self, code: int, why: str) -> None:
        self._set("running", 0)
        self._set("exit_code", code)
        self._set("end_timestamp_seconds", self._clock())
        self._write_if_possible()

    def _set(self, name: str, value: float, **more: str) -> None:
        from prometheus_client import Gauge

        labels = self._labels | more
        if name not in self._gauges:
            said = _SAID.get(name, "As --json prints it")
            self._gauges[name] = Gauge(PREFIX + name, said, list(labels), registry=self._registry)
        self._gauges[name].labels(**labels).set(value)

    def _write_if_possible(self) -> None:
        """A full disk must not end the run because of its metrics."""
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        from prometheus_client import write_to_textfile

        taken = self._samples.ended()
        self._set("memory_bytes", taken[-1].memory)
        for stage in stages(taken):
            self._set("stage_seconds", stage.seconds, stage=stage.name)
        self._written = self._clock()
        write_to_textfile(str(self._file), self._registry)

"""A run as spans of OpenTelemetry: one for the whole, one for each stage. The only import of opentelemetry.

Spans go where the standard variables say (OTEL_EXPORTER_OTLP_ENDPOINT and others), over HTTP. With TRACEPARENT, as CI
systems set it, the run is a part of that trace.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converter.cli.printing import note

if TYPE_CHECKING:
    from converter.observer import Progress

SERVICE, PREFIX = "nf4-converter", "nf4_converter."
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def spans(command: str, subject: str) -> list[Spans]:
    """A list of one listener. It is empty if the libraries are missing or another protocol is asked for; a note says
    so."""
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "http/protobuf")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return []
    if protocol != "http/protobuf":
        note(f"no spans: {protocol} is asked for, and they go by http/protobuf only")
        return []
    try:
        return [Spans(command, subject)]
    except ImportError:
        note("no spans: opentelemetry is not installed: pip install 'nf4-converter[telemetry]'")
        return []


class Spans:
    """Sends a span when a stage ends, and the one of the whole when the run does. `ImportError` without the SDK."""

    def __init__(self, command: str, subject: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        own = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": SERVICE}
        self._provider: Any = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(SERVICE)
        carrier = {key: os.environ[key.upper()] for key in ("traceparent", "tracestate") if key.upper() in os.environ}
        above = TraceContextTextMapPropagator().extract(carrier)
        self._whole = self._tracer.start_span(
            command, above, attributes={f"{PREFIX}command": command, f"{PREFIX}subject": subject}
        )
        self._begin("planning")

    def progress(self, progress: Progress) -> None:
        if progress.stage == "planned":
            self._stage.add_event("note", {"note": progress.name})
            return
        if progress.stage != self._name:
            self._end_stage()
            self._begin(progress.stage)
        self._done = progress.done

    def ended(self, outcome: str, error: str | None) -> None:
        self._whole.add_event("output", {"out": outcome} | ({} if error is None else {"error": error}))

    def result(self, figures: Mapping[str, float]) -> None:
        self._whole.set_attributes({f"{PREFIX}{name}": value for name, value in figures.items()})

    def close(self, code: int, why: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._end_stage()
        self._whole.set_attribute("process.exit.code", code)
        self._whole.set_status(Status(StatusCode.ERROR, why) if code else Status(StatusCode.OK))
        self._whole.end()
        self._provider.shutdown()  # sends what is left, and waits for it: ten seconds at most

    def _begin(self, stage: str) -> None:
        from opentelemetry.trace import set_span_in_context

        self._name, self._done = stage, 0
        self._stage: Any = self._tracer.start_span(stage, set_span_in_context(self._whole))

    def _end_stage(self) -> None:
        self._stage.set_attribute(f"{PREFIX}bytes", self._done)
        self._stage.end()

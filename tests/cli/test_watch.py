"""Who hears of a run besides the terminal: metrics in a file, spans that are sent to a collector."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from converter import convert
from converter.cli.metrics import MetricsFile
from converter.cli.watch import figures_in
from converter.errors import WriteFailed
from converter.observer import Progress
from tests.batch.scenes import adapters
from tests.cli.conftest import Run
from tests.limits import HANG

Metrics = dict[str, float]


def metrics_in(file: Path) -> Metrics:
    """The metrics in a file, by name, such as `exit_code` or `stage_seconds planning`, without the common prefix."""
    return {
        sample.name.removeprefix("nf4_converter_") + f" {sample.labels.get('stage', '')}".rstrip(): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }


def labels_in(file: Path) -> set[tuple[str, str]]:
    return {
        (sample.labels["command"], sample.labels["subject"])
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }


class Seconds:
    """A clock that is moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_conversion_leaves_its_figures_as_metrics(
    run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "convert.prom"

    ran = run("--base", base, "--adapter", adapter, "--out", out, "--metrics", file, "--json")

    printed, metrics = json.loads(ran.out), metrics_in(file)
    assert ran.code == 0
    assert labels_in(file) == {("convert", str(out))}
    assert metrics["result_survival_mean"] == printed["survival"]["mean"]
    assert metrics["result_error_worst"] == printed["error"]["worst"]
    assert metrics["result_output_bytes"] == printed["output_bytes"]
    assert metrics["result_tensors_merged"] == printed["tensors"]["merged"]
    assert (metrics["running"], metrics["exit_code"]) == (0, 0)
    assert metrics["start_timestamp_seconds"] <= metrics["end_timestamp_seconds"]
    assert metrics["stage_bytes converting"] == metrics["stage_bytes_planned converting"] == printed["base_bytes"]
    assert {"stage_seconds planning", "stage_seconds converting", "stage_seconds sealing"} <= metrics.keys()
    assert metrics["memory_bytes"] > 10_000_000


def test_a_run_that_is_refused_or_misses_a_gate_says_so_by_its_exit_code(
    run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    file, common = tmp_path / "convert.prom", ["--base", base, "--adapter", adapter, "--out", out]

    missed = run(*common, "--max-error", "0.0001", "--metrics", file)
    assert (missed.code, metrics_in(file)["exit_code"]) == (4, 4)
    refused = run(*common[:2], "--adapter", base, *common[4:], "--metrics", file)
    assert (refused.code, metrics_in(file)["exit_code"]) == (2, 2)
    assert metrics_in(file)["running"] == 0


def test_batches_verify_and_evaluate_have_metrics_too(run: Run, base: Path, out: Path, tmp_path: Path) -> None:
    adapters(tmp_path / "ads", base)
    (tmp_path / "ads" / "a1" / "adapter_model.safetensors").write_bytes(b"nothing")
    file = tmp_path / "any.prom"

    batch = run("--base", base, "--adapter", tmp_path / "ads" / "*", "--out", out, "--metrics", file, "-q")
    of_batch = metrics_in(file)
    verified = run("verify", out / "a0", "--metrics", file)
    of_verify, labels = metrics_in(file), labels_in(file)

    assert (batch.code, of_batch["exit_code"]) == (1, 1)
    assert (of_batch["outputs_made"], of_batch["outputs_failed"]) == (2, 1)
    assert of_batch["result_outputs_count"] == 3
    assert verified.code == 0
    assert labels == {("verify", str(out / "a0"))}
    assert (of_verify["result_good"], of_verify["result_problems_count"]) == (1, 0)


def test_a_file_that_cant_be_written_is_refused_before_anything_is_made(
    run: Run, base: Path, out: Path, tmp_path: Path
) -> None:
    ran = run("--base", base, "--out", out, "--metrics", tmp_path / "gone" / "convert.prom")

    assert (ran.code, out.exists()) == (1, False)
    assert str(tmp_path / "gone") in ran.err
    with pytest.raises(WriteFailed):
        MetricsFile(tmp_path / "gone" / "convert.prom", "convert", "out")


def test_while_a_run_is_under_way_the_file_is_replaced_every_ten_seconds(tmp_path: Path) -> None:
    file, clock = tmp_path / "convert.prom", Seconds()
    metrics = MetricsFile(file, "convert", "out", clock)
    assert metrics_in(file)["running"] == 1

    clock.now = 1003.0
    metrics.progress(Progress("converting", 50, 200, "a"))
    assert "stage_bytes converting" not in metrics_in(file)
    clock.now = 1012.0
    metrics.progress(Progress("converting", 150, 200, "b"))
    found = metrics_in(file)
    assert (found["stage_bytes converting"], found["stage_seconds planning"]) == (150, 3)

    clock.now = 1020.0
    metrics.progress(Progress("planning", 0, 0, "the next base"))
    clock.now = 1024.0
    file.unlink()
    file.mkdir()
    metrics.close(0, "")
    file.rmdir()
    metrics.close(0, "")
    found = metrics_in(file)
    assert (found["stage_seconds planning"], found["stage_seconds converting"]) == (7, 17)
    assert [path.name for path in tmp_path.iterdir()] == ["convert.prom"], "no other file is left"


def test_figures_are_the_numbers_among_the_values() -> None:
    found = {"error": {"mean": 0.5, "worst_tensor": "q"}, "good": True, "notes": ["a", "b"], "out": "x", "top-1": None}

    assert figures_in(found) == {"error_mean": 0.5, "good": 1.0, "notes_count": 2.0}


class Collector(BaseHTTPRequestHandler):
    """Takes spans as a collector of OpenTelemetry does."""

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(raw)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def spans_at(collector: Any) -> tuple[list[Any], dict[str, str]]:
    """All spans that came, and the attributes of who sent them."""
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    whole = [of for _, request in collector.requests for of in request.resource_spans]
    resource = {one.key: one.value.string_value for one in whole[0].resource.attributes}
    return [span for of in whole for scope in of.scope_spans for span in scope.spans], resource


def run_watched(
    arguments: list[object], collector: ThreadingHTTPServer, **more: str
) -> subprocess.CompletedProcess[str]:
    address = f"http://127.0.0.1:{collector.server_address[1]}"
    return subprocess.run(
        [sys.executable, "-m", "converter", *map(str, arguments)],
        env=os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": address} | more,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def test_a_conversion_is_a_trace_with_a_span_for_each_stage(
    collector: ThreadingHTTPServer, base: Path, adapter: Path, out: Path
) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    ran = run_watched(
        ["--base", base, "--adapter", adapter, "--out", out, "--json"],
        collector,
        TRACEPARENT=f"00-{trace}-{parent}-01",
    )

    printed = json.loads(ran.stdout)
    spans, resource = spans_at(collector)
    by_name = {span.name: span for span in spans}
    whole = by_name.pop("convert")
    attributes = {one.key: one.value for one in whole.attributes}
    assert (ran.returncode, ran.stderr) == (0, "")
    assert resource["service.name"] == "nf4-converter"
    assert {"planning", "converting", "sealing"} <= by_name.keys()
    assert all(span.parent_span_id == whole.span_id for span in by_name.values())
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (trace, parent)
    assert attributes["nf4_converter.subject"].string_value == str(out)
    assert attributes["nf4_converter.survival_mean"].double_value == printed["survival"]["mean"]
    assert attributes["process.exit.code"].int_value == 0
    assert by_name["converting"].attributes[0].value.int_value == printed["base_bytes"]
    assert convert(base, adapter, out).nothing_to_do, "no byte of the output knows of it"


def test_a_span_of_what_failed_says_why(collector: ThreadingHTTPServer, base: Path, out: Path) -> None:
    ran = run_watched(["--base", base, "--adapter", base, "--out", out], collector)

    spans, _ = spans_at(collector)
    (whole,) = [span for span in spans if span.name == "convert"]
    assert ran.returncode == 2
    assert whole.status.code == 2, "ERROR"
    assert f"error: {whole.status.message}" == ran.stderr.strip()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_SDK_DISABLED": "true"}, ""),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "note: no spans: grpc is asked for, and they go by http/protobuf only\n",
        ),
    ],
)
def test_spans_that_arent_wanted_or_cant_be_sent_that_way_are_not_sent(
    variables: dict[str, str], said: str, collector: ThreadingHTTPServer, base: Path, out: Path
) -> None:
    ran = run_watched(["--base", base, "--out", out, "-q"], collector, **variables)

    assert (ran.returncode, ran.stderr) == (0, said)
    assert not collector.requests  # type: ignore[attr-defined]


def test_a_collector_that_isnt_there_costs_the_conversion_nothing(base: Path, out: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.server_close()

    ran = run_watched(["--base", base, "--out", out, "-q"], server, OTEL_EXPORTER_OTLP_TIMEOUT="1")

    assert ran.returncode == 0
    assert out.is_dir()

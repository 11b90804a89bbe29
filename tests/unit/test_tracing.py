"""Traces, looked at in memory: context, sampling, times, status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="traces need pip install 'trivium[otel]'")
from opentelemetry.sdk.trace import ReadableSpan  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

from trivium.runtime.tracing import METHOD, Stage, Trace, Tracer  # noqa: E402

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = [Stage("queue", 110, 120), Stage("decode", 120, 130, 0), Stage("compute", 130, 190, 0)]


def record(
    metadata: Iterable[tuple[str, str | bytes]], ratio: float = 1.0, status: str = "OK"
) -> tuple[Trace, dict[str, ReadableSpan]]:
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, ratio)
    trace = tracer.record(metadata, 100, 200, status, {"trivium.pictures": 1}, STAGES)
    tracer.close()
    return trace, {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_a_server_span_over_its_stages() -> None:
    trace, spans = record([("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "a=b"), ("x-bin", b"\xff")])
    assert trace == Trace(TRACE, True)
    assert set(spans) == {METHOD, "queue", "decode", "compute"}
    root = spans[METHOD]
    assert root.kind is SpanKind.SERVER
    assert root.parent is not None
    assert (f"{root.parent.span_id:016x}", root.parent.trace_state.get("a")) == (PARENT, "b")
    assert (root.start_time, root.end_time) == (100, 200)
    assert root.attributes is not None
    assert dict(root.attributes) == {
        "rpc.system.name": "grpc", "rpc.method": METHOD, "rpc.response.status_code": "OK", "trivium.pictures": 1,
    }  # fmt: skip
    assert root.resource.attributes["service.name"] == "trivium"
    assert root.status.status_code is StatusCode.UNSET
    for stage in STAGES:
        span = spans[stage.name]
        assert span.parent is not None
        assert root.context is not None
        assert span.parent.span_id == root.context.span_id
        assert (span.start_time, span.end_time) == (stage.start, stage.end)
        assert (span.attributes or {}).get("trivium.picture") == stage.picture


@pytest.mark.parametrize(
    ("metadata", "ratio", "sampled"),
    [
        ([], 1.0, True),
        ([], 0.0, False),
        ([("traceparent", f"00-{TRACE}-{PARENT}-01")], 0.0, True),
        ([("traceparent", f"00-{TRACE}-{PARENT}-00")], 1.0, False),
        ([("traceparent", "00-nonsense-01")], 0.0, False),
        ([("traceparent", f"00-{'0' * 32}-{PARENT}-01")], 0.0, False),
    ],
)
def test_a_parent_decides_and_else_the_ratio(
    metadata: list[tuple[str, str | bytes]], ratio: float, sampled: bool
) -> None:
    trace, spans = record(metadata, ratio)
    assert trace.sampled is sampled
    assert bool(spans) is sampled
    assert len(trace.id) == 32


@pytest.mark.parametrize(("status", "fault"), [("INTERNAL", True), ("INVALID_ARGUMENT", False)])
def test_only_the_servers_faults_are_errors(status: str, fault: bool) -> None:
    root = record([], status=status)[1][METHOD]
    assert (root.status.status_code is StatusCode.ERROR) is fault
    assert root.attributes is not None
    assert root.attributes["rpc.response.status_code"] == status


def test_without_the_packages_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from trivium.runtime.tracing import Tracer\n"
        "from trivium.runtime.errors import MissingExtra\n"
        "try: Tracer.to('http://127.0.0.1:4317', 1.0)\n"
        "except MissingExtra as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "the packages of OpenTelemetry are not installed; run: pip install 'trivium[otel]'\n"

"""What an operator sees of a real server: traces at a collector, exemplars, the access log, `trivium top`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from tests.integration.conftest import Serve, ServerProcess

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
EVIL = 'x\n{"level":"error"}\u2028\x1b[2J'


class Collector:
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        trace_pb = pytest.importorskip(
            "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs pip install 'trivium[otel]'"
        )
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

        self.spans: list[Any] = []
        self.service = ""
        outer = self

        class Trace(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                for resource in request.resource_spans:
                    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
                    outer.service = attributes["service.name"]
                    for scope in resource.scope_spans:
                        outer.spans.extend(scope.spans)
                return trace_pb.ExportTraceServiceResponse()

        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Trace(), self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.server.stop(None)


def message(pictures: NDArray[np.uint8], name: str = "", model: str = "tiny") -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=name)
    request.inputs.add(name="image", datatype="UINT8", shape=pictures.shape)
    request.raw_input_contents.append(pictures.tobytes())
    return request


def encoded(picture: NDArray[np.uint8]) -> Any:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="encoded_image", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(out.getvalue()).to_bytes(4, "little") + out.getvalue())
    return request


def ask(url: str, request: Any, metadata: Any = None, timeout: float = 30.0) -> str:
    """The status of a request."""
    with grpc.insecure_channel(url) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def access_lines(server: ServerProcess) -> list[dict[str, Any]]:
    """The access log; every line of the log must be an object."""
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    return [line for line in lines if line["logger"] == "trivium.access"]


def test_a_request_is_found_in_trace_log_and_exemplar(
    serve: Serve, tiny_bundle: Path, some_pictures: NDArray[np.uint8], collector: Collector
) -> None:
    server = serve(
        tiny_bundle, "--log-format", "json", "--access-log", "--trace-ratio", 0,
        "--trace-endpoint", f"http://127.0.0.1:{collector.port}",
    )  # fmt: skip
    before = time.time_ns()
    assert ask(server.url, message(some_pictures[:3], "my id"), SAMPLED) == "OK"
    after = time.time_ns()
    assert ask(server.url, encoded(some_pictures[0]), SAMPLED) == "OK"
    assert ask(server.url, message(some_pictures[:1]), (("traceparent", f"00-{TRACE}-{PARENT}-00"),)) == "OK"
    assert ask(server.url, message(some_pictures[:1])) == "OK"
    assert ask(server.url, message(some_pictures[:, :8]), SAMPLED) == "INVALID_ARGUMENT"
    assert ask(server.url, message(some_pictures[:1], EVIL, model=EVIL)) == "NOT_FOUND"

    lines = access_lines(server)
    assert [line["status"] for line in lines] == ["OK"] * 4 + ["INVALID_ARGUMENT", "NOT_FOUND"]
    first = lines[0]
    assert (first["request_id"], first["model"], first["version"], first["pictures"]) == ("my id", "tiny", "1", 3)
    assert first["trace_id"] == TRACE
    assert first["peer"].startswith("ipv4:127.0.0.1:")
    assert first["total_ms"] > first["queue_ms"] >= 0
    assert all(re.fullmatch("[0-9a-f]{16}", line["request_id"]) for line in lines[1:5])
    assert lines[2]["trace_id"] == TRACE
    assert lines[3]["trace_id"] != TRACE
    assert "unexpected shape" in lines[4]["reason"]
    assert (lines[5]["request_id"], lines[5]["model"]) == (EVIL, EVIL)
    assert str(tiny_bundle) not in json.dumps(lines)

    def openmetrics() -> str:
        request = urllib.request.Request(
            f"http://{server.ready['http']}/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
            return str(response.read().decode())

    families = {family.name: family for family in text_string_to_metric_families(openmetrics())}
    exemplars = [
        (sample.labels["stage"], sample.exemplar)
        for sample in families["trivium_stage_seconds"].samples
        if sample.exemplar is not None
    ]
    assert {stage for stage, _ in exemplars} == {"decode", "queue", "compute", "route", "total"}
    assert {exemplar.labels["trace_id"] for _, exemplar in exemplars} == {TRACE}
    assert all(before * 1e-9 <= float(exemplar.timestamp) <= time.time() for _, exemplar in exemplars)
    status, text = server.get("/metrics")
    assert status == 200
    assert "trace_id" not in text
    assert "# EOF" not in text

    # the server's end hands on what is left
    assert server.stop() == 0
    assert collector.service == "trivium"
    spans = collector.spans
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    roots = [span for span in spans if span.parent_span_id.hex() == PARENT]
    statuses = [{a.key: a.value for a in root.attributes}["rpc.response.status_code"].string_value for root in roots]
    assert statuses == ["OK", "OK", "INVALID_ARGUMENT"]
    root = roots[0]
    assert before <= root.start_time_unix_nano < root.end_time_unix_nano <= after
    children = [span for span in spans if span.parent_span_id == root.span_id]
    assert sorted(span.name for span in children) == ["compute"] * 3 + ["queue"] + ["route"] * 3
    for span in children:
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    second = [span for span in spans if span.parent_span_id == roots[1].span_id]
    ordered = sorted(second, key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in ordered] == ["queue", "decode", "compute", "route"]
    assert not [span for span in spans if span.parent_span_id == roots[2].span_id]


def test_a_collector_that_is_away_costs_no_request_and_no_end(
    serve: Serve, tiny_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs pip install 'trivium[otel]'")
    server = serve(tiny_bundle, "--trace-endpoint", "http://127.0.0.1:1", "--log-format", "json")
    for _ in range(5):
        assert ask(server.url, message(some_pictures[:1])) == "OK"
    start = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - start < 20
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert any(line["logger"].startswith("opentelemetry") for line in lines)
    assert not [line for line in lines if line["logger"] == "trivium.access"]


def test_an_internal_error_is_found_in_the_log_by_the_id_the_client_got(
    serve: Serve, build_bundle: Any, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import helper

    from trivium.runtime.bundle import read_manifest, seal

    # the square root of 250 - x: black passes the self-test, white is no number
    root = build_bundle(tmp_path / "bundle")
    model = onnx.load(root / "model.onnx")
    model.graph.node[0].output[0] = "plain"
    model.graph.node.insert(1, helper.make_node("Sub", ["limit", "plain"], ["left"]))
    model.graph.node.insert(2, helper.make_node("Sqrt", ["left"], ["float"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(250), "limit"))
    onnx.save(model, root / "model.onnx")
    (root / "golden.npz").unlink()
    seal(root, read_manifest(root).model_copy(update={"golden": None}))
    server = serve(root, "--log-format", "json")
    white = np.full((1, 32, 32, 3), 255, np.uint8)
    with grpc.insecure_channel(server.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(message(white), timeout=30)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    told = dict(caught.value.trailing_metadata())["request-id"]
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (found,) = [line for line in lines if line.get("request_id") == told]
    assert (found["level"], found["model"]) == ("error", "tiny")


def test_queue_age_grows_while_a_picture_waits(
    serve: Serve, slow_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    server = serve(slow_bundle, "--instances", 1)
    assert server.metric("trivium_queue_age_seconds") == 0
    asking = threading.Thread(target=ask, args=(server.url, message(some_pictures[[0] * 40], model="slow"), None, 120))
    asking.start()
    server.wait_until(lambda: server.metric("trivium_queue_age_seconds") > 0.1)
    assert server.metric("trivium_queue_depth") > 0
    asking.join()
    assert server.metric("trivium_queue_age_seconds") == 0


def top(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivium", "top", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_top_shows_a_server_and_says_when_it_is_gone(
    serve: Serve, tiny_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    server = serve(tiny_bundle)
    address = server.ready["http"]
    command = [sys.executable, "-m", "trivium", "top", address, "--json", "--interval", "0.2"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        assert watching.stderr is not None
        json.loads(watching.stdout.readline())
        for _ in range(5):
            assert ask(server.url, message(some_pictures[:2])) == "OK"
        while not (seen := json.loads(watching.stdout.readline()))["models"][0]["pictures_per_second"]:
            pass
        (model,) = seen["models"]
        assert (seen["server"], seen["ready"], model["name"]) == (address, True, "tiny")
        assert sum(model["head_share"].values()) == pytest.approx(1)
        assert 0 < model["stage_seconds"]["compute"]["p50"] <= model["stage_seconds"]["total"]["p99"]
        assert seen["rss_bytes"] > 10 << 20
        printed = top(address, "--once", "--interval", "0.2")
        assert printed.returncode == 0, printed.stderr
        for words in ("● ready", "tiny version 1", "combined", "entropy"):
            assert words in printed.stdout
        server.stop(signal.SIGKILL)
        for line in watching.stderr:
            assert re.fullmatch(rf"{address}: .+; trying again\n", line)
            break
        assert watching.poll() is None
    finally:
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130
    assert watching.stderr.read().count("Traceback") == 0


def test_top_lives_on_a_terminal_until_interrupted(server: ServerProcess) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        command = [sys.executable, "-m", "trivium", "top", server.ready["http"], "--interval", "0.2"]
        os.execv(sys.executable, command)
    seen = b""
    end = time.monotonic() + 60
    try:
        while seen.count(b"ready") < 3 and time.monotonic() < end:
            seen += os.read(terminal, 1 << 16)
        os.kill(pid, signal.SIGINT)
        with contextlib.suppress(OSError):
            while data := os.read(terminal, 1 << 16):
                seen += data
    finally:
        status = os.waitpid(pid, 0)[1]
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert b"tiny/3" in seen
    # the alternate screen and the cursor are as they were
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h")
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    assert b"Traceback" not in seen


def test_top_refuses_what_is_no_server_in_one_line(server: ServerProcess) -> None:
    for address, words in (
        ("127.0.0.1:1", "Connection refused"),
        ("nonsense", "expected HOST:PORT"),
        ("h:99999", "expected HOST:PORT"),
        (server.url, "not of gRPC"),
    ):
        result = top(address, "--once")
        assert result.returncode in (1, 2)
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert words in result.stderr
    assert "--interval must be" in top("--interval", "0").stderr

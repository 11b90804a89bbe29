"""A server process as a whole: its answers equal the predictor's, its health, metrics, start and end."""

from __future__ import annotations

import asyncio
import gc
import io
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2

from trivium.runtime.bundle import digest
from trivium.runtime.client import Client
from trivium.runtime.config import Settings
from trivium.runtime.errors import InvalidRequest, UnknownModel
from trivium.runtime.predictor import Prediction, Predictor
from trivium.runtime.server import Server

if TYPE_CHECKING:
    from tests.integration.conftest import Serve, ServerProcess

FIELDS = (
    "probabilities", "class_id", "label", "head", "head_probabilities", "predictive_entropy", "mutual_information",
    "divergence", "energy",
)  # fmt: skip


def content(prediction: Prediction) -> tuple[Any, ...]:
    """All of an answer but its timings, bit for bit."""
    values = (getattr(prediction, name) for name in FIELDS)
    return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> list[tuple[Any, ...]]:
    predictor = Predictor.load(tiny_bundle)
    return [content(predictor.infer(image)) for image in some_pictures]


def test_answers_are_the_predictors_bit_for_bit_whatever_runs_beside(
    server: ServerProcess, some_pictures: NDArray[np.uint8], expected: list[tuple[Any, ...]]
) -> None:
    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(15):
            chosen = rng.integers(0, len(some_pictures), rng.integers(1, 9))
            found = client.predict([some_pictures[i] for i in chosen])
            assert [content(one) for one in found] == [expected[i] for i in chosen]

    with Client(server.url, "tiny", "1") as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


@pytest.mark.parametrize("transport", ["http2", "grpc"])
def test_pictures_that_run_together_have_their_own_answers_and_errors(
    serve: Serve,
    tiny_bundle: Path,
    some_pictures: NDArray[np.uint8],
    expected: list[tuple[Any, ...]],
    transport: str,
) -> None:
    server = serve(
        tiny_bundle, "--transport", transport, "--instances", "1", "--batch", "4", "--max-delay-ms", "20",
        "--preferred-batches", "2,4",
    )  # fmt: skip

    def ask(i: int) -> None:
        if i % 5 == 4:
            with pytest.raises(InvalidRequest, match="not a JPEG"):
                client.predict(b"no picture")
        else:
            assert [content(one) for one in client.predict(some_pictures[i % 8])] == [expected[i % 8]]

    with Client(server.url, "tiny", "1") as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(80)))


def test_answers_survive_a_restart(
    serve: Serve, tiny_bundle: Path, some_pictures: NDArray[np.uint8], expected: list[tuple[Any, ...]]
) -> None:
    with Client(serve(tiny_bundle, "--instances", "3").url) as client:
        assert [content(one) for one in client.predict(list(some_pictures))] == expected


def test_torch_is_not_in_the_process(server: ServerProcess) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libonnxruntime" in maps or "onnxruntime_pybind11" in maps
    assert "libtorch" not in maps


def test_ready_within_two_cpu_seconds(serve: Serve, tiny_bundle: Path) -> None:
    times = psutil.Process(serve(tiny_bundle).process.pid).cpu_times()
    # CPU seconds, for a loaded machine's clock says nothing
    assert times.user + times.system < 2.5


def test_health_check_and_watch(serve: Serve, tiny_bundle: Path) -> None:
    server = serve(tiny_bundle, "--grace-seconds", "1")
    with grpc.insecure_channel(server.url) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "tiny", "inference.GRPCInferenceService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND

        left = stub.Watch(health_pb2.HealthCheckRequest(service="tiny"))
        assert next(left).status == health_pb2.HealthCheckResponse.SERVING
        left.cancel()
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="tiny"), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert server.get("/readyz") == (200, "ready\n")
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # the grace time: not ready, alive, still answering
        assert server.get("/readyz")[0] == 503
        assert server.get("/healthz")[0] == 200
        with Client(server.url) as client:
            assert not client.ready()
            assert len(client.predict([np.zeros((32, 32, 3), np.uint8)])) == 1
        assert server.process.wait(30) == 0


def test_reflection_names_the_services(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.url) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([ask]))
        names = {service.name for service in answer.list_services_response.service}
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
        (answer,) = stub.ServerReflectionInfo(iter([ask]))
        assert answer.file_descriptor_response.file_descriptor_proto


def test_metrics_count_what_happened(serve: Serve, tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    server = serve(tiny_bundle)
    labels = {"model": "tiny", "version": "1"}
    with Client(server.url) as client:
        found = client.predict(list(some_pictures[:5])) + client.predict([some_pictures[5]], router="robust")
        for wrong in ([b"no picture"], [np.zeros((8, 8, 3), np.uint8)]):
            with pytest.raises(InvalidRequest):
                client.predict(wrong)
        with Client(server.url, "nobody") as other, pytest.raises(UnknownModel):
            other.predict([some_pictures[0]])
    assert server.metric("trivium_requests_total", **labels, code="OK") == 2
    assert server.metric("trivium_requests_total", **labels, code="INVALID_ARGUMENT") == 2
    assert server.metric("trivium_requests_total", model="", code="NOT_FOUND") == 1
    assert server.metric("trivium_executed_pictures_total") == 7
    assert server.metric("trivium_request_pictures_sum", **labels) == 7
    assert server.metric("trivium_request_pictures_bucket", **labels, le="1.0") == 2
    for stage in ("decode", "queue", "compute", "route", "total"):
        assert server.metric("trivium_stage_seconds_count", **labels, stage=stage) == 2
    compute = server.metric("trivium_stage_seconds_sum", **labels, stage="compute")
    assert compute == pytest.approx((found[0].timings.compute + found[5].timings.compute) * 1e-9)
    total = server.metric("trivium_stage_seconds_sum", **labels, stage="total")
    assert total >= compute / server.ready["instances"]
    for k, head in enumerate(("clean", "robust", "combined")):
        entropy = server.metric("trivium_predictive_entropy_nats_sum", **labels, head=head)
        assert entropy == pytest.approx(sum(float(one.predictive_entropy[k]) for one in found))
        information = server.metric("trivium_mutual_information_nats_sum", **labels, head=head)
        assert information == pytest.approx(sum(float(one.mutual_information[k]) for one in found))
    divergence = server.metric("trivium_divergence_nats_sum", **labels)
    assert divergence == pytest.approx(sum(float(one.divergence[0, 1]) for one in found))
    for head in {one.head for one in found}:
        assert server.metric("trivium_routed_total", **labels, head=head) == sum(one.head == head for one in found)
    assert server.metric("trivium_engine_info", **labels, device="cpu") == 1
    assert server.metric("trivium_bundle_info", **labels, sha256=digest(tiny_bundle / "manifest.json")) == 1
    for idle in ("trivium_queue_depth", "trivium_in_flight_requests", "trivium_running_pictures", "trivium_held_bytes"):
        assert server.metric(idle) == 0
    assert server.metric("process_resident_memory_bytes") > 0


def test_http_answers_only_what_it_knows(server: ServerProcess) -> None:
    assert server.get("/metrics?name=x")[0] == 200
    assert server.get("/healthz") == (200, "ok\n")
    assert server.get("/healthz", "HEAD") == (200, "")
    assert server.get("/etc/passwd")[0] == 404
    assert server.get("/metrics", "POST")[0] == 405
    host, port = server.ready["http"].split(":")
    for junk in (b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"A" * 40_000):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(junk)
            try:
                answer = connection.recv(1 << 16)
            except ConnectionResetError:
                answer = b""
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert server.get("/healthz")[0] == 200


def test_a_message_over_the_limit_is_refused(serve: Serve, tiny_bundle: Path) -> None:
    server = serve(tiny_bundle, "--max-message-bytes", "10000", "--max-picture-bytes", "5000")
    with Client(server.url, retries=False) as client:
        with pytest.raises(InvalidRequest, match="6000 bytes, more than the limit of 5000"):
            client.predict([b"\x89PNG\r\n\x1a\n" + bytes(5992)])
        with pytest.raises(Exception, match="larger than max"):
            client.predict([bytes(20_000)])


def test_second_signal_exits_at_once(serve: Serve, tiny_bundle: Path) -> None:
    server = serve(tiny_bundle, "--grace-seconds", "60")
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: server.get("/readyz")[0] == 503)
    start = time.monotonic()
    assert server.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 10


def test_memory_and_threads_stay_flat(server: ServerProcess, some_pictures: NDArray[np.uint8]) -> None:
    process = psutil.Process(server.process.pid)
    with Client(server.url, "tiny") as client:

        def load() -> None:
            for _ in range(40):
                client.predict(list(some_pictures))

        threads = [threading.Thread(target=load) for _ in range(4)]
        load()
        before = process.memory_info().rss, process.num_threads()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert process.memory_info().rss - before[0] < 32 << 20
    assert process.num_threads() <= before[1] + 2


def request(pictures: NDArray[np.uint8]) -> bytes:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=pictures.shape)
    raw = [pictures.tobytes()]
    return bytes(
        service_pb2.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=raw).SerializeToString()
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"inline_ms": 1.0}, ["loop", "loop", "worker", "worker"]),
        ({"inline_ms": 0.0}, ["worker"] * 4),
        ({"inline_ms": 1.0, "batch": 2, "max_delay_ms": 0.0}, ["worker"] * 4),
        ({"inline_ms": 1.0, "transport": "grpc"}, ["loop", "loop", "worker", "worker"]),
    ],
)
def test_what_takes_the_engine_no_time_is_answered_on_the_loop(
    tiny_bundle: Path, some_pictures: NDArray[np.uint8], options: dict[str, Any], expected: list[str]
) -> None:
    encoded = io.BytesIO()
    Image.fromarray(some_pictures[0]).save(encoded, "PNG")
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="encoded_image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(encoded.getvalue())
    picture_file = service_pb2.ModelInferRequest(model_name="tiny", inputs=[tensor]).SerializeToString()
    requests = [request(some_pictures[:1]), request(some_pictures[:2]), request(some_pictures[:3]), picture_file]

    async def where() -> list[str]:
        settings = {"bundles": (tiny_bundle,), "grpc_port": 0, "http_port": 0, "instances": 1, **options}
        server = Server(Settings.model_validate(settings))
        await server.load()
        predictor = server.repository.get("tiny").predictor
        assert 0 < predictor.seconds < 1
        predictor.seconds = 0.0005
        run, threads = predictor.engine.run, list[str]()

        def noted(images: NDArray[np.uint8]) -> Any:
            threads.append("loop" if threading.current_thread() is threading.main_thread() else "worker")
            return run(images)

        predictor.engine.run = noted  # type: ignore[method-assign]
        found = []
        ready = await server.start()
        async with grpc.aio.insecure_channel(ready.grpc) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for position, message in enumerate(requests):
                threads.clear()
                await infer(message, timeout=60)
                found.append("+".join(set(threads)))
                # counted by the time that the client has its answer
                assert server.repository.get("tiny").counted.successes == position + 1
        assert server.scheduler.executed == 1 + 2 + 3 + 1
        assert (server.scheduler.depth, server.scheduler.running, server.scheduler.nbytes) == (0, 0, 0)
        await server.stop(0.0)
        return found

    assert asyncio.run(where()) == expected


@pytest.mark.parametrize("inline_ms", [0.0, 1000.0])
def test_a_request_leaves_nothing_for_the_garbage_collector(
    tiny_bundle: Path, some_pictures: NDArray[np.uint8], inline_ms: float
) -> None:
    # a cycle would keep each request's pictures until ten thousand other objects were made
    message = request(some_pictures[:1])

    async def garbage() -> int:
        settings = Settings(bundles=(tiny_bundle,), grpc_port=0, http_port=0, instances=2, inline_ms=inline_ms)
        server = Server(settings)
        await server.load()
        ready = await server.start()
        async with grpc.aio.insecure_channel(ready.grpc) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for _ in range(5):
                await infer(message)
            gc.collect()
            gc.disable()
            for _ in range(50):
                await infer(message, timeout=60)
            found = gc.collect()
        await server.stop(0.0)
        return found

    try:
        assert asyncio.run(garbage()) < 50
    finally:
        gc.enable()

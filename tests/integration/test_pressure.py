"""Deadlines, cancellation, overload and draining, on a model slow enough that requests wait."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from tests.integration.conftest import Serve, ServerProcess

SIZE = 32


def message(pictures: int = 1, **parameters: int) -> Any:
    images = np.full((pictures, SIZE, SIZE, 3), 99, np.uint8)
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=images.shape)
    request = service_pb2.ModelInferRequest(
        model_name="slow", inputs=[tensor], raw_input_contents=[images.tobytes()]
    )  # fmt: skip
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


class Asked:
    """A server with one instance, a stub, and how long one picture takes there."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.channel = grpc.insecure_channel(server.url)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.stub.ModelInfer(message())
        start = time.monotonic()
        self.stub.ModelInfer(message())
        self.each = time.monotonic() - start

    def occupy(self, pictures: int, **parameters: int) -> Any:
        """A request that keeps the one worker busy; returns when its first picture runs."""
        executed = self.server.metric("trivium_executed_pictures_total")
        call = self.stub.ModelInfer.future(message(pictures, **parameters))
        self.server.wait_until(lambda: self.server.metric("trivium_executed_pictures_total") > executed)
        return call

    def idle(self) -> None:
        self.server.wait_until(
            lambda: all(
                self.server.metric(name) == 0
                for name in ("trivium_running_pictures", "trivium_queue_depth", "trivium_in_flight_requests")
            )
        )


@pytest.fixture
def asked(serve: Serve, slow_bundle: Path) -> Iterator[Asked]:
    one = Asked(serve(slow_bundle, "--instances", "1", "--max-queue", "24", "--max-batch", "16"))
    yield one
    one.channel.close()


def code(call: Any) -> str:
    return str(call.code().name)


def test_expired_requests_never_run(asked: Asked) -> None:
    # urgent, so that its pictures all go before those of the others
    busy = asked.occupy(16, priority=1)
    calls = [asked.stub.ModelInfer.future(message(), timeout=asked.each) for _ in range(6)]
    calls += [asked.stub.ModelInfer.future(message(timeout=int(1e6 * asked.each))) for _ in range(2)]
    assert {code(call) for call in calls} == {"DEADLINE_EXCEEDED"}
    # answered on time, not when the worker comes round to them
    assert not busy.done()
    assert code(busy) == "OK"
    asked.idle()
    assert asked.server.metric("trivium_executed_pictures_total") == 2 + 16
    assert asked.server.metric("trivium_expired_total") == 8
    assert asked.server.metric("trivium_requests_total", code="DEADLINE_EXCEEDED") == 8


def test_what_expired_while_the_server_was_frozen_never_runs(asked: Asked) -> None:
    busy = asked.occupy(2, priority=1)
    limit = int(1e6 * (4 * asked.each + 0.5))
    calls = [asked.stub.ModelInfer.future(message(timeout=limit)) for _ in range(20)]
    asked.server.wait_until(lambda: asked.server.metric("trivium_in_flight_requests") > 10)
    asked.server.process.send_signal(signal.SIGSTOP)
    time.sleep(limit * 1e-6)
    asked.server.process.send_signal(signal.SIGCONT)
    codes = [code(call) for call in calls]
    assert set(codes) <= {"OK", "DEADLINE_EXCEEDED"}
    assert code(busy) == "OK"
    asked.idle()
    executed = asked.server.metric("trivium_executed_pictures_total")
    # the one picture that was running when the server froze may have lost its reader
    assert 4 + codes.count("OK") <= executed <= 4 + codes.count("OK") + 1
    assert codes.count("DEADLINE_EXCEEDED") > 0


def test_cancelled_requests_leave_the_queue(asked: Asked) -> None:
    busy = asked.occupy(8)
    calls = [asked.stub.ModelInfer.future(message(8, priority=2)) for _ in range(2)]
    asked.server.wait_until(lambda: asked.server.metric("trivium_queue_depth") >= 16)
    for call in calls:
        call.cancel()
    asked.server.wait_until(lambda: asked.server.metric("trivium_cancelled_total") == 2)
    assert asked.server.metric("trivium_queue_depth") <= 8
    assert code(busy) == "OK"
    asked.idle()
    assert asked.server.metric("trivium_executed_pictures_total") < 2 + 8 + 16
    assert asked.server.metric("trivium_requests_total", code="CANCELLED") == 2
    assert asked.server.metric("trivium_held_bytes") == 0


def test_a_full_queue_refuses_at_once_with_a_hint(asked: Asked) -> None:
    busy = asked.occupy(16)
    waiting = asked.stub.ModelInfer.future(message(8))
    asked.server.wait_until(lambda: asked.server.metric("trivium_in_flight_requests") == 2)
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        asked.stub.ModelInfer(message(16))
    assert time.monotonic() - start < 0.5 * 16 * asked.each + 0.5
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the queue is full" in error.details()
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1
    assert asked.server.metric("trivium_rejected_total") == 1
    assert [code(busy), code(waiting)] == ["OK", "OK"]


def test_urgent_requests_overtake(asked: Asked) -> None:
    busy = asked.occupy(12)
    urgent = asked.stub.ModelInfer.future(message(4, priority=1))
    assert code(urgent) == "OK"
    assert not busy.done()
    assert code(busy) == "OK"


def test_a_small_request_does_not_wait_for_all_of_a_large_one(asked: Asked) -> None:
    busy = asked.occupy(16)
    assert code(asked.stub.ModelInfer.future(message())) == "OK"
    assert not busy.done()
    assert code(busy) == "OK"


def test_sigterm_answers_what_was_accepted(serve: Serve, slow_bundle: Path) -> None:
    server = serve(slow_bundle, "--instances", "1", "--grace-seconds", "0")
    asked = Asked(server)
    calls = [asked.occupy(16, priority=1)]
    calls += [asked.stub.ModelInfer.future(message()) for _ in range(12)]
    server.wait_until(lambda: server.metric("trivium_in_flight_requests") == 13)
    server.process.send_signal(signal.SIGTERM)
    assert [code(call) for call in calls] == ["OK"] * 13
    assert server.process.wait(30) == 0
    assert "0 requests were given up" in server.log.read_text()
    with pytest.raises(grpc.RpcError) as caught:
        asked.stub.ModelInfer(message())
    assert code(caught.value) == "UNAVAILABLE"
    asked.channel.close()


def test_drain_time_is_bounded(serve: Serve, slow_bundle: Path) -> None:
    server = serve(slow_bundle, "--instances", "1", "--drain-seconds", "0.3")
    asked = Asked(server)
    busy = asked.occupy(60)
    start = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert code(busy) == "UNAVAILABLE"
    assert busy.details() == "the server is shutting down"
    assert server.process.wait(30) == 0
    assert time.monotonic() - start < max(10, 30 * asked.each)
    assert "1 requests were given up" in server.log.read_text()
    asked.channel.close()


def test_large_requests_use_all_instances(serve: Serve, slow_bundle: Path) -> None:
    server = serve(slow_bundle, "--instances", "3")
    asked = Asked(server)
    busy = asked.stub.ModelInfer.future(message(30))
    server.wait_until(lambda: server.metric("trivium_running_pictures") == 3)
    assert code(busy) == "OK"
    asked.channel.close()

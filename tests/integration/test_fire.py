"""Exactness under fire: more clients than the server can bear, and every answer is its own or one proper status.

TRIVIUM_SOAK_SECONDS makes it last longer than the few seconds of the ordinary tests.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trivium.runtime.client import read_response
from trivium.runtime.predictor import Prediction, Predictor
from trivium.runtime.wire import OUTPUTS, pack_bytes

if TYPE_CHECKING:
    from tests.integration.conftest import Serve

SECONDS = float(os.environ.get("TRIVIUM_SOAK_SECONDS", "4"))
CLIENTS = 12
PROPER = {"OK", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}


def content(prediction: Prediction) -> tuple[Any, ...]:
    values = (getattr(prediction, name) for name in OUTPUTS)
    return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)


class Attacker(threading.Thread):
    """One client with habits of its own; notes each outcome, and each answer that is not its own."""

    def __init__(self, seed: int, url: str, pictures: NDArray[np.uint8], expected: dict[str, list[Any]]) -> None:
        super().__init__(daemon=True)
        self.rng = random.Random(seed)
        self.channel = grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.pictures, self.expected = pictures, expected
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.end = time.monotonic() + SECONDS

    def run(self) -> None:
        while time.monotonic() < self.end:
            self.ask()
        self.channel.close()

    def ask(self) -> None:
        rng = self.rng
        model = rng.choice(["tiny", "tiny", "slow"])
        chosen = [rng.randrange(len(self.pictures)) for _ in range(rng.choice([1, 1, 2, 8]))]
        message = service_pb2.ModelInferRequest(model_name=model, id=str(rng.random()))
        bad = rng.random() < 0.1
        if bad:
            message.inputs.add(name="encoded_image", datatype="BYTES", shape=[1])
            message.raw_input_contents.append(pack_bytes(rng.choice([b"", b"\xff\xd8\xff broken", bytes(1000)])))
        else:
            message.inputs.add(name="image", datatype="UINT8", shape=[len(chosen), 32, 32, 3])
            message.raw_input_contents.append(self.pictures[chosen].tobytes())
        call = self.stub.ModelInfer.future(message, timeout=rng.choice([0.002, 0.05, 0.5, 30]))
        if rng.random() < 0.15:
            time.sleep(rng.random() * 0.05)
            call.cancel()
        code = call.code().name
        self.outcomes[code] += 1
        if code == "OK":
            response = call.result()
            answers = [content(one) for one in read_response(response)]
            if bad or response.id != message.id or answers != [self.expected[model][i] for i in chosen]:
                self.wrong.append(f"{model} {chosen}")
        elif code not in PROPER or "\n" in call.details():
            self.wrong.append(f"{code}: {call.details()}")


def test_every_answer_is_its_own_or_one_proper_status(
    serve: Serve, tiny_bundle: Path, slow_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    expected = {}
    for path in (tiny_bundle, slow_bundle):
        predictor = Predictor.load(path)
        expected[predictor.manifest.name] = [content(predictor.infer(image)) for image in some_pictures]
    server = serve(tiny_bundle, slow_bundle, "--max-queue", "24", "--max-batch", "8", "--grace-seconds", "0")
    process = psutil.Process(server.process.pid)
    host, port = server.url.split(":")
    # a client that connects and never reads, and one that speaks no HTTP/2
    deaf = socket.create_connection((host, int(port)))
    deaf.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    junk = socket.create_connection((host, int(port)))
    junk.sendall(os.urandom(2000))

    attackers = [Attacker(seed, server.url, some_pictures, expected) for seed in range(CLIENTS)]
    for attacker in attackers:
        attacker.start()
    time.sleep(SECONDS / 4)
    memory, threads = process.memory_info().rss, process.num_threads()
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGCONT)
    for attacker in attackers:
        attacker.join(SECONDS + 60)
        assert not attacker.is_alive()
    outcomes = sum((attacker.outcomes for attacker in attackers), Counter())
    assert [wrong for attacker in attackers for wrong in attacker.wrong] == []
    assert set(outcomes) >= PROPER - {"RESOURCE_EXHAUSTED"}, outcomes

    server.wait_until(lambda: server.metric("trivium_in_flight_requests") == 0)
    server.wait_until(lambda: server.metric("trivium_running_pictures") == 0)
    assert server.metric("trivium_queue_depth") == server.metric("trivium_held_bytes") == 0
    assert server.metric("trivium_requests_total", code="OK") >= outcomes["OK"]
    assert server.metric("trivium_requests_total", code="INTERNAL") == 0
    assert server.metric("trivium_requests_total", code="UNKNOWN") == 0
    assert process.memory_info().rss - memory < 64 << 20
    assert process.num_threads() <= threads + 4
    deaf.close()
    junk.close()

    # SIGTERM with a full queue: all that was accepted is answered, or refused in words
    with grpc.insecure_channel(server.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = service_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[some_pictures[:4].tobytes()])
        message.inputs.add(name="image", datatype="UINT8", shape=[4, 32, 32, 3])
        calls = [stub.ModelInfer.future(message) for _ in range(12)]
        server.wait_until(lambda: server.metric("trivium_queue_depth") > 8)
        server.process.send_signal(signal.SIGTERM)
        codes = Counter(call.code().name for call in calls)
        assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}, codes
        assert codes["OK"] >= 2
        for call in calls:
            if call.code() == grpc.StatusCode.OK:
                assert [content(one) for one in read_response(call.result())] == expected["slow"][:4]
    assert server.process.wait(30) == 0
    assert "ERROR" not in server.log.read_text()

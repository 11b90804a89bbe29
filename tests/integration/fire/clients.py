"""Clients under fire: those that ask and judge each answer by its content, and those that connect to do harm."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trivium.runtime.client_codec import read_response
from trivium.runtime.predictor import Prediction, Predictor
from trivium.runtime.wire import OUTPUTS, pack_bytes

from . import http2
from .reloads import Timeline

INFER = "/inference.GRPCInferenceService/ModelInfer"
ROUTERS = (None, None, "robust", "mean")
DEADLINES = (0.002, 0.05, 0.5, 30.0)
BAD_PICTURES = (b"", b"\xff\xd8\xff broken", bytes(1000))
MAX_BATCH = 8


def content(prediction: Prediction) -> tuple[Any, ...]:
    """All of an answer but its timings, bit for bit."""
    values = (getattr(prediction, name) for name in OUTPUTS)
    return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)


def png(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


class Answers:
    """What is right: by model, version, router, picture and whether it came encoded."""

    def __init__(self, bundles: Sequence[Path], pictures: NDArray[np.uint8]) -> None:
        self.pictures = pictures
        self.encoded = [png(picture) for picture in pictures]
        self._right: dict[tuple[str, str, str | None, int, bool], tuple[Any, ...]] = {}
        for path in bundles:
            predictor = Predictor.load(path)
            manifest = predictor.manifest
            for router, index, encoded in itertools.product(set(ROUTERS), range(len(pictures)), (False, True)):
                picture = predictor.decode(self.encoded[index]) if encoded else pictures[index]
                key = manifest.name, manifest.version, router, index, encoded
                self._right[key] = content(predictor.infer(picture, router))

    def right(self, model: str, version: str, router: str | None, chosen: list[int], encoded: bool) -> list[Any]:
        return [self._right[model, version, router, index, encoded] for index in chosen]


class Asker(threading.Thread):
    """One client with habits of its own; notes each outcome, and each that is not proper."""

    def __init__(self, seed: int, url: str, answers: Answers, timelines: dict[str, Timeline], seconds: float) -> None:
        super().__init__(daemon=True)
        self.rng = random.Random(seed)
        self.channel = grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.answers, self.timelines = answers, timelines
        self.requests: Counter[str] = Counter()
        """By status code."""
        self.pictures: Counter[str] = Counter()
        """By status code."""
        self.versions: Counter[tuple[str, str]] = Counter()
        """Requests answered, by model and version."""
        self.wrong: list[str] = []
        self.last_ok = 0.0
        self.end = time.monotonic() + seconds

    def run(self) -> None:
        while time.monotonic() < self.end:
            ask = self.rng.choices((self.ask, self.ask_badly), (0.9, 0.1))[0]
            ask()
        self.channel.close()

    def ask(self) -> None:
        """A good request: its own answer, or one of the statuses that its deadline, its client or the load explain."""
        rng = self.rng
        model = rng.choice(["tiny", "tiny", "slow"])
        chosen = [rng.randrange(len(self.answers.pictures)) for _ in range(rng.choice([1, 1, 2, MAX_BATCH]))]
        encoded, router = rng.random() < 0.3, rng.choice(ROUTERS)
        message = service_pb2.ModelInferRequest(model_name=model, id=str(rng.random()))
        if encoded:
            message.inputs.add(name="encoded_image", datatype="BYTES", shape=[len(chosen)])
            message.raw_input_contents.append(b"".join(pack_bytes(self.answers.encoded[i]) for i in chosen))
        else:
            message.inputs.add(name="image", datatype="UINT8", shape=[len(chosen), 32, 32, 3])
            message.raw_input_contents.append(self.answers.pictures[chosen].tobytes())
        if router is not None:
            message.parameters["router"].string_param = router
        message.parameters["priority"].int64_param = rng.choice([1, 2, 2])
        if limited := rng.random() < 0.2:
            message.parameters["timeout"].int64_param = rng.choice([1000, 100_000])
        start = time.monotonic()
        call, cancelled = self.call(message)
        code = self.outcome(call, len(chosen))
        if code == "OK":
            self.last_ok = time.monotonic()
            response = call.result()
            version = response.model_version
            self.versions[model, version] += 1
            if version not in self.timelines[model].during(start, self.last_ok):
                self.wrong.append(f"{model} version {version} was not serving")
            elif response.id != message.id or [content(one) for one in read_response(response)] != self.answers.right(
                model, version, router, chosen, encoded
            ):
                self.wrong.append(f"{model} version {version} {chosen}: not its own answer")
        elif code == "DEADLINE_EXCEEDED":
            # none waits as long as the longest deadline
            if not limited and time.monotonic() - start > max(DEADLINES) - 1:
                self.wrong.append(f"{model}: {call.details()}")
        elif code != "RESOURCE_EXHAUSTED" and not (code == "CANCELLED" and cancelled):
            self.wrong.append(f"{code}: {call.details()}")

    def ask_badly(self) -> None:
        """A request that cannot be answered: refused in words."""
        rng = self.rng
        message = service_pb2.ModelInferRequest(model_name="tiny", id=str(rng.random()))
        kind, proper, count = rng.choice(["picture", "one of three", "shape", "model", "batch"]), "INVALID_ARGUMENT", 0
        if kind in ("picture", "one of three"):
            count = 1 if kind == "picture" else 3
            pictures = [*self.answers.encoded[: count - 1], rng.choice(BAD_PICTURES)]
            message.inputs.add(name="encoded_image", datatype="BYTES", shape=[count])
            message.raw_input_contents.append(b"".join(map(pack_bytes, pictures)))
        else:
            size = MAX_BATCH + 1 if kind == "batch" else 1
            message.inputs.add(name="image", datatype="UINT8", shape=[size, 32, 32, 3])
            message.raw_input_contents.append(bytes(size * 32 * 32 * 3 - (kind == "shape")))
            if kind == "model":
                message.model_name, proper = "nobody", "NOT_FOUND"
        call, cancelled = self.call(message)
        code = self.outcome(call, count)
        explained = {proper, "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", *(["CANCELLED"] if cancelled else [])}
        if code not in explained or "\n" in call.details():
            self.wrong.append(f"a bad {kind} got {code}")

    def call(self, message: Any) -> tuple[Any, bool]:
        """The call, and whether it was cancelled."""
        call = self.stub.ModelInfer.future(message, timeout=self.rng.choice(DEADLINES))
        if cancelled := self.rng.random() < 0.15:
            time.sleep(self.rng.random() * 0.05)
            call.cancel()
        return call, cancelled

    def outcome(self, call: Any, pictures: int) -> str:
        code = str(call.code().name)
        self.requests[code] += 1
        self.pictures[code] += pictures
        return code


class Villains(threading.Thread):
    """Connections that do harm by being there, from start to end.

    One takes no byte of any answer by flow control (a window of 0), one never reads what it is sent, one stops within
    a frame, one within a message, one talks nonsense, and one begins an HTTP request for metrics and never ends it.
    """

    def __init__(self, url: str, http: str, picture: bytes, seconds: float) -> None:
        super().__init__(daemon=True)
        self.windowless, self.deaf = http2.connect(url), http2.connect(url, receive_buffer=4096)
        self.connections: list[socket.socket] = [self.windowless, self.deaf]
        half = http2.message(1, b"\x0a\x04tiny", announced=1 << 20)
        for junk in (
            http2.hello(65535) + http2.headers(1, INFER)[:20],
            http2.hello(65535) + http2.headers(1, INFER) + half,
            os.urandom(2000),
        ):
            self._say(http2.connect(url), junk)
        self._say(http2.connect(http), b"GET /metrics HTTP/1.1\r\n")
        request = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[pack_bytes(picture)])
        request.inputs.add(name="encoded_image", datatype="BYTES", shape=[1])
        self._request = request.SerializeToString()
        self._end = time.monotonic() + seconds
        self.asked = 0

    def run(self) -> None:
        # so few stay below the 64 KB that may be sent without reading what the server grants
        self.windowless.sendall(http2.hello(0))
        self.deaf.sendall(http2.hello(http2.LARGEST_WINDOW))
        while time.monotonic() < self._end and self.asked < 100:
            stream = self.asked + 1
            # a server may well hang up on such a client
            with contextlib.suppress(ConnectionError):
                for connection in (self.windowless, self.deaf):
                    connection.sendall(http2.headers(stream, INFER) + http2.message(stream, self._request))
                    self.asked += 1
            time.sleep(0.1)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    def _say(self, connection: socket.socket, words: bytes) -> None:
        connection.sendall(words)
        self.connections.append(connection)

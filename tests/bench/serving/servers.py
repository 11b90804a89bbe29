"""Servers as processes: start one, wait for its first right answer, ask what its process tree burns and holds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from numpy.typing import NDArray
from tests.processes import free_ports
from tritonclient.grpc import service_pb2

from . import load
from .pictures import Picture

INFER = "/inference.GRPCInferenceService/ModelInfer"
START_SECONDS = 120.0
STOP_SECONDS = 15.0
TOLERANCE = 1e-4
"""Of probabilities and nats: other workers run the same kernels on the same picture."""
Answer = dict[str, NDArray[np.float32]]


class Unavailable(Exception):
    """A server that cannot be had or started here; the message says why."""


@dataclass(frozen=True)
class Server:
    """How to start one, and how to talk to it."""

    name: str
    protocol: Literal["grpc", "http"]
    command: Callable[[int], list[str]]
    """From its port."""
    body: bytes
    """One request."""
    read: Callable[[bytes], Answer]
    """The head statistics in an answer's body."""
    expected: Answer
    path: str = INFER
    content_type: str = "application/grpc"
    environment: dict[str, str] = field(default_factory=dict)


class Running:
    """A server that answers.

    `ready_s` is the time from the start of its process to its first right answer.
    """

    def __init__(self, server: Server, target: load.Target, process: subprocess.Popen[bytes]) -> None:
        self.server = server
        self.target = target
        self.ready_s = 0.0
        self._process = process
        self._root = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """User and system time of the process tree, of children that ended and were waited for too."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])
        return total

    def memory_mb(self) -> tuple[float, float]:
        """RSS and PSS, summed over the process tree. RSS counts what processes share once for each of them."""
        rss = pss = 0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_full_info()
                rss, pss = rss + memory.rss, pss + memory.pss
        return rss / 1e6, pss / 1e6

    def pause(self) -> None:
        """Halt every process of the tree, so that a server burns nothing in another's visit."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        self.resume()
        tree = self._tree()
        # does nothing to a process that ended and was waited for
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        for process in tree:
            # psutil knows a process by its start time too: a number that was given away again is safe
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None


@contextmanager
def running(server: Server, program: Path, folder: Path) -> Iterator[Running]:
    """Start a server, and stop it in the end.

    Args:
        program: the load generator.
        folder: for its request and its log.

    Raises: Unavailable where it does not start, or answers something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body, log = folder / f"{server.name}.request", folder / f"{server.name}.log"
    body.write_bytes(server.body)
    (port,) = free_ports(1)
    target = load.Target(port, server.protocol, server.path, server.content_type, body)
    with log.open("wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            server.command(port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", **server.environment},
            start_new_session=True,
        )
    found = Running(server, target, process)
    try:
        answer = _first_answer(found, program, start + START_SECONDS, log)
        found.ready_s = time.monotonic() - start
        check(server, answer)
        yield found
    finally:
        found.stop()


def check(server: Server, answer: bytes) -> None:
    """See that an answer is the engine's.

    Raises: Unavailable.
    """
    given = server.read(answer)
    for name, values in server.expected.items():
        difference = float(np.max(np.abs(given[name].ravel() - values.ravel())))
        if not difference <= TOLERANCE:
            raise Unavailable(f"{name} differs by {difference:.2g} from ONNX Runtime's")


def _first_answer(server: Running, program: Path, end: float, log: Path) -> bytes:
    while True:
        try:
            found = load.run(program, server.target, seconds=0.001, connections=1)
            if found.failed == 0:
                return found.answer
            reason = found.reason
        except load.LoadFailed as error:
            reason = str(error)
        if server.ended:
            raise Unavailable(f"it ended before it answered; see {log}")
        if time.monotonic() > end:
            raise Unavailable(f"no answer within {START_SECONDS:g} s ({reason}); see {log}")
        time.sleep(0.05)


def trivium(bundle: Path, instances: int, picture: Picture, expected: Answer, *, jpeg: bool = False) -> Server:
    """Ours, over gRPC with every output."""

    def command(port: int) -> list[str]:
        command = [sys.executable, "-m", "trivium", "serve", str(bundle), "--instances", str(instances)]
        return [*command, "--grpc-port", str(port), "--http-port", "0", "--log-level", "error"]

    def read(body: bytes) -> Answer:
        answer = read_v2(body)
        answer["probabilities"] = answer.pop("head_probabilities")
        return answer

    body = jpeg_message(picture) if jpeg else image_message(picture)
    return Server("trivium, JPEG" if jpeg else "trivium", "grpc", command, body, read, expected)


def image_message(picture: Picture) -> bytes:
    """A ModelInferRequest of the Open Inference Protocol, uint8 [1, H, W, 3]."""
    shape = [1, *picture.pixels.shape]
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=shape)
    return _message(picture.model, tensor, picture.pixels.tobytes())


def bytes_message(picture: Picture) -> bytes:
    """The same pixels as one BYTES element."""
    return _bytes_message(picture.model, "image", picture.pixels.tobytes())


def jpeg_message(picture: Picture) -> bytes:
    return _bytes_message(picture.model, "encoded_image", picture.jpeg)


def read_v2(body: bytes) -> Answer:
    """The float32 outputs of a ModelInferResponse behind gRPC's 5-byte prefix."""
    response = service_pb2.ModelInferResponse.FromString(body[5:])
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {tensor.name: np.frombuffer(raw, np.float32) for tensor, raw in pairs if tensor.datatype == "FP32"}


def _bytes_message(model: str, name: str, data: bytes) -> bytes:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=[1])
    return _message(model, tensor, len(data).to_bytes(4, "little") + data)


def _message(model: str, tensor: service_pb2.ModelInferRequest.InferInputTensor, raw: bytes) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[raw])
    return bytes(request.SerializeToString())

"""The load generator: what it counts, and that a stalling server cannot hide behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.bench.serving import load
from tests.bench.serving.pictures import Picture
from tests.bench.serving.servers import INFER, image_message, jpeg_message, read_v2

from trivium.runtime.predictor import Predictor

if TYPE_CHECKING:
    from tests.integration.conftest import ServerProcess

STALL_SECONDS = 0.5


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return load.compiled(tmp_path_factory.mktemp("load"))
    except load.LoadFailed as reason:
        pytest.skip(str(reason))


@pytest.fixture
def target(server: ServerProcess, tmp_path: Path) -> Callable[[bytes], load.Target]:
    """Asks the tiny server a message."""

    def make(message: bytes) -> load.Target:
        body = tmp_path / "request"
        body.write_bytes(message)
        return load.Target(int(server.url.rpartition(":")[2]), "grpc", INFER, "application/grpc", body)

    return make


@pytest.fixture
def http_target(tmp_path: Path) -> Iterator[load.Target]:
    """A server that answers with the request, and halts once, with its 20th."""
    turn = threading.Lock()
    seen: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with turn:
                seen.append(body)
                if len(seen) == 20:
                    time.sleep(STALL_SECONDS)
            self.send_response(200 if body == b"right" else 400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    body = tmp_path / "request"
    body.write_bytes(b"right")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield load.Target(http.server_port, "http", "/", "text/plain", body)
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize(("connections", "streams"), [(1, 1), (4, 1), (1, 4), (3, 5)])
def test_closed_loop_over_grpc(
    program: Path,
    target: Callable[[bytes], load.Target],
    server: ServerProcess,
    tiny_bundle: Path,
    some_pictures: NDArray[np.uint8],
    connections: int,
    streams: int,
) -> None:
    before = server.metric("trivium_requests_total", model="tiny", code="OK")
    message = image_message(Picture("tiny", some_pictures[0]))
    found = load.run(program, target(message), seconds=0.3, connections=connections, streams=streams)
    assert found.failed == 0
    assert len(found.latencies) >= connections * streams
    assert server.metric("trivium_requests_total", model="tiny", code="OK") - before == len(found.latencies)
    answer = read_v2(found.answer)
    expected = Predictor.load(tiny_bundle).infer(some_pictures[0])
    np.testing.assert_array_equal(answer["head_probabilities"], expected.head_probabilities.ravel())
    np.testing.assert_array_equal(answer["divergence"], expected.divergence.ravel())


def test_a_message_of_many_frames(program: Path, target: Callable[[bytes], load.Target]) -> None:
    """Far above HTTP/2's first window of 65,535 bytes, so that flow control is needed."""
    rng = np.random.default_rng(0)
    message = jpeg_message(Picture("tiny", rng.integers(0, 256, (700, 700, 3), np.uint8)))
    assert len(message) > 1_000_000
    found = load.run(program, target(message), seconds=0.3, connections=2, streams=2)
    assert found.failed == 0
    assert len(found.latencies) >= 4


def test_errors_are_failures_with_their_text(program: Path, target: Callable[[bytes], load.Target]) -> None:
    message = image_message(Picture("unheard-of", np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(load.LoadFailed, match="unknown model"):
        load.run(program, target(message), seconds=0.1, connections=2)


def test_open_loop_waits_for_nobody(program: Path, http_target: load.Target) -> None:
    found = load.run(program, http_target, seconds=1.0, connections=4, rate=100, poisson=False)
    # the clients were all held by the stall; what was due meanwhile is asked later, and its wait counted
    assert abs(len(found.latencies) - 100) <= 1
    late = np.count_nonzero(found.latencies > STALL_SECONDS / 2)
    assert late >= STALL_SECONDS / 2 * 100 * 0.8


def test_closed_loop_sees_a_stall_once_a_client(program: Path, http_target: load.Target) -> None:
    found = load.run(program, http_target, seconds=1.0, connections=4)
    assert found.failed == 0
    assert np.count_nonzero(found.latencies > STALL_SECONDS * 0.9) <= 4
    assert found.latencies.max() >= STALL_SECONDS * 0.9
    assert found.answer == b"right"


def test_poisson_arrivals_are_as_many_as_asked(program: Path, http_target: load.Target) -> None:
    found = load.run(program, http_target, seconds=1.0, connections=8, rate=200)
    # six standard deviations
    assert abs(len(found.latencies) - 200) < 6 * np.sqrt(200)


def test_nobody_there(program: Path, tmp_path: Path) -> None:
    (tmp_path / "request").write_bytes(b"?")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(load.LoadFailed, match="Connection refused"):
        load.run(program, load.Target(port, "http", "/", "text/plain", tmp_path / "request"), seconds=1, connections=1)

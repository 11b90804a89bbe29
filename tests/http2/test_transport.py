"""gRPC over our own HTTP/2 beside grpc.aio's server: the same handlers, the same real clients, the same outcomes."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest

from trivium.runtime import http2, transport
from trivium.runtime.transport import Http2Server

MAX_MESSAGE = 4 << 20


class Running:
    """A server on a loop of its own thread, with handlers that note what happens to them."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind = kind
        self.options = options
        self.cancelled = threading.Event()
        self.started = threading.Event()
        self.release = threading.Event()
        self.seen: list[Any] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.call(self._start())
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}", options=[("grpc.max_receive_message_length", -1)]
        )

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def _start(self) -> None:
        if self.kind == "http2":
            self.server: Any = Http2Server(http2.Limits(MAX_MESSAGE, 64 << 20, 1000), **self.options)
        else:
            self.server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE)])
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "Big": grpc.unary_unary_rpc_method_handler(self.big),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "Crash": grpc.unary_unary_rpc_method_handler(self.crash),
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait),
            "Strict": grpc.unary_unary_rpc_method_handler(self.echo, request_deserializer=self.strict),
            "Count": grpc.unary_stream_rpc_method_handler(self.count),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
        if self.kind == "http2":
            self.port = self.server.listen("127.0.0.1", 0)
        else:
            self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()

    def close(self) -> None:
        self.channel.close()
        self.call(self.server.stop(0.0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def unary(self, name: str) -> Any:
        return self.channel.unary_unary(f"/test.Test/{name}")

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.seen.append((dict(context.invocation_metadata()), context.peer(), context.time_remaining()))
        return request

    async def big(self, request: bytes, context: Any) -> bytes:
        return bytes(int(request))

    async def fail(self, request: bytes, context: Any) -> bytes:
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION, "Schön 100 %\n", (("retry", "no"), ("raw-bin", b"\0\xff"))
        )
        raise AssertionError

    async def crash(self, request: bytes, context: Any) -> bytes:
        raise ZeroDivisionError("a secret")

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.started.set()
        try:
            while not self.release.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    @staticmethod
    def strict(data: bytes) -> bytes:
        if not data.startswith(b"good"):
            raise ValueError("bad")
        return data

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for i in range(int(request)):
            yield str(i).encode()

    async def chat(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()
        if self.cancelled.is_set():
            await context.abort(grpc.StatusCode.ABORTED, "enough")


@pytest.fixture(params=["http2", "grpc"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    server = Running(request.param)
    yield server
    server.close()


@pytest.fixture
def ours() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(**options: Any) -> Running:
        made.append(Running("http2", **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.mark.parametrize("size", [0, 1, 16_384, 300_000, MAX_MESSAGE])
def test_messages_of_any_length_come_back(running: Running, size: int) -> None:
    message = bytes(i % 251 for i in range(min(size, 5000))) * max(1, size // 5000)
    assert running.unary("Echo")(message[:size], timeout=30) == message[:size]


def test_an_answer_longer_than_every_window_comes_whole(running: Running) -> None:
    assert len(running.unary("Big")(b"30000000", timeout=30)) == 30_000_000


def test_a_status_with_its_text_and_metadata(running: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.unary("Fail")(b"", timeout=10)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == "Schön 100 %\n"
    assert {("retry", "no"), ("raw-bin", b"\0\xff")} <= {(key, value) for key, value in error.trailing_metadata()}


def test_what_a_handler_is_told_of_the_call(running: Running) -> None:
    running.unary("Echo")(b"", metadata=(("x-a", "1"), ("x-b-bin", b"\x01\x02\xfe")), timeout=20)
    running.unary("Echo")(b"")
    (metadata, peer, remaining), (_, _, unlimited) = running.seen
    assert metadata["x-a"] == "1"
    assert metadata["x-b-bin"] == b"\x01\x02\xfe"
    assert peer.startswith("ipv4:127.0.0.1:")
    assert 10 < remaining < 21
    assert unlimited is None


def test_a_crash_is_unknown_and_tells_nothing(ours: Callable[..., Running]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ours().unary("Crash")(b"", timeout=10)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.UNKNOWN
    assert "secret" not in error.details()


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code()  # type: ignore[no-any-return]


def test_statuses_of_what_cannot_be(running: Running) -> None:
    code = grpc.StatusCode
    assert code_of(lambda: running.unary("Nothing")(b"", timeout=10)) == code.UNIMPLEMENTED
    # grpc.aio takes it for a fault of the server's; every other gRPC says INTERNAL
    unparsed = code.INTERNAL if running.kind == "http2" else code.UNKNOWN
    assert code_of(lambda: running.unary("Strict")(b"evil", timeout=10)) == unparsed
    assert running.unary("Strict")(b"good", timeout=10) == b"good"
    assert code_of(lambda: running.unary("Echo")(bytes(MAX_MESSAGE + 1), timeout=10)) == code.RESOURCE_EXHAUSTED
    assert running.unary("Echo")(b"and it goes on", timeout=10) == b"and it goes on"


def test_a_deadline_ends_the_handler(running: Running) -> None:
    assert code_of(lambda: running.unary("Wait")(b"", timeout=0.2)) == grpc.StatusCode.DEADLINE_EXCEEDED
    assert running.cancelled.wait(10)


def test_a_client_that_cancels_ends_the_handler(running: Running) -> None:
    future = running.unary("Wait").future(b"")
    assert running.started.wait(10)
    future.cancel()
    assert running.cancelled.wait(10)


def test_a_client_that_goes_away_ends_the_handler(running: Running) -> None:
    future = running.unary("Wait").future(b"")
    assert running.started.wait(10)
    running.channel.close()
    assert running.cancelled.wait(10)
    assert future.done()


def test_streams_in_both_directions(running: Running) -> None:
    count = running.channel.unary_stream("/test.Test/Count")
    assert list(count(b"1000", timeout=20)) == [str(i).encode() for i in range(1000)]
    chat = running.channel.stream_stream("/test.Test/Chat")
    assert list(chat(iter([b"a", b"bc", b""]), timeout=20)) == [b"A", b"BC", b""]
    running.cancelled.set()
    assert code_of(lambda: list(chat(iter([b"a"]), timeout=20))) == grpc.StatusCode.ABORTED


def test_a_stream_that_is_left_ends(running: Running) -> None:
    stream = running.channel.unary_stream("/test.Test/Count")(b"1000000")
    assert next(stream) == b"0"
    stream.cancel()
    assert running.unary("Echo")(b"x", timeout=10) == b"x"


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_read(running: Running, algorithm: Any) -> None:
    message = b"much the same " * 10_000
    assert running.unary("Echo")(message, compression=algorithm, timeout=10) == message


def test_many_calls_at_once_keep_their_answers(running: Running) -> None:
    echo = running.unary("Echo")

    def ask(i: int) -> None:
        message = struct.pack(">I", i) * (i % 5000)
        assert echo(message, timeout=60) == message

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(600)))


def test_stopping_finishes_what_runs_and_refuses_what_is_new(ours: Callable[..., Running]) -> None:
    running = ours()
    future = running.unary("Wait").future(b"patience")
    assert running.started.wait(10)
    stopping = asyncio.run_coroutine_threadsafe(running.server.stop(20.0), running.loop)
    time.sleep(0.2)
    with pytest.raises(grpc.RpcError):
        running.unary("Echo")(b"", timeout=0.5)
    assert not stopping.done()
    running.release.set()
    assert future.result(10) == b"patience"
    stopping.result(10)


def test_the_grace_ends(ours: Callable[..., Running]) -> None:
    running = ours()
    future = running.unary("Wait").future(b"")
    assert running.started.wait(10)
    running.call(running.server.stop(0.1))
    assert code_of(lambda: future.result(10)) == grpc.StatusCode.UNAVAILABLE
    assert running.cancelled.wait(10)


class RawCall:
    """A call by hand, for what gRPC's own client would not send."""

    def __init__(self, port: int, headers: dict[str, str]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.client.initiate_connection()
        fields = {":method": "POST", ":scheme": "http", ":path": "/test.Test/Echo", ":authority": "test"}
        self.client.send_headers(1, list((fields | {"content-type": "application/grpc"} | headers).items()))

    def send(self, data: bytes, end: bool = True) -> None:
        self.client.send_data(1, data, end_stream=end)
        self.socket.sendall(self.client.data_to_send())

    def answer(self) -> dict[str, str]:
        """Headers and trailers."""
        found: dict[str, str] = {}
        while True:
            data = self.socket.recv(65536)
            assert data, "the connection ended"
            for event in self.client.receive_data(data):
                if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                    found |= dict(event.headers)  # type: ignore[arg-type]
                if isinstance(event, h2.events.StreamEnded):
                    self.socket.close()
                    return found


def message(data: bytes, compressed: int = 0) -> bytes:
    return bytes([compressed]) + struct.pack(">I", len(data)) + data


@pytest.mark.parametrize(
    ("headers", "data", "status", "text"),
    [
        ({"content-type": "text/html"}, message(b"x"), 13, "text/html"),
        ({"grpc-encoding": "brotli"}, message(b"x", 1), 12, "brotli"),
        ({"grpc-encoding": "gzip"}, message(b"no gzip", 1), 13, "gzip"),
        ({"grpc-encoding": "gzip"}, message(gzip.compress(bytes(MAX_MESSAGE + 1)), 1), 8, "larger than max"),
        ({}, message(b"a") + message(b"b"), 13, "more than one"),
        ({}, b"", 13, "no message"),
        ({}, b"\0\0\0", 13, "no message"),
    ],
)
def test_calls_that_no_client_should_make(
    ours: Callable[..., Running], headers: dict[str, str], data: bytes, status: int, text: str
) -> None:
    call = RawCall(ours().port, headers)
    call.send(data)
    answer = call.answer()
    assert answer["grpc-status"] == str(status)
    assert text in answer["grpc-message"].replace("%2F", "/")
    if status == 12:
        assert answer["grpc-accept-encoding"] == "identity, gzip, deflate"


def closed_within(sock: socket.socket, seconds: float) -> bool:
    sock.settimeout(seconds)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_a_client_that_says_nothing_is_left(ours: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HANDSHAKE_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", ours().port)) as silent:
        assert closed_within(silent, 10)


def test_a_client_that_is_gone_is_noticed_and_one_that_lives_is_kept(ours: Callable[..., Running]) -> None:
    running = ours(keepalive=0.2)
    dead = RawCall(running.port, {":path": "/test.Test/Wait"})
    dead.send(message(b"x"))
    # it reads, but never acknowledges a ping
    assert closed_within(dead.socket, 10)
    assert running.cancelled.wait(10)
    assert running.unary("Echo")(b"x", timeout=10) == b"x"
    time.sleep(1.0)
    assert len(running.server.connections) == 1
    assert running.unary("Echo")(b"x", timeout=10) == b"x"


def test_an_old_connection_is_ended_between_calls(ours: Callable[..., Running]) -> None:
    running = ours(age=0.2)
    late = running.unary("Wait").future(b"late")
    assert running.started.wait(10)
    (old,) = running.server.connections
    time.sleep(0.5)
    running.release.set()
    assert late.result(10) == b"late"
    end = time.monotonic() + 10
    while old in running.server.connections:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert running.unary("Echo")(b"a new one", timeout=10) == b"a new one"


def test_what_a_client_sends_at_the_end_does_not_cost_it_the_last_answer(ours: Callable[..., Running]) -> None:
    running = ours(age=0.2)
    call = RawCall(running.port, {":path": "/test.Test/Wait"})
    call.send(message(b"late"))
    assert running.started.wait(10)
    time.sleep(0.4)
    blocked, sent = threading.Event(), threading.Event()

    def block() -> None:
        """The call ends before the loop reads what came meanwhile."""
        (connection,) = running.server.connections
        blocked.set()
        assert sent.wait(10)
        connection.calls[1].end(grpc.StatusCode.ABORTED, "over")

    running.loop.call_soon_threadsafe(block)
    assert blocked.wait(10)
    call.socket.sendall(b"\0\x40\0\x7f\0\0\0\0\0" + bytes(1 << 14))  # of a kind that is to be ignored
    sent.set()
    received = b""
    while data := call.socket.recv(65536):  # a reset would raise
        received += data
    assert ended(received, 1)


def ended(data: bytes, stream: int) -> bool:
    """Whether the last frame of a stream is among the frames that were received."""
    while len(data) >= 9:
        length, flags = int.from_bytes(data[:3], "big"), data[4]
        if data[3] == 1 and flags & 1 and int.from_bytes(data[5:9], "big") == stream:
            return True
        data = data[9 + length :]
    return False


def test_a_client_that_is_gone_already_needs_no_parting(ours: Callable[..., Running]) -> None:
    running = ours()
    gone = socket.create_connection(("127.0.0.1", running.port), 10)
    gone.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
    while not running.server.connections:
        time.sleep(0.01)

    async def end_together() -> None:
        (connection,) = running.server.connections
        # a reset, which the loop has not heard of yet
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        connection.shutdown()

    running.call(end_together())
    end = time.monotonic() + 10
    while running.server.connections:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_does_not_part_is_left(ours: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PARTING_SECONDS", 0.2)
    running = ours(age=0.1)
    with socket.create_connection(("127.0.0.1", running.port), 10) as staying:
        staying.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
        while staying.recv(65536):
            pass
        end = time.monotonic() + 10
        while running.server.connections:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_name_with_addresses_of_both_families_has_one_port(ours: Callable[..., Running]) -> None:
    running = ours()

    async def start() -> int:
        server = Http2Server(http2.Limits(1000, 1000, 10))
        server.add_generic_rpc_handlers(running.server._handlers)
        port = server.listen("localhost", 0)
        await server.start()
        return port

    port = running.call(start())
    for *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
        with socket.create_connection((str(address[0]), port), 5):
            pass
    with pytest.raises(OSError, match="in use"):
        running.server.listen("localhost", port)

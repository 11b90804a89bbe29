"""gRPC on the event loop itself: connections over http2, and the calls that grpc.aio's method handlers answer.

grpc.aio costs a server some sixty system calls and a dozen thread switches a request, which beside a small network's
few milliseconds is a tenth of the machine. Here a request is read, answered and written by one thread.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import logging
import re
import socket
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple, NoReturn, cast
from urllib.parse import quote

import grpc

from . import http2

BUFFER = 256 << 10
"""Bytes read from a socket at once; all connections share them, since they are taken up before the next read."""
MAX_UNSENT = 1 << 20
"""Bytes that may wait in a connection for a client that does not read; beyond it answers wait in the http2 part."""
HANDSHAKE_SECONDS = 20.0
MAX_MESSAGE_TEXT = 2048
"""Characters of a status's text."""
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_NO_SUCH = grpc.StatusCode.UNIMPLEMENTED
_CODES = {code: str(code.value[0]).encode() for code in grpc.StatusCode}
_OK = b"grpc-status\x000\x00"
_log = logging.getLogger(__name__)


class Aborted(Exception):
    """Ends a handler: the call has its status."""


class Details(NamedTuple):
    """What a generic handler chooses a method's handler by."""

    method: str
    invocation_metadata: Sequence[tuple[str, str | bytes]]


class Call:
    """One call: what its handler sees of it (the part of grpc.aio.ServicerContext that servicers use), and its end."""

    __slots__ = (
        "_arrived",
        "_connection",
        "_deadline",
        "_ended",
        "_failure",
        "_handler",
        "_headers",
        "_messages",
        "_over",
        "_stream",
        "_task",
        "_timer",
        "_trailing",
        "_wake",
    )

    def __init__(self, connection: Connection, stream: int, headers: Headers, handler: Any) -> None:
        self._connection = connection
        self._stream = stream
        self._headers = headers
        self._handler = handler
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._messages: deque[tuple[bytes, bool]] = deque()
        self._ended = False
        self._over = False
        self._failure: tuple[grpc.StatusCode, str] | None = None
        self._trailing: Sequence[tuple[str, str | bytes]] = ()
        self._wake: asyncio.Event | None = None
        if headers.timeout is not None:
            self._deadline = monotonic() + headers.timeout
            self._timer = connection.loop.call_later(headers.timeout, self._expire)

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._headers.metadata

    def time_remaining(self) -> float | None:
        """Seconds; None where the client set no deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())

    def peer(self) -> str:
        """The client's address as gRPC writes it, say ipv4:127.0.0.1:4711."""
        return self._connection.peer

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._trailing = tuple(metadata)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str | bytes]] = ()
    ) -> NoReturn:
        """End the call with a status other than OK. Raises: always."""
        self._trailing = (*self._trailing, *trailing_metadata)
        self._failure = code, details
        raise Aborted

    async def write(self, message: Any) -> None:
        """Send one message of a stream."""
        if not self._over:
            self._connection.send(self._stream, self._serialized(message))

    # What the connection tells

    def start(self) -> None:
        """Run a handler that reads its messages as they come."""
        if self._handler.request_streaming:
            self._wake = asyncio.Event()
            self._run(self._stream_in())

    def arrived(self, data: bytes, compressed: bool) -> None:
        self._messages.append((data, compressed))
        if self._wake is not None:
            self._wake.set()
        elif len(self._messages) > 1:
            self.end(grpc.StatusCode.INTERNAL, "more than one message in a unary call")

    def ended(self) -> None:
        """The client has said everything."""
        self._ended = True
        if self._wake is not None:
            self._wake.set()
        elif not self._over:
            if not self._messages:
                self.end(grpc.StatusCode.INTERNAL, "no message in a unary call")
            else:
                self._run(self._unary())

    def gone(self) -> None:
        """The client has left: no answer can be sent."""
        self._over = True
        self._release()
        if self._task is not None:
            self._task.cancel()

    def end(self, code: grpc.StatusCode, details: str = "") -> None:
        """Answer with a status, whatever the handler does."""
        if self._over:
            return
        self._over = True
        self._release()
        self._connection.finish(self._stream, _trailers(code, details, self._trailing))
        if self._task is not None:
            self._task.cancel()

    # Running the handler

    def _run(self, work: Any) -> None:
        self._task = self._connection.loop.create_task(work)

    async def _unary(self) -> None:
        handler = self._handler
        try:
            data, compressed = self._messages.popleft()
            request = self._deserialized(await self._inflated(data) if compressed else data)
            if handler.response_streaming:
                await self._answer_stream(handler.unary_stream(request, self))
                self._finish()
            else:
                response = await handler.unary_unary(request, self)
                if not self._over:
                    self._connection.send(self._stream, self._serialized(response))
                    self._finish()
        except Aborted:
            self._finish()
        except Exception as error:
            self._crashed(error)

    async def _stream_in(self) -> None:
        try:
            handler = self._handler
            if handler.response_streaming:
                await self._answer_stream(handler.stream_stream(self._requests(), self))
            else:
                await self.write(await handler.stream_unary(self._requests(), self))
            self._finish()
        except Aborted:
            self._finish()
        except Exception as error:
            self._crashed(error)

    async def _answer_stream(self, answers: Any) -> None:
        if hasattr(answers, "__aiter__"):
            async for message in answers:
                await self.write(message)
        else:
            await answers

    async def _requests(self) -> AsyncIterator[Any]:
        assert self._wake is not None
        while True:
            while self._messages:
                data, compressed = self._messages.popleft()
                yield self._deserialized(await self._inflated(data) if compressed else data)
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()

    def _deserialized(self, data: bytes) -> Any:
        deserialize = self._handler.request_deserializer
        if deserialize is None:
            return data
        try:
            return deserialize(data)
        except Exception:  # protobuf's error is a class of its own
            self._failure = grpc.StatusCode.INTERNAL, "the request is no message of this method"
            raise Aborted from None

    def _serialized(self, message: Any) -> bytes:
        serialize = self._handler.response_serializer
        return message if serialize is None else serialize(message)  # type: ignore[no-any-return]

    async def _inflated(self, data: bytes) -> bytes:
        encoding = self._headers.encoding
        if encoding not in ("gzip", "deflate"):
            self._trailing = (("grpc-accept-encoding", "identity, gzip, deflate"),)
            self._failure = _NO_SUCH, f"messages in encoding {encoding[:40]!r} are not read"
            raise Aborted
        limit = self._connection.limits.max_message
        try:
            plain = await asyncio.to_thread(_inflate, data, limit)
        except zlib.error:
            self._failure = grpc.StatusCode.INTERNAL, f"the message is not in encoding {encoding}"
            raise Aborted from None
        if len(plain) > limit:
            self._failure = grpc.StatusCode.RESOURCE_EXHAUSTED, _too_long(f"more than {limit}", limit)
            raise Aborted
        return plain

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        self._release()
        if self._failure is None and not self._trailing:
            self._connection.finish(self._stream, _OK)
        else:
            code, details = self._failure or (grpc.StatusCode.OK, "")
            self._connection.finish(self._stream, _trailers(code, details, self._trailing))

    def _crashed(self, error: Exception) -> None:
        _log.error("%s failed", self._headers.path, exc_info=error)
        self.end(grpc.StatusCode.UNKNOWN, "the call failed; the server's log says why")

    def _expire(self) -> None:
        self._timer = None
        self.end(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline passed")

    def _release(self) -> None:
        self._connection.calls.pop(self._stream, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Headers(NamedTuple):
    """A call's headers, read."""

    path: str
    content_type: str
    timeout: float | None
    """Seconds."""
    encoding: str
    metadata: tuple[tuple[str, str | bytes], ...]


class Connection(asyncio.BufferedProtocol):
    """A client's connection."""

    def __init__(self, server: Http2Server) -> None:
        self._server = server
        self.loop = server.loop
        self.limits = server.limits
        self.calls: dict[int, Call] = {}
        self.peer = ""
        self._http2 = http2.Connection(server.limits)
        self._transport: asyncio.Transport | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._heard = False
        self._pinged = False
        self._draining = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.peer = _peer(transport.get_extra_info("peername"))
        self._transport.set_write_buffer_limits(MAX_UNSENT)
        self._server.connections.add(self)
        self._later(HANDSHAKE_SECONDS, self._check_handshake)
        if self._server.keepalive:
            self._later(self._server.keepalive, self._check_alive)
        if self._server.age:
            self._later(self._server.age, self.shutdown)
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = True
        if self._transport is None:
            return
        events = self._http2.receive(self._server.address, nbytes)
        if events is None:
            self._flush()
            self.close()
            return
        for event in events:
            kind, stream = event.kind, event.stream
            if kind == http2.HEADERS:
                self._begin(stream, event.data)
                continue
            call = self.calls.get(stream)
            if call is None:
                continue
            if kind == http2.MESSAGE:
                call.arrived(event.data, bool(event.detail))
            elif kind == http2.END:
                call.ended()
            elif kind == http2.RESET:
                call.gone()
            elif kind == http2.TOO_LONG:
                call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, _too_long(str(event.size), self.limits.max_message))
            else:
                call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many bytes are on their way to this server")
        self._flush()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
        for timer in self._timers:
            timer.cancel()
        for call in list(self.calls.values()):
            call.gone()
        self._http2.close()

    def pause_writing(self) -> None:
        self._http2.pause(True)

    def resume_writing(self) -> None:
        self._http2.pause(False)
        self._flush()

    def send(self, stream: int, message: bytes) -> None:
        """One message of an answer; its `finish` sends it with what follows where the call is unary."""
        if self._transport is not None:
            self._http2.message(stream, message)
            call = self.calls.get(stream)
            if call is None or call._handler.response_streaming:
                self._flush()

    def finish(self, stream: int, trailers: bytes) -> None:
        if self._transport is not None:
            self._http2.finish(stream, trailers)
            self._flush()

    def shutdown(self) -> None:
        """Take no more calls, and close when the last is over."""
        if self._transport is not None:
            self._http2.shutdown()
            self._draining = True
            self._flush()
            self._close_when_idle()

    def close(self) -> None:
        """Send what can be sent, and end."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._transport is None:
            return
        if data := self._http2.output():
            self._transport.write(data)
        if self._draining:
            self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self._transport is not None and not self._http2.streams:
            self._transport.close()

    def _begin(self, stream: int, data: bytes) -> None:
        headers = self._server.read(data)
        handler = self._server.find(headers)
        call = self.calls[stream] = Call(self, stream, headers, handler)
        if not headers.content_type.startswith("application/grpc"):
            call.end(grpc.StatusCode.INTERNAL, f"content-type {headers.content_type[:100]!r} is not gRPC's")
        elif handler is None:
            call.end(_NO_SUCH, f"unknown method {headers.path[:200]}")
        else:
            call.start()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers = [timer for timer in self._timers if timer.when() > self.loop.time()]
        self._timers.append(self.loop.call_later(seconds, call))

    def _check_handshake(self) -> None:
        if not self._http2.settled:
            self.abort()

    def _check_alive(self) -> None:
        if self._heard:
            self._heard = self._pinged = False
            self._later(self._server.keepalive, self._check_alive)
        elif self._pinged:
            self.abort()
        else:
            self._pinged = True
            self._http2.ping()
            self._flush()
            self._later(min(self._server.keepalive, 20.0), self._check_alive)


class Http2Server:
    """What grpc.aio.server makes, as far as this project uses it, without TLS.

    Args:
        limits: what clients may ask for.
        keepalive: seconds of silence after which a client is asked for a sign of life; 0 for never.
        age: seconds after which a connection takes no more calls; 0 for never.

    Raises: OSError where the library of http2 is missing.
    """

    def __init__(self, limits: http2.Limits, keepalive: float = 0.0, age: float = 0.0) -> None:
        http2.library()
        self.limits = limits
        self.keepalive = keepalive
        self.age = age
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        memory = (ctypes.c_char * BUFFER)()
        self.buffer = memoryview(memory).cast("B")
        self.address = ctypes.addressof(memory)
        self._handlers: list[Any] = []
        self._sockets: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []
        self._known: dict[bytes, Headers] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._handlers.extend(handlers)

    def listen(self, host: str, port: int) -> int:
        """Take an address; its port. Raises: OSError."""
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            sock = socket.socket(family, kind, protocol)
            self._sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # the address for all of them is for those of IPv4 too
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
            sock.setblocking(False)
            # where a name has several addresses and the system chooses the port, it is the same for all
            sock.bind((address[0], port, *address[2:]))
            port = port or sock.getsockname()[1]
        return port

    async def start(self) -> None:
        """Answer calls."""
        for sock in self._sockets:
            self._listeners.append(await self.loop.create_server(lambda: Connection(self), sock=sock, backlog=1024))

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those that run `grace` seconds, end the rest. A second call may shorten it."""
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        for connection in list(self.connections):
            connection.shutdown()
        end = monotonic() + grace
        while self.connections and monotonic() < end:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            for call in list(connection.calls.values()):
                call.end(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            connection.close()

    def read(self, data: bytes) -> Headers:
        """A call's headers; clients repeat them from call to call."""
        known = self._known.get(data)
        if known is None:
            known = _headers(data)
            if len(self._known) >= 256:
                self._known.clear()
            # secrets are not kept
            if len(data) <= 1024 and b"authorization" not in data:
                self._known[data] = known
        return known

    def find(self, headers: Headers) -> Any:
        """The handler of a call, or None."""
        details = Details(headers.path, headers.metadata)
        for handlers in self._handlers:
            handler = handlers.service(details)
            if handler is not None:
                return handler
        return None


def _headers(data: bytes) -> Headers:
    parts = data.decode("latin-1").split("\0")
    path = content_type = encoding = ""
    timeout: float | None = None
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in zip(parts[::2], parts[1::2], strict=False):
        if name == ":path":
            path = value
        elif name == "content-type":
            content_type = value
        elif name == "grpc-timeout":
            if match := _TIMEOUT.fullmatch(value):
                timeout = int(match[1]) * _UNITS[match[2]]
        elif name == "grpc-encoding":
            encoding = value
        elif name.startswith((":", "grpc-")) or name == "te":
            continue
        elif name.endswith("-bin"):
            # several values of a name may share a header, with commas between
            metadata += [(name, _base64(part)) for part in value.split(",")]
        else:
            metadata.append((name, value))
    return Headers(path, content_type, timeout, encoding, tuple(metadata))


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return b""


def _trailers(code: grpc.StatusCode, details: str, metadata: Sequence[tuple[str, str | bytes]]) -> bytes:
    parts = [b"grpc-status", _CODES[code]]
    if details:
        # PROTOCOL-HTTP2: percent-encoded beyond printable ASCII
        parts += [b"grpc-message", quote(details[:MAX_MESSAGE_TEXT], safe=_PLAIN).encode()]
    for name, value in metadata:
        text = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("latin-1", "replace")
        parts += [name.lower().encode(), text]
    return b"\0".join(parts) + b"\0"


_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")


def _too_long(size: str, limit: int) -> str:
    return f"the message is larger than max: {size} bytes, {limit} are taken"


def _inflate(data: bytes, limit: int) -> bytes:
    """At most limit + 1 bytes. Raises: zlib.error."""
    # gzip or zlib, whichever it is
    return zlib.decompressobj(47).decompress(data, limit + 1)


def _peer(address: Any) -> str:
    if not isinstance(address, tuple):
        return f"unix:{address}"
    host, port = address[:2]
    return f"ipv6:%5B{quote(host)}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"

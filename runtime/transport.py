"""gRPC on the event loop itself: connections over http2, and the calls that grpc.aio's method handlers answer.

grpc.aio costs a server some sixty system calls and a dozen thread switches a request, which beside a small network's
few milliseconds is a tenth of the machine. Here a request is read, answered and written by one thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple, cast
from urllib.parse import quote

import grpc

from . import headers, http2
from .call import Call, too_long
from .headers import Headers, Metadata

BUFFER = 256 << 10
"""Bytes read from a socket at once; all connections share them, since they are taken up before the next read."""
MAX_UNSENT = 1 << 20
"""Bytes that may wait in a connection for a client that does not read; beyond it answers wait in the http2 part."""
HANDSHAKE_SECONDS = 20.0
"""How long a client may take to begin."""
PARTING_SECONDS = 1.0
"""How long a client may take to close a connection that takes no more calls."""


class Details(NamedTuple):
    """What a generic handler chooses a method's handler by."""

    method: str
    invocation_metadata: Metadata


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
        self._parted = False

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
                call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, too_long(str(event.size), self.limits.max_message))
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

    def send(self, stream: int, message: bytes, more: bool) -> None:
        """Send a message; at once where `more` may come before the end."""
        if self._transport is not None:
            self._http2.message(stream, message)
            if more:
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
        data = self._http2.output()
        if data and not self._parted:
            self._transport.write(data)
        if self._draining and not self._parted and not self._http2.streams:
            # Closed now, with something of the client's still unread, the system would reset the connection, and the
            # client could lose the last answer. So the client is told, and what it sends until it closes is read.
            self._parted = True
            self._later(PARTING_SECONDS, self.close)
            try:
                self._transport.write_eof()
            except OSError:  # the client was faster
                self.close()

    def _begin(self, stream: int, data: bytes) -> None:
        found = self._server.read(data)
        handler = self._server.find(found)
        call = self.calls[stream] = Call(self, stream, found, handler)
        if not found.content_type.startswith("application/grpc"):
            call.end(grpc.StatusCode.INTERNAL, f"content-type {found.content_type[:100]!r} is not gRPC's")
        elif handler is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, f"unknown method {found.path[:200]}")
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
            known = headers.read(data)
            if len(self._known) >= 256:
                self._known.clear()
            # secrets are not kept
            if len(data) <= 1024 and b"authorization" not in data:
                self._known[data] = known
        return known

    def find(self, found: Headers) -> Any:
        """The handler of a call, or None."""
        details = Details(found.path, found.metadata)
        for handlers in self._handlers:
            handler = handlers.service(details)
            if handler is not None:
                return handler
        return None


def _peer(address: Any) -> str:
    if not isinstance(address, tuple):
        return f"unix:{address}"
    host, port = address[:2]
    return f"ipv6:%5B{quote(host)}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"

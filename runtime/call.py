"""One gRPC call: what its handler sees of it, the handler's run, and its end."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import deque
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, NoReturn, Protocol

import grpc

from . import headers, http2
from .headers import Headers, Metadata

_log = logging.getLogger(__name__)


class Peer(Protocol):
    """The connection that a call came by."""

    loop: asyncio.AbstractEventLoop
    limits: http2.Limits
    calls: dict[int, Call]
    """Those that are not over, by stream."""
    peer: str
    """The client's address as gRPC writes it, say ipv4:127.0.0.1:4711."""

    def send(self, stream: int, message: bytes, more: bool) -> None:
        """Send a message; at once where `more` may come before the end."""

    def finish(self, stream: int, trailers: bytes) -> None:
        """End an answer."""


class Aborted(Exception):
    """Ends a handler, with the call's status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Call:
    """One call: what its handler sees of it (the part of grpc.aio.ServicerContext that servicers use), and its end."""

    __slots__ = (
        "_connection",
        "_deadline",
        "_ended",
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

    def __init__(self, connection: Peer, stream: int, read: Headers, handler: Any) -> None:
        self._connection = connection
        self._stream = stream
        self._headers = read
        self._handler = handler
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._messages: deque[tuple[bytes, bool]] = deque()
        self._ended = False
        self._over = False
        self._trailing: Metadata = ()
        self._wake: asyncio.Event | None = None
        if read.timeout is not None:
            self._deadline = monotonic() + read.timeout
            self._timer = connection.loop.call_later(read.timeout, self._expire)

    def invocation_metadata(self) -> Metadata:
        return self._headers.metadata

    def time_remaining(self) -> float | None:
        """Seconds; None where the client set no deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())

    def peer(self) -> str:
        """The client's address as gRPC writes it, say ipv4:127.0.0.1:4711."""
        return self._connection.peer

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._trailing = tuple(metadata)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status other than OK. Raises: always."""
        self._trailing = (*self._trailing, *trailing_metadata)
        raise Aborted(code, details)

    async def write(self, message: Any) -> None:
        """Send one message of a stream."""
        if not self._over:
            self._connection.send(self._stream, self._serialized(message), True)
            # others have their turn, and it is read that the client has left
            await asyncio.sleep(0)

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
        self._finish(code, details)
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
                    self._connection.send(self._stream, self._serialized(response), False)
                    self._finish()
        except Aborted as aborted:
            self._finish(aborted.code, aborted.details)
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
        except Aborted as aborted:
            self._finish(aborted.code, aborted.details)
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
            raise Aborted(grpc.StatusCode.INTERNAL, "the request is no message of this method") from None

    def _serialized(self, message: Any) -> bytes:
        serialize = self._handler.response_serializer
        return message if serialize is None else serialize(message)  # type: ignore[no-any-return]

    async def _inflated(self, data: bytes) -> bytes:
        encoding = self._headers.encoding
        if encoding not in ("gzip", "deflate"):
            self._trailing = (("grpc-accept-encoding", "identity, gzip, deflate"),)
            raise Aborted(grpc.StatusCode.UNIMPLEMENTED, f"messages in encoding {encoding[:40]!r} are not read")
        limit = self._connection.limits.max_message
        try:
            plain = await asyncio.to_thread(_inflate, data, limit)
        except zlib.error:
            raise Aborted(grpc.StatusCode.INTERNAL, f"the message is not in encoding {encoding}") from None
        if len(plain) > limit:
            raise Aborted(grpc.StatusCode.RESOURCE_EXHAUSTED, too_long(f"more than {limit}", limit))
        return plain

    def _finish(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> None:
        if self._over:
            return
        self._over = True
        self._release()
        self._connection.finish(self._stream, headers.trailers(code, details, self._trailing))

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


def too_long(size: str, limit: int) -> str:
    return f"the message is larger than max: {size} bytes, {limit} are taken"


def _inflate(data: bytes, limit: int) -> bytes:
    """At most limit + 1 bytes. Raises: zlib.error."""
    # gzip or zlib, whichever it is
    return zlib.decompressobj(47).decompress(data, limit + 1)

"""The HTTP side: /metrics, /healthz and /readyz on the server's own event loop, so that they answer only if it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Answer = tuple[int, str, bytes]
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
TEXT = "text/plain; charset=utf-8"
PATIENCE = 10.0
"""Seconds that a client has for its request, and for taking the answer."""
HEAD_LIMIT = 16 << 10
"""Bytes of a request's head."""


class HttpServer:
    """Args: metrics gives content type and text of /metrics for an Accept header, ready the answer to /readyz."""

    def __init__(self, metrics: Callable[[str], tuple[str, bytes]], ready: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._ready = ready
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, chosen by the system where 0 was asked for.

        Raises: OSError where the address is taken or not ours.
        """
        self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_LIMIT)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def answer(self, method: str, path: str, accept: str = "") -> Answer:
        """Status, content type and body of a request; `accept` is its Accept header."""
        routes: dict[str, Callable[[], Answer]] = {
            "/metrics": lambda: (200, *self._metrics(accept)),
            "/healthz": lambda: (200, TEXT, b"ok\n"),
            "/readyz": lambda: (200, TEXT, b"ready\n") if self._ready() else (503, TEXT, b"not ready\n"),
        }
        route = routes.get(path.partition("?")[0])
        if route is None:
            return 404, TEXT, f"no such page; there are {', '.join(routes)}\n".encode()
        if method not in ("GET", "HEAD"):
            return 405, TEXT, b"only GET and HEAD\n"
        return route()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # One request a connection: a scraper comes every few seconds, and a drained server then has no idle connection.
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            lines = head.decode("latin-1").split("\r\n")
            words = lines[0].split()
            method = words[0] if words else ""
            if len(words) != 3 or not words[2].startswith("HTTP/1."):
                status, kind, body = 400, TEXT, b"no HTTP/1 request\n"
            else:
                status, kind, body = self.answer(method, words[1], _accept(lines[1:]))
            writer.write(
                f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                "Cache-Control: no-store\r\nConnection: close\r\n\r\n".encode()
                + (b"" if method == "HEAD" else body)
            )
            await asyncio.wait_for(writer.drain(), PATIENCE)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError, ConnectionError):
            return
        finally:
            writer.close()


def _accept(lines: list[str]) -> str:
    """The Accept header among a request's header lines."""
    for line in lines:
        name, _, value = line.partition(":")
        if name.lower() == "accept":
            return value
    return ""

"""Frames of HTTP/2 (RFC 9113) by hand, for clients that no library would let behave like this."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0x0, 0x1, 0x4
END_STREAM, END_HEADERS = 0x1, 0x4
INITIAL_WINDOW_SIZE = 0x4
LARGEST_WINDOW = 2**31 - 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def hello(window: int) -> bytes:
    """What a client says first: each answer may be `window` bytes long before it must wait."""
    return PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))


def headers(stream: int, path: str, metadata: Iterable[tuple[str, str]] = ()) -> bytes:
    """The head of a gRPC call, as HPACK literals that are neither indexed nor Huffman-coded."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *metadata]
    text = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
    )
    return frame(HEADERS, END_HEADERS, stream, text)


def message(stream: int, serialized: bytes, announced: int | None = None) -> bytes:
    """A gRPC message as one DATA frame; with `announced`, the start of one said to have as many bytes."""
    size = len(serialized) if announced is None else announced
    flags = END_STREAM if announced is None else 0
    return frame(DATA, flags, stream, b"\x00" + struct.pack(">I", size) + serialized)


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """A connection; with a receive buffer of that many bytes, which fills when nobody reads."""
    host, _, port = url.rpartition(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    return connection

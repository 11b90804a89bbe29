"""A call's headers and trailers as gRPC writes them into HTTP/2 (PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote

import grpc

Metadata = Sequence[tuple[str, str | bytes]]
MAX_TEXT = 2048
"""Characters of a status's text."""
_OK = b"grpc-status\x000\x00"
_CODES = {code: str(code.value[0]).encode() for code in grpc.StatusCode}
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")


class Headers(NamedTuple):
    """A call's headers, read."""

    path: str
    content_type: str
    timeout: float | None
    """Seconds."""
    encoding: str
    metadata: Metadata


def read(data: bytes) -> Headers:
    """Headers from name, 0, value, 0 for each."""
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


def trailers(code: grpc.StatusCode, details: str, metadata: Metadata) -> bytes:
    """A status as name, 0, value, 0 for each."""
    if code is grpc.StatusCode.OK and not details and not metadata:
        return _OK
    parts = [b"grpc-status", _CODES[code]]
    if details:
        # PROTOCOL-HTTP2: percent-encoded beyond printable ASCII
        parts += [b"grpc-message", quote(details[:MAX_TEXT], safe=_PLAIN).encode()]
    for name, value in metadata:
        text = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("latin-1", "replace")
        parts += [name.lower().encode(), text]
    return b"\0".join(parts) + b"\0"

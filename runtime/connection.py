"""A client's connection: the server's address, TLS, the token, and channels made of them."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from .bundle import printable
from .errors import ConfigError

Metadata: TypeAlias = "tuple[tuple[str, str], ...]"
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")
"""Of gRPC's own names for servers, which are left to it."""
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # gRPC's own retries leave out messages over 256 KB, two pictures already; ours do not
    ("grpc.enable_retries", 0),
    # milliseconds; with gRPC's own second a retry would come before the connection is even tried again
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
]
File: TypeAlias = "str | os.PathLike[str] | None"


class Connection:
    """What it takes to reach a server.

    Raises: ConfigError for what cannot be used.
    """

    def __init__(self, url: str, token: str | None, tls: bool, ca: File, cert: File, key: File) -> None:
        match = ADDRESS.fullmatch(url)
        if not url.startswith(SCHEMES) and (match is None or not 0 < int(match[2]) < 1 << 16):
            raise ConfigError(f"{url!r}: expected HOST:PORT")
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise ConfigError("the token must be printable ASCII")
        self.url = url
        self.metadata: Metadata = () if token is None else (("authorization", f"Bearer {token.strip()}"),)
        self._credentials = _credentials(ca, cert, key) if tls or ca or cert or key else None

    def channel(self, transport: Any) -> Any:
        """A channel of the module grpc or grpc.aio; nothing is sent yet."""
        if self._credentials is None:
            return transport.insecure_channel(self.url, OPTIONS)
        return transport.secure_channel(self.url, self._credentials, OPTIONS)


def _credentials(ca: File, cert: File, key: File) -> grpc.ChannelCredentials:
    if (cert is None) != (key is None):
        raise ConfigError("tls_cert and tls_key belong together")
    # gRPC itself would write to stderr, and say only that it cannot connect
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    files = [os.fspath(file) for file in (ca, cert, key) if file is not None]
    try:
        if ca is not None:
            context.load_verify_locations(ca)
        if cert is not None:
            context.load_cert_chain(cert, key, password="")
        pems = [None if file is None else Path(file).read_bytes() for file in (ca, key, cert)]
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"TLS files {printable(', '.join(files))} cannot be used: {reason}") from None
    return grpc.ssl_channel_credentials(*pems)

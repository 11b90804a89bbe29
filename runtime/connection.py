"""A client's connection: the servers' addresses, TLS, the token, and channels made of them."""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Sequence
from ipaddress import ip_address
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
    # of an attempt to connect; gRPC's own 20 seconds would take most of a call's time
    ("grpc.min_reconnect_backoff_ms", 5000),
    # a name is looked up when a connection ends, but not more often; gRPC's own is 30 seconds
    ("grpc.dns_min_time_between_resolutions_ms", 5000),
]
SPREAD = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
"""gRPC's service config for several servers: each gets its turn while its health (grpc.health.v1) is SERVING. One
without that service counts as serving. There is no hedging, and retries are the client's own."""
File: TypeAlias = "str | os.PathLike[str] | None"


class Connection:
    """What it takes to reach a server, or several.

    Raises: ConfigError for what cannot be used.
    """

    def __init__(
        self, url: str | Sequence[str], token: str | None, tls: bool, ca: File, cert: File, key: File, keepalive: float
    ) -> None:
        self.url = url if isinstance(url, str) else ",".join(url)
        self._target = _target(self.url)
        self._options = [*OPTIONS]
        # one server alone is asked as long as it answers, even one that says it is about to leave
        if self._target.startswith(SCHEMES) or not _is_ip(self._target):
            self._options += [("grpc.service_config", json.dumps(SPREAD))]
        if not 0 <= keepalive <= 86400:
            raise ConfigError(f"keepalive must be seconds from 0 to 86400, got {keepalive}")
        if keepalive:
            silence, answer = (max(1, round(1000 * seconds)) for seconds in (keepalive, keepalive / 2))
            self._options += [
                ("grpc.keepalive_time_ms", silence),
                ("grpc.keepalive_timeout_ms", answer),
                # one sent to measure the connection takes the place of the one for its life, and has a minute
                ("grpc.http2.ping_timeout_ms", answer),
            ]
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise ConfigError("the token must be printable ASCII")
        self.metadata: Metadata = () if token is None else (("authorization", f"Bearer {token.strip()}"),)
        self._credentials = _credentials(ca, cert, key) if tls or ca or cert or key else None

    def channel(self, transport: Any) -> Any:
        """A channel of the module grpc or grpc.aio; nothing is sent yet."""
        if self._credentials is None:
            return transport.insecure_channel(self._target, self._options)
        return transport.secure_channel(self._target, self._credentials, self._options)


def _target(url: str) -> str:
    """What gRPC calls an address, or a list of them with commas between.

    Raises: ConfigError.
    """
    if url.startswith(SCHEMES):
        return url
    addresses = [address.strip() for address in url.split(",")]
    for address in addresses:
        match = ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match[2]) < 1 << 16:
            raise ConfigError(f"{address!r}: expected HOST:PORT")
    if len(addresses) == 1:
        return url
    for address in addresses:
        if not _is_ip(address):
            raise ConfigError(f"{address!r}: a list has IP addresses; a name stands for all that DNS has of it")
    if len({address.startswith("[") for address in addresses}) > 1:
        raise ConfigError(f"{url!r}: a list has addresses of IPv4 or of IPv6, not both")
    return ("ipv6:" if url.startswith("[") else "ipv4:") + ",".join(addresses)


def _is_ip(address: str) -> bool:
    try:
        ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return True


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

"""Who may call what: a rule for every rpc, bearer tokens from a file of hashes, and TLS.

A line of the token file is the SHA-256 of a token, its holder's name, and "admin" where it may use the repository API:

    token=$(openssl rand -hex 32)
    echo "$(printf %s "$token" | sha256sum | cut -d' ' -f1) alice admin" >> tokens
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import ipaddress
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable
from enum import Enum
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc

from .config import Settings
from .errors import ConfigError, PermissionDenied, TriviumError, Unauthenticated
from .status import abort

RELOAD_SECONDS = 1.0
"""Between looks at the token file."""
_LINE = re.compile(r"([0-9a-fA-F]{64})\s+(\S{1,100})(\s+admin)?")
_log = logging.getLogger(__name__)


class Rule(Enum):
    """What a caller needs."""

    PROBE = "nothing: orchestrators ask before they have anything to show"
    CALL = "a token, where the server has a token file"
    ADMIN = "a token marked admin, where the server has a token file; else to call from the server's own machine"


_SERVICE = "/inference.GRPCInferenceService/"
RULES: dict[str, Rule] = {
    "/grpc.health.v1.Health/Check": Rule.PROBE,
    "/grpc.health.v1.Health/Watch": Rule.PROBE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule.CALL,
    _SERVICE + "ServerLive": Rule.PROBE,
    _SERVICE + "ServerReady": Rule.PROBE,
    _SERVICE + "ModelReady": Rule.CALL,
    _SERVICE + "ServerMetadata": Rule.CALL,
    _SERVICE + "ModelMetadata": Rule.CALL,
    _SERVICE + "ModelConfig": Rule.CALL,
    _SERVICE + "ModelStatistics": Rule.CALL,
    _SERVICE + "ModelInfer": Rule.CALL,
    _SERVICE + "ModelStreamInfer": Rule.CALL,
    _SERVICE + "RepositoryIndex": Rule.ADMIN,
    _SERVICE + "RepositoryModelLoad": Rule.ADMIN,
    _SERVICE + "RepositoryModelUnload": Rule.ADMIN,
    _SERVICE + "SystemSharedMemoryStatus": Rule.ADMIN,
    _SERVICE + "SystemSharedMemoryRegister": Rule.ADMIN,
    _SERVICE + "SystemSharedMemoryUnregister": Rule.ADMIN,
    _SERVICE + "CudaSharedMemoryStatus": Rule.ADMIN,
    _SERVICE + "CudaSharedMemoryRegister": Rule.ADMIN,
    _SERVICE + "CudaSharedMemoryUnregister": Rule.ADMIN,
    _SERVICE + "TraceSetting": Rule.ADMIN,
    _SERVICE + "LogSettings": Rule.ADMIN,
}
"""Every rpc of every service; a server does not start with one that is missing here."""


class Holder(NamedTuple):
    """Whose token it is."""

    digest: bytes
    name: str
    admin: bool


class Tokens:
    """The token file, read again when it changes; one that cannot be used leaves the tokens as they were.

    Raises: ConfigError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._look()
        self._holders = self._read()
        self._next_look = monotonic() + RELOAD_SECONDS

    def find(self, token: bytes) -> Holder | None:
        """The holder of a token. Takes the same time for all that are wrong."""
        self._refresh()
        digest = hashlib.sha256(token).digest()
        found = None
        for holder in self._holders:
            if hmac.compare_digest(holder.digest, digest):
                found = holder
        return found

    def _refresh(self) -> None:
        now = monotonic()
        if now < self._next_look:
            return
        self._next_look = now + RELOAD_SECONDS
        state = self._look()
        if state == self._state:
            return
        self._state = state
        try:
            self._holders = self._read()
        except ConfigError as error:
            _log.error("the tokens stay as they were: %s", error)
        else:
            _log.info("%d tokens read again", len(self._holders))

    def _look(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> list[Holder]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
            raise ConfigError(f"{self._path}: {reason}") from None
        holders = []
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            match = _LINE.fullmatch(text)
            if match is None:
                # the line itself is not shown: it may hold a token that was to be hashed
                raise ConfigError(
                    f"{self._path}: line {number}: expected a SHA-256 in hex, a name, and perhaps 'admin'"
                )
            holders.append(Holder(bytes.fromhex(match[1]), match[2], match[3] is not None))
        if not holders:
            raise ConfigError(f"{self._path}: no token in it")
        return holders


class Guard:
    """Admits calls by their rule.

    Args:
        tokens: None where calls need none.
        denied: counts refusals by status code.
    """

    def __init__(self, tokens: Tokens | None, denied: dict[str, int]) -> None:
        self._tokens = tokens
        self._denied = denied

    def handlers(self, service: str, handlers: dict[str, Any]) -> Any:
        """The generic handler of a service whose methods are guarded; those that need nothing stay as they are."""
        guarded = {name: self._handler(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        return grpc.method_handlers_generic_handler(service, guarded)

    def check(self, method: str, context: Any) -> None:
        """See that a call may go on.

        Raises: Unauthenticated, PermissionDenied.
        """
        rule = RULES[method]
        if rule is Rule.PROBE or (rule is Rule.CALL and self._tokens is None):
            return
        if self._tokens is None:
            if not loopback(context.peer()):
                raise PermissionDenied("this call is open to the server's own machine only")
            return
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        kind, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthenticated("this call needs a token, once, as metadata 'authorization: Bearer TOKEN'")
        holder = self._tokens.find(token.strip().encode())
        if holder is None:
            raise Unauthenticated("the token is not known to this server")
        if rule is Rule.ADMIN:
            if not holder.admin:
                raise PermissionDenied("this call needs a token marked admin")
            _log.info("%s called by %s", method, holder.name)

    def _handler(self, method: str, handler: Any) -> Any:
        rule = RULES[method]
        if rule is Rule.PROBE or (rule is Rule.CALL and self._tokens is None):
            return handler
        kind = "_".join("stream" if one else "unary" for one in (handler.request_streaming, handler.response_streaming))
        inner = getattr(handler, kind)

        async def answer(request: Any, context: Any) -> Any:
            await self._admit(method, context)
            return await inner(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await self._admit(method, context)
            async for response in inner(request, context):
                yield response

        make: Callable[..., Any] = getattr(grpc, f"{kind}_rpc_method_handler")
        behavior = stream if inspect.isasyncgenfunction(inner) else answer
        return make(behavior, handler.request_deserializer, handler.response_serializer)

    async def _admit(self, method: str, context: Any) -> None:
        try:
            self.check(method, context)
        except TriviumError as error:
            self._denied[error.status] = self._denied.get(error.status, 0) + 1
            await abort(context, error)


def loopback(peer: str) -> bool:
    """Whether gRPC's name of a peer, say ipv4:127.0.0.1:4711 or ipv6:%5B::1%5D:4711, is this machine."""
    kind, _, rest = unquote(peer).partition(":")
    if kind == "unix":
        return True
    try:
        address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def server_credentials(settings: Settings) -> Any:
    """gRPC's credentials of the settings' certificates; None where there are none.

    Raises: ConfigError where a file cannot be read or does not fit the others.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    # gRPC itself would only say that it cannot listen
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
        if settings.tls_client_ca is not None:
            context.load_verify_locations(settings.tls_client_ca)
        pair = settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
        authority = settings.tls_client_ca.read_bytes() if settings.tls_client_ca is not None else None
    except (OSError, ValueError) as error:
        files = [str(file) for file in (settings.tls_cert, settings.tls_key, settings.tls_client_ca) if file]
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"TLS files {', '.join(files)} cannot be used: {reason}") from None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)

"""Who may call what: a rule for every rpc, and bearer tokens from a file of hashes.

A line of the token file is the SHA-256 of a token, its holder's name, and "admin" where it may use the repository API:

    token=$(openssl rand -hex 32)
    echo "$(printf %s "$token" | sha256sum | cut -d' ' -f1) alice admin" >> tokens
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote

import grpc

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
        self._state = stamp(self._path)
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
        state = stamp(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._holders = self._read()
        except ConfigError as error:
            _log.error("the tokens stay as they were: %s", error)
        else:
            _log.info("%d tokens read again", len(self._holders))

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


def stamp(file: Path) -> tuple[int, ...]:
    """What changes when a file does: its time of change, size and inode; () where there is none."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


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
        return _Guarded(self, {f"/{service}/{name}": handler for name, handler in handlers.items()})

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """See that a caller with this metadata may go on.

        Raises: Unauthenticated, PermissionDenied.
        """
        rule = RULES[method]
        if self._tokens is None or rule is Rule.PROBE:
            return
        given = [value for key, value in metadata or () if key == "authorization"]
        kind, _, token = (given[0] if len(given) == 1 and isinstance(given[0], str) else "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthenticated("this call needs a token, once, as metadata 'authorization: Bearer TOKEN'")
        holder = self._tokens.find(token.strip().encode())
        if holder is None:
            raise Unauthenticated("the token is not known to this server")
        if rule is Rule.ADMIN:
            if not holder.admin:
                raise PermissionDenied("this call needs a token marked admin")
            _log.info("%s called by %s", method, holder.name)

    def local(self, method: str, handler: Any) -> Any:
        """The handler of a call that without tokens is its own machine's alone; others stay as they are."""
        rule = RULES[method]
        if self._tokens is not None or rule is not Rule.ADMIN:
            return handler
        inner = handler.unary_unary

        async def answer(request: Any, context: Any) -> Any:
            if not loopback(context.peer()):
                await self.refuse(context, PermissionDenied("this call is open to the server's own machine only"))
            return await inner(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    async def refuse(self, context: Any, error: TriviumError) -> NoReturn:
        """Count a refusal and end the call with it."""
        self._denied[error.status] = self._denied.get(error.status, 0) + 1
        await abort(context, error)


class _Guarded(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handlers by method, given out to those who may call them.

    gRPC asks for a handler when it has a call's metadata and, for a handler of streams, before it has any message: who
    is refused cannot make the server hold one.
    """

    def __init__(self, guard: Guard, handlers: dict[str, Any]) -> None:
        self._guard = guard
        self._handlers = {method: guard.local(method, handler) for method, handler in handlers.items()}

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is None:
            return None
        try:
            self._guard.check(method, handler_call_details.invocation_metadata)
        except TriviumError as error:
            return self._refusal(error)
        return handler

    def _refusal(self, error: TriviumError) -> Any:
        async def refuse(_: Any, context: Any) -> None:
            await self._guard.refuse(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)


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

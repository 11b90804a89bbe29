"""What the clients do, without the doing: each call as steps that a transport, blocking or asyncio, carries out."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from math import inf
from time import monotonic
from typing import Any, NamedTuple, TypeAlias, TypeVar
from uuid import uuid4

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .bundle import printable
from .client_codec import (
    MESSAGE_PICTURES,
    Batch,
    ModelMetadata,
    Picture,
    ServedPrediction,
    blocks,
    each,
    load,
    most_pictures,
    read_metadata,
    read_response,
    write_request,
)
from .connection import Connection, Metadata
from .errors import (
    BundleError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    OtherBundle,
    PermissionDenied,
    QueueFull,
    ServerError,
    TriviumError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UnknownModel,
)
from .retries import ClientStatistics, RetryBudget, RetryPolicy, pushback_ms

ERRORS: dict[str, type[TriviumError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "NOT_FOUND": UnknownModel,
    "FAILED_PRECONDITION": BundleError,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": QueueFull,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNIMPLEMENTED": Unimplemented,
}
"""What a status becomes; any other is a ServerError."""
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, section 3.2."""
BUNDLE = re.compile(r"[0-9A-Fa-f]{0,64}")
FOREVER = 1e9
"""Seconds: longer than this is no bound, for gRPC counts nanoseconds in 64 bits."""
T = TypeVar("T")


class Ask(NamedTuple):
    """Send a message, and come back with the response or the grpc.RpcError."""

    method: str
    message: Any
    timeout: float | None
    metadata: Metadata


class Pause(NamedTuple):
    """Wait."""

    seconds: float


class Work(NamedTuple):
    """Call a function that may take a disk's time, and come back with what it returns."""

    function: Callable[[], Any]


Step: TypeAlias = "Ask | Pause | Work"
Steps: TypeAlias = Generator[Step, Any, T]


class ClientCore:
    """Connection settings, retries and the steps of every call; Client and AsyncClient carry them out.

    Args:
        url: HOST:PORT of the server's gRPC. Several servers, a list of IP:PORT or all that DNS has of a name, are asked
            in turn (gRPC's round_robin), each as long as it says that it serves (grpc.health.v1).
        model: its name; may be left out where the server has one model and lets the caller see it.
        version: empty for the highest.
        bundle: SHA-256 of its manifest.json, hexadecimal, or how it begins; an answer of another bundle is an error.
        timeout: seconds for each call, retries included; None for no bound.
        retries: ask again where the server is away or full; or the policy to do so by.
        keepalive: seconds of silence after which a server that owes an answer is asked for a sign of life; without one
            in half that time it counts as away. 0 for never.
        token: a bearer token, where the server asks for one.
        tls: encrypt, and believe the certificates that the system believes.
        tls_ca: PEM file of who must have signed the server's certificate; implies tls.
        tls_cert, tls_key: PEM files of one's own certificate, where the server asks for one; imply tls.

    Raises: ConfigError for settings that cannot be used.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str | None = None,
        version: str = "",
        *,
        bundle: str = "",
        timeout: float | None = 30.0,
        retries: bool | RetryPolicy = True,
        keepalive: float = 10.0,
        token: str | None = None,
        tls: bool = False,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
    ) -> None:
        self._connection = Connection(url, token, tls, tls_ca, tls_cert, tls_key, keepalive)
        for name in (model or "", version):
            if not name.isprintable():
                raise ConfigError(f"{name!r} is no name or version of a model")
        if BUNDLE.fullmatch(bundle) is None:
            raise ConfigError(f"bundle must be up to 64 hexadecimal digits, got {bundle!r}")
        self.url = self._connection.url
        self.version = version
        self.bundle = bundle.lower()
        self.timeout = _positive(timeout)
        self._model = model
        self._max_batch: int | None = None
        self._policy = retries if isinstance(retries, RetryPolicy) else RetryPolicy(max_attempts=4 if retries else 1)
        self._budget = RetryBudget(self._policy)
        self._channel: Any = None
        self._methods: dict[str, Any] = {}
        self._open()

    @property
    def statistics(self) -> ClientStatistics:
        """Attempts, failed ones and retries so far."""
        return self._budget.statistics()

    def _open(self) -> None:
        """For a transport that can make its channel at once."""

    def _connect(self, transport: Any) -> None:
        """Make the channel, of the module grpc or grpc.aio; nothing is sent before the first call."""
        self._channel = self._connection.channel(transport)
        for stub in (service_pb2_grpc.GRPCInferenceServiceStub, health_pb2_grpc.HealthStub):
            self._methods |= vars(stub(self._channel))

    def _predict(
        self,
        pictures: Picture | Iterable[Picture],
        router: str | None,
        priority: int | None,
        coverage: float | None,
        max_risk: float | None,
        timeout: float | None,
        request_id: str | None,
        traceparent: str | None,
        tracestate: str | None,
    ) -> Steps[list[ServedPrediction]]:
        deadline = self._deadline(timeout)
        metadata = self._connection.metadata + _trace(traceparent, tracestate)
        write = partial(write_request, version=self.version, router=router, priority=priority)
        write = partial(write, coverage=coverage, max_risk=max_risk)
        write = partial(write, request_id=uuid4().hex if request_id is None else request_id)
        # one picture alone fits every server; how many do is asked where there is a second
        batch = Batch(1)
        predictions: list[ServedPrediction] = []

        def ask() -> Steps[None]:
            message = write(batch.pictures, (yield from self._find_model(deadline)))
            answers = read_response((yield from self._ask("ModelInfer", message, deadline, metadata)))
            if len(answers) != len(batch.pictures):
                raise ServerError(f"{self.url}: {len(answers)} answers to {len(batch.pictures)} pictures")
            if not answers[0].bundle.startswith(self.bundle):
                found = answers[0].bundle or "a bundle that it does not name"
                raise OtherBundle(f"{self.url}: a server answers from bundle {found}, expected {self.bundle}")
            predictions.extend(answers)

        for picture in each(pictures):
            loaded = (yield Work(partial(load, picture))) if blocks(picture) else load(picture)
            if batch.pictures and batch.limit == 1:
                batch.limit = yield from self._find_limit(deadline)
            if not batch.takes(loaded):
                yield from ask()
                batch = Batch(batch.limit)
            batch.add(loaded)
        if batch.pictures:
            yield from ask()
        return predictions

    def _describe(self, timeout: float | None) -> Steps[ModelMetadata]:
        deadline = self._deadline(timeout)
        name = yield from self._find_model(deadline)
        request = service_pb2.ModelMetadataRequest(name=name, version=self.version)
        metadata = yield from self._ask("ModelMetadata", request, deadline)
        return read_metadata(metadata, (yield from self._config(deadline)))

    def _ready(self, timeout: float | None) -> Steps[bool]:
        request = service_pb2.ServerReadyRequest()
        try:
            return bool((yield from self._ask("ServerReady", request, self._deadline(timeout), retry=False)).ready)
        except ServerError:
            return False

    def _health(self, service: str, timeout: float | None) -> Steps[str]:
        request = health_pb2.HealthCheckRequest(service=service)
        response = yield from self._ask("Check", request, self._deadline(timeout))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def _find_model(self, deadline: float) -> Steps[str]:
        """The model's name, asked from the server where none was given.

        Raises: ConfigError where the server has several, or does not tell.
        """
        if self._model is None:
            try:
                index = yield from self._ask("RepositoryIndex", service_pb2.RepositoryIndexRequest(), deadline)
            except PermissionDenied:
                raise ConfigError(f"{self.url} does not tell which models it has; name one") from None
            names = sorted({model.name for model in index.models})
            if len(names) != 1:
                raise ConfigError(f"{self.url} has {len(names)} models, name one of: {', '.join(names)}")
            self._model = names[0]
        return self._model

    def _find_limit(self, deadline: float) -> Steps[int]:
        """Most pictures of a message, asked from the server once."""
        if self._max_batch is None:
            config = yield from self._config(deadline)
            self._max_batch = most_pictures(config)
        return min(self._max_batch, MESSAGE_PICTURES)

    def _config(self, deadline: float) -> Steps[Any]:
        name = yield from self._find_model(deadline)
        request = service_pb2.ModelConfigRequest(name=name, version=self.version)
        return (yield from self._ask("ModelConfig", request, deadline))

    def _ask(
        self, method: str, message: Any, deadline: float, metadata: Metadata | None = None, retry: bool = True
    ) -> Steps[Any]:
        """The response to a message, asked as often as policy, budget and deadline allow."""
        attempts = 0
        while True:
            remaining = deadline - monotonic()
            if remaining <= 0:
                raise DeadlineExceeded(f"{self.url}: the deadline passed before the request was sent")
            timeout = None if remaining == inf else remaining
            self._budget.asked(attempts > 0)
            outcome = yield Ask(method, message, timeout, self._connection.metadata if metadata is None else metadata)
            if not isinstance(outcome, grpc.RpcError):
                self._budget.succeeded()
                return outcome
            attempts += 1
            pause = self._pause(outcome, attempts, deadline - monotonic(), retry)
            if pause is None:
                raise self._error(outcome, attempts)
            yield Pause(pause)

    def _pause(self, error: Any, attempts: int, remaining: float, retry: bool) -> float | None:
        """Seconds until the next attempt; None where there is none."""
        status = error.code().name
        again = retry and self._policy.retryable(status, error.details() or "") and not _too_large(error)
        if not self._budget.failed(status, again):
            return None
        pushback = pushback_ms(error.trailing_metadata())
        return self._policy.pause(attempts, pushback, remaining, random.random())

    def _error(self, error: Any, attempts: int) -> TriviumError:
        code, text = error.code().name, printable(error.details() or error.code().name)
        if attempts > 1:
            text += f" ({attempts} attempts)"
        if code == "INVALID_ARGUMENT":
            return InvalidRequest(text)
        kind = InvalidRequest if _too_large(error) else ERRORS.get(code, ServerError)
        return kind(f"{self.url}: {text}")

    def _deadline(self, timeout: float | None) -> float:
        timeout = self.timeout if timeout is None else _positive(timeout)
        return inf if timeout is None else monotonic() + timeout


def _too_large(error: Any) -> bool:
    """Whether gRPC itself refused the message for its length, which it calls RESOURCE_EXHAUSTED too."""
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or "")


def _trace(traceparent: str | None, tracestate: str | None) -> Metadata:
    if traceparent is None:
        return ()
    if TRACEPARENT.fullmatch(traceparent) is None:
        raise InvalidRequest(f"traceparent {printable(traceparent[:100])!r} does not follow W3C Trace Context")
    if tracestate is None:
        return (("traceparent", traceparent),)
    if not (tracestate.isascii() and tracestate.isprintable()):
        raise InvalidRequest("tracestate must be printable ASCII")
    return ("traceparent", traceparent), ("tracestate", tracestate)


def _positive(timeout: float | None) -> float | None:
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"timeout must be seconds > 0, got {timeout}")
    return None if timeout is None or timeout > FOREVER else timeout

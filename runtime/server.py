"""The server's life: load, listen, be ready, and on a signal say so, serve on, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from . import http2, memory, wire
from .bundle import Manifest
from .config import Settings
from .cpus import usable_cpus
from .drift import Drift, watch
from .errors import ConfigError
from .health import SERVING, Health
from .journal import Journal
from .lifecycle import Lifecycle
from .metrics import Metrics
from .probes import HttpServer
from .repository import Repository
from .scheduler import Scheduler
from .security import Guard, Tokens
from .service import Service
from .tls import server_credentials
from .transport import Http2Server

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((service_pb2, "GRPCInferenceService"), (health_pb2, "Health"))
)
GPU_BATCH, GPU_DELAY_MS = 16, 1.0
"""A card answers pictures cheaper together than one by one. These two were never tuned on one."""
GC_THRESHOLD = 10_000
"""Objects between collections: a request makes some hundred, and frees them by itself."""
FLUSH_SECONDS = 0.25
"""After the last answer was given to gRPC, how long it has to send it."""
MIN_PING_SECONDS = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """What a server says, as one line of JSON, once it takes requests."""

    grpc: str
    http: str
    models: list[str]
    instances: int
    pid: int
    event: str = "ready"

    def line(self) -> str:
        return json.dumps(asdict(self))


class GenericHandlers:
    """What generated code takes for a server: adds each service once, guarded, as a generic handler.

    Registered methods are left out: grpc.aio waits for each with a task of its own, and goes through all of them for
    every call, with the 20 methods of the protocol some 10 microseconds.
    """

    def __init__(self, server: Any, guard: Guard) -> None:
        self._server = server
        self._guard = guard

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Nothing: the same handlers come by name, which tells their rules."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        if infer := handlers.get("ModelInfer"):
            # generated code would copy the pictures out of the message, and out of what it parsed
            handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(
                infer.unary_unary, wire.InferMessage, infer.response_serializer
            )
        self._server.add_generic_rpc_handlers((self._guard.handlers(service, handlers),))


class Server:
    """One process's server: `load`, `start`, and in the end `stop`.

    Raises: ConfigError where there is nothing to serve.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.bundles and settings.repository is None:
            raise ConfigError("no bundle to serve; name at least one directory, or a --repository")
        self.settings = settings
        on_cpu = settings.device == "cpu"
        self.instances = settings.instances or (usable_cpus() if on_cpu else 1)
        delay_ms = settings.max_delay_ms
        self.scheduler = Scheduler(
            self.instances,
            settings.max_queue,
            settings.max_queue_bytes,
            batch=settings.batch or (1 if on_cpu else GPU_BATCH),
            max_delay=1e-3 * (delay_ms if delay_ms is not None else 0.0 if on_cpu else GPU_DELAY_MS),
            preferred=settings.preferred_batches,
            shed_late=settings.shed_late,
        )
        self.metrics = Metrics(scheduler_gauges(self.scheduler), lambda: self.scheduler.executed, self._drift)
        self.repository = Repository(self.metrics)
        self.health = Health()
        self.lifecycle = Lifecycle(settings, self.repository, self.metrics.loads, self.health)
        self._watch: asyncio.Task[None] | None = None
        self._journal = Journal.of(settings)
        self.service = Service(
            self.repository,
            self.lifecycle,
            self.scheduler,
            self.metrics,
            settings.max_batch,
            1e-3 * settings.inline_ms,
            self._journal,
        )
        self._http = HttpServer(self.metrics.exposition, lambda: self.health.ready)
        self._credentials = server_credentials(settings)
        self._grpc = self._transport()
        tokens = Tokens(settings.tokens) if settings.tokens is not None else None
        if tokens is not None and self._credentials is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
            _log.warning("tokens without TLS: whoever can read the network can use them")
        handlers = GenericHandlers(self._grpc, Guard(tokens, self.metrics.denied))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.service, handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, handlers)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer((*SERVICES, reflection.SERVICE_NAME)), handlers
        )

    def _drift(self, manifest: Manifest) -> Drift | None:
        return watch(manifest, self.settings.drift_window, self.settings.drift_run_length)

    def _transport(self) -> Any:
        settings = self.settings
        if self._credentials is not None and settings.transport == "http2":
            raise ConfigError("transport http2 has no TLS; leave transport at auto, or TLS to a proxy")
        if self._credentials is None and settings.transport != "grpc":
            limits = http2.Limits(settings.max_message_bytes, settings.max_queue_bytes, settings.max_streams)
            try:
                return Http2Server(limits, settings.keepalive_seconds, settings.connection_age_seconds)
            except OSError as error:
                if settings.transport == "http2":
                    raise ConfigError(f"transport http2: {error}") from None
                _log.warning("gRPC's own transport serves, which costs more CPU: %s", error)
        return grpc.aio.server(options=grpc_options(settings))

    async def load(self) -> None:
        """Open, verify, start and self-test every bundle.

        Raises: BundleError, EngineError, ConfigError.
        """
        await self.lifecycle.start()

    async def start(self) -> Ready:
        """Listen on both ports and become ready.

        Raises: ConfigError where an address cannot be had.
        """
        settings = self.settings
        try:
            address = _address(settings.host, settings.grpc_port)
            if isinstance(self._grpc, Http2Server):
                grpc_port = self._grpc.listen(settings.host, settings.grpc_port)
            elif self._credentials is None:
                grpc_port = self._grpc.add_insecure_port(address)
            else:
                grpc_port = self._grpc.add_secure_port(address, self._credentials)
        except (RuntimeError, OSError) as error:
            reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
            raise ConfigError(f"cannot listen on {address} for gRPC{reason}") from None
        try:
            http_port = await self._http.start(settings.host, settings.http_port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            address = _address(settings.host, settings.http_port)
            raise ConfigError(f"cannot listen on {address} for HTTP: {reason}") from None
        await self._grpc.start()
        self.service.ready = True
        self.health.set(dict.fromkeys(("", *self.repository.names(), *SERVICES), SERVING))
        if settings.watch:
            self._watch = asyncio.ensure_future(self.lifecycle.watch())
        models = [f"{served.manifest.name}/{served.manifest.version}" for served in self.repository]
        return Ready(
            _address(settings.host, grpc_port), _address(settings.host, http_port), models, self.instances, os.getpid()
        )

    async def stop(self, grace: float) -> None:
        """Say NOT_SERVING, serve on for `grace` seconds, refuse what is new, finish what was accepted, close."""
        self.service.ready = False
        self.health.stop()
        if self._watch is not None:
            self._watch.cancel()
        if grace > 0:
            _log.info("not ready any more; serving on for %g s", grace)
            await asyncio.sleep(grace)
        self.service.close()
        _log.info("draining %d requests", self.service.in_flight)
        # gRPC itself must not cut requests off before they were told why
        stopping = asyncio.ensure_future(self._grpc.stop(self.settings.drain_seconds + FLUSH_SECONDS))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.service.idle(), self.settings.drain_seconds)
        if left := self.service.in_flight:
            self.scheduler.close(0.0)
        # streams of health watchers would otherwise keep the server until drain_seconds are over
        await asyncio.wait({stopping}, timeout=FLUSH_SECONDS)
        await self._grpc.stop(0)
        await stopping
        self._http.close()
        await asyncio.to_thread(self.scheduler.close, 1.0)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)
        _log.log(logging.WARNING if left else logging.INFO, "drained; %d requests were given up", left)


def scheduler_gauges(scheduler: Scheduler) -> dict[str, tuple[str, Callable[[], float]]]:
    """What the queue shows of itself: name -> (help, value now)."""
    return {
        "trivium_instances": ("Worker threads.", lambda: scheduler.instances),
        "trivium_queue_depth": ("Pictures waiting.", lambda: scheduler.depth),
        "trivium_queue_age_seconds": ("Seconds that the picture which waits longest has waited.", scheduler.age),
        "trivium_running_pictures": ("Pictures being answered.", lambda: scheduler.running),
        "trivium_held_bytes": ("Bytes of requests waiting or running.", lambda: scheduler.nbytes),
    }


def grpc_options(settings: Settings) -> list[tuple[str, int]]:
    """How gRPC treats connections and messages."""
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # without it a second server would share the port in silence
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # it counts calls that are answered but not yet forgotten, and so refuses those that keep to the limit
        ("grpc.http.overload_protection", 0),
        # clients may ping as often as this; gRPC's own limit of 5 minutes hangs up on many that are set to a minute
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_SECONDS * 1000),
    ]
    if settings.keepalive_seconds:
        milliseconds = max(1000, round(1000 * settings.keepalive_seconds))
        options += [
            ("grpc.keepalive_time_ms", milliseconds),
            ("grpc.keepalive_timeout_ms", min(20_000, milliseconds)),
            # one sent to measure the connection, which holds up the one for its life
            ("grpc.http2.ping_timeout_ms", min(20_000, milliseconds)),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    if settings.connection_age_seconds:
        # what was asked before is answered
        options += [("grpc.max_connection_age_ms", max(1, round(1000 * settings.connection_age_seconds)))]
    return options


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once.

    SIGTERM, an orchestrator's, is followed by the grace time; SIGINT, a person's, drains at once.
    """
    if settings.ready_file is not None:
        # one left by an earlier server must not be taken for this one's
        with contextlib.suppress(OSError):
            settings.ready_file.unlink()
    memory.before_load()
    server = Server(settings)
    await server.load()
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[signal.Signals] = loop.create_future()

    def handle(number: signal.Signals) -> None:
        if signalled.done():
            _log.warning("second signal: leaving at once")
            os._exit(128 + number)
        signalled.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)
    ready = await server.start()
    _log.info("gRPC on %s, HTTP on %s, %d instances", ready.grpc, ready.http, ready.instances)
    # what is there now stays: to look through it again and again would cost a twentieth of a small request
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    memory.after_load()
    announce(ready.line(), settings.ready_file)
    number = await signalled
    _log.info("received %s", number.name)
    await server.stop(settings.grace_seconds if number == signal.SIGTERM else 0.0)


def announce(line: str, file: Path | None) -> None:
    """Print the ready line, and write it to a file that never holds half of it.

    Raises: ConfigError where the file cannot be written.
    """
    print(line, flush=True)
    if file is None:
        return
    try:
        part = file.with_name(f".{file.name}.{os.getpid()}")
        part.write_text(line + "\n")
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

"""The gRPC service: the Open Inference Protocol's calls, from message to queue and back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from time import monotonic, perf_counter_ns
from typing import Any, NoReturn

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from . import wire
from .batch import Asked, answer
from .errors import DeadlineExceeded, EngineError, InvalidRequest, QueueFull, ShuttingDown, TriviumError, UnknownModel
from .journal import Journal
from .lifecycle import Lifecycle
from .logs import about, request_id
from .metrics import Metrics
from .predictor import Prediction
from .repository import Repository, Served
from .scheduler import Job, Scheduler
from .status import abort

UNSUPPORTED = {
    "ModelStreamInfer": "streaming inference is not supported; use ModelInfer",
    "SystemSharedMemoryStatus": "shared memory is not supported",
    "SystemSharedMemoryRegister": "shared memory is not supported",
    "SystemSharedMemoryUnregister": "shared memory is not supported",
    "CudaSharedMemoryStatus": "shared memory is not supported",
    "CudaSharedMemoryRegister": "shared memory is not supported",
    "CudaSharedMemoryUnregister": "shared memory is not supported",
    "TraceSetting": "trace settings are not supported",
    "LogSettings": "log settings are not supported",
}
"""Calls of the protocol that answer UNIMPLEMENTED, with what to say."""
_log = logging.getLogger(__name__)
EXPIRY_SLACK = 0.05
"""Seconds: gRPC cancels a call a little before or after its deadline; within this of it, the deadline was the cause."""


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers on the event loop; the scheduler's workers do the work.

    Args:
        repository: the models.
        lifecycle: who loads and unloads them.
        scheduler: where pictures queue.
        metrics: where everything is counted.
        max_batch: most pictures in a request.
        inline: seconds; what takes the engine no longer is answered on the event loop itself.
        journal: what else is told of each request.
    """

    def __init__(
        self,
        repository: Repository,
        lifecycle: Lifecycle,
        scheduler: Scheduler,
        metrics: Metrics,
        max_batch: int,
        inline: float = 0.0,
        journal: Journal | None = None,
    ) -> None:
        self._repository = repository
        self._lifecycle = lifecycle
        self._scheduler = scheduler
        self._metrics = metrics
        self._max_batch = max_batch
        # where pictures run together, they wait for each other
        self._inline = inline if scheduler.batch == 1 else 0.0
        self._journal = journal
        self._closing = False
        self.in_flight = 0
        """Inference requests not yet answered."""
        self.ready = False
        """What ServerReady and ModelReady say."""
        metrics.gauges |= {
            "trivium_in_flight_requests": ("Requests not yet answered.", lambda: self.in_flight),
            "trivium_ready": ("1 while the server says that it is ready.", lambda: self.ready),
        }

    async def ModelInfer(self, request: wire.InferMessage, context: Any) -> Any:
        start = perf_counter_ns()
        self.in_flight += 1
        served: Served | None = None
        deadline: float | None = None
        try:
            if (remaining := context.time_remaining()) is not None:
                deadline = monotonic() + remaining
            served = self._repository.get(request.model_name, request.model_version)
            served.in_flight += 1
            predictor, counted = served.predictor, served.counted
            asked = wire.read_request(request.message, predictor.manifest, self._max_batch, request.raw)
            counted.pictures.observe(asked.size)
            if asked.timeout is not None:
                deadline = min(deadline or float("inf"), monotonic() + asked.timeout)
            starts = self._journal.starts(asked.size) if self._journal is not None else None
            job = await self._run(served, Asked(predictor, asked, starts), deadline, request.nbytes)
            predictions: list[Prediction] = job.results  # type: ignore[assignment]
            response = wire.write_response(
                request.id, predictor.manifest, asked.outputs, predictions, job.queue_ns, predictor.digest
            )
        except TriviumError as error:
            if served is not None:
                served.counted.rejected += isinstance(error, QueueFull)
                served.counted.expired += isinstance(error, DeadlineExceeded)
            self._failed(request, context, served, error.status, str(error), start)
            await abort(context, error, self._advice(request, error))
        except Exception:
            _log.exception("a request failed", extra=_about(request))
            unknown = EngineError("the request could not be answered; the server's log says why")
            self._failed(request, context, served, unknown.status, str(unknown), start)
            await abort(context, unknown, self._advice(request, unknown))
        except asyncio.CancelledError:
            # gRPC cancels the call when its deadline passes as well as when the client leaves
            expired = deadline is not None and monotonic() >= deadline - EXPIRY_SLACK
            if served is not None:
                served.counted.expired += expired
                served.counted.cancelled += not expired
            status, reason = ("DEADLINE_EXCEEDED", "too late") if expired else ("CANCELLED", "the client left")
            self._failed(request, context, served, status, reason, start)
            raise
        self.in_flight -= 1
        served.in_flight -= 1
        end = perf_counter_ns()
        trace: str | None = None
        if self._journal is not None:
            manifest = predictor.manifest
            trace = self._journal.answered(request, context, manifest, job, predictions, starts, start, end)
        served.last_ms = time.time_ns() // 1_000_000
        # once the answer is on its way, and before the loop reads what anybody asks next
        asyncio.get_running_loop().call_soon(counted.succeeded, predictions, job.queue_ns, end - start, trace)
        return response

    def _failed(self, request: Any, context: Any, served: Served | None, code: str, reason: str, start: int) -> None:
        """Count a request before its status is sent, so that whoever has the status finds it in the metrics."""
        self.in_flight -= 1
        end = perf_counter_ns()
        if self._journal is not None:
            manifest = served.manifest if served is not None else None
            self._journal.failed(request, context, manifest, code, reason, start, end)
        if served is None:
            self._metrics.unknown(code)
        else:
            served.in_flight -= 1
            served.counted.failed(code, end - start)

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        # Triton says false, not NOT_FOUND, of a model it does not have
        try:
            self._repository.get(request.name, request.version)
        except UnknownModel:
            return service_pb2.ModelReadyResponse(ready=False)
        except TriviumError as error:
            await abort(context, error)
        return service_pb2.ModelReadyResponse(ready=self.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        extensions = ["model_repository", "model_configuration", "binary_tensor_data", "parameters", "statistics"]
        return service_pb2.ServerMetadataResponse(name="trivium", version=version("trivium"), extensions=extensions)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        manifest = (await self._find(request, context)).manifest
        versions = [manifest.version] if request.version else self._repository.versions(manifest.name)
        return wire.metadata(manifest, versions)

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        predictor = (await self._find(request, context)).predictor
        return wire.config(predictor.manifest, self._max_batch, self._scheduler.instances, predictor.engine.device)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        if request.name:
            wanted = await self._find(request, context)
            chosen = [
                served
                for served in self._repository
                if served is wanted or (not request.version and served.manifest.name == request.name)
            ]
        else:
            chosen = list(self._repository)
        return service_pb2.ModelStatisticsResponse(model_stats=[_statistics(served) for served in chosen])

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        await _one_repository(request, context)
        response = service_pb2.RepositoryIndexResponse()
        for entry in self._lifecycle.index(self.ready):
            if entry.state == "READY" or not request.ready:
                response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return response

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await _one_repository(request, context)
        if request.parameters:
            await abort(context, InvalidRequest("load parameters are not supported; bundles are read from the disk"))
        try:
            await self._lifecycle.load(request.model_name)
        except TriviumError as error:
            await abort(context, error)
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await _one_repository(request, context)
        try:
            await self._lifecycle.unload(request.model_name)
        except TriviumError as error:
            await abort(context, error)
        return service_pb2.RepositoryModelUnloadResponse()

    async def _run(
        self,
        served: Served,
        asked: Asked,
        deadline: float | None,
        nbytes: int,
    ) -> Job[Prediction]:
        """Queue a request and wait until it is done.

        Raises: the TriviumError that ended it.
        """
        if self._closing:
            raise ShuttingDown("the server is shutting down")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not done.done():
                done.set_result(None)

        def finished(_: Job[Prediction]) -> None:
            loop.call_soon_threadsafe(wake)

        job = Job(
            asked.request.size,
            answer,
            finished,
            nbytes=nbytes,
            lane=served.manifest.name,
            priority=asked.request.priority,
            deadline=deadline,
            together=served.together,
            payload=asked,
        )
        # a picture that must be decoded first takes milliseconds
        short = asked.request.images is not None and asked.request.size * served.predictor.seconds <= self._inline
        if short and self._scheduler.run_here(job):
            if job.error is not None:
                raise job.error
            return job
        self._scheduler.submit(job)
        timer: asyncio.TimerHandle | None = None
        if deadline is not None:
            expired = DeadlineExceeded("the request's deadline passed before it was answered")
            timer = loop.call_later(max(0.0, deadline - monotonic()), self._scheduler.remove, job, expired)
        try:
            await done
        except asyncio.CancelledError:
            self._scheduler.remove(job, DeadlineExceeded("the client left"))
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if job.error is not None:
            raise job.error
        return job

    def close(self) -> None:
        """Refuse new inference requests with UNAVAILABLE."""
        self._closing = True

    async def idle(self) -> None:
        """Wait until no inference request is left."""
        while self.in_flight:
            await asyncio.sleep(0.01)

    async def _find(self, request: Any, context: Any) -> Served:
        try:
            return self._repository.get(request.name, request.version)
        except TriviumError as error:
            return await abort(context, error)

    def _advice(self, request: Any, error: TriviumError) -> tuple[tuple[str, str], ...]:
        """Trailing metadata: where to look in the log, or how long to wait before a full server is tried again.

        The wait, in milliseconds, is the time in which half of the queue will be answered; gRPC's own clients obey
        grpc-retry-pushback-ms (gRFC A6).
        """
        if error.status == EngineError.status:
            _log.error("a request was answered %s: %s", error.status, error, extra=_about(request))
            name = request_id(request)
            return (("request-id", name),) if name.isascii() and name.isprintable() else ()
        if not isinstance(error, QueueFull):
            return ()
        pictures = sum(served.counted.answered_pictures for served in self._repository)
        compute = sum(served.counted.sums_ns["compute"] for served in self._repository)
        each_ms = compute / pictures / 1e6 if pictures else 10.0
        wait = max(1, round(self._scheduler.depth / 2 * each_ms / self._scheduler.instances))
        return (("grpc-retry-pushback-ms", str(wait)),)


def _unsupported(text: str) -> Callable[[Service, Any, Any], Awaitable[NoReturn]]:
    async def call(self: Service, request: Any, context: Any) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
        raise AssertionError  # abort raises

    return call


for _name, _text in UNSUPPORTED.items():
    setattr(Service, _name, _unsupported(_text))


def _about(request: Any) -> dict[str, Any]:
    return about(request_id=request_id(request), model=request.model_name[:200], version=request.model_version[:40])


async def _one_repository(request: Any, context: Any) -> None:
    if request.repository_name:
        await abort(context, InvalidRequest("'repository_name' is not supported: there is one repository"))


def _statistics(served: Served) -> Any:
    counted, manifest = served.counted, served.manifest
    sums, count = counted.sums_ns, counted.successes
    statistics = service_pb2.ModelStatistics(
        name=manifest.name,
        version=manifest.version,
        last_inference=served.last_ms,
        inference_count=counted.answered_pictures,
        execution_count=counted.answered_pictures,
    )
    durations = statistics.inference_stats
    for field, stage in (
        (durations.success, "total"),
        (durations.queue, "queue"),
        (durations.compute_input, "decode"),
        (durations.compute_infer, "compute"),
        (durations.compute_output, "route"),
    ):
        field.count, field.ns = count, sums[stage]
    durations.fail.count, durations.fail.ns = counted.failures, sums["fail"]
    return statistics

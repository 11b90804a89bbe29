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
from .bundle import Manifest
from .errors import DeadlineExceeded, EngineError, QueueFull, ShuttingDown, TriviumError, UnknownModel
from .metrics import Metrics, ModelMetrics
from .predictor import Prediction, Predictor
from .repository import Repository
from .scheduler import Job, Scheduler

UNSUPPORTED = {
    "ModelStreamInfer": "streaming inference is not supported; use ModelInfer",
    "RepositoryModelLoad": "models are those named at the server's start; loading is not supported",
    "RepositoryModelUnload": "models are those named at the server's start; unloading is not supported",
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
        scheduler: where pictures queue.
        metrics: where everything is counted.
        max_batch: most pictures in a request.
    """

    def __init__(self, repository: Repository, scheduler: Scheduler, metrics: Metrics, max_batch: int) -> None:
        self._repository = repository
        self._scheduler = scheduler
        self._metrics = metrics
        self._max_batch = max_batch
        self._models: dict[Predictor, ModelMetrics] = {predictor: metrics.model(predictor) for predictor in repository}
        self._last_ms: dict[Predictor, int] = {}
        self._closing = False
        self.in_flight = 0
        """Inference requests not yet answered."""
        self.ready = False
        """What ServerReady and ModelReady say."""
        metrics.gauges |= {
            "trivium_in_flight_requests": ("Requests not yet answered.", lambda: self.in_flight),
            "trivium_ready": ("1 while the server says that it is ready.", lambda: self.ready),
        }

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        start = perf_counter_ns()
        self.in_flight += 1
        counted: ModelMetrics | None = None
        deadline: float | None = None
        try:
            if (remaining := context.time_remaining()) is not None:
                deadline = monotonic() + remaining
            predictor = self._repository.get(request.model_name, request.model_version)
            counted = self._models[predictor]
            asked = wire.read_request(request, predictor.manifest, self._max_batch)
            counted.pictures.observe(asked.size)
            if asked.timeout is not None:
                deadline = min(deadline or float("inf"), monotonic() + asked.timeout)
            job = await self._run(predictor, asked, deadline, request.ByteSize())
            predictions: list[Prediction] = job.results  # type: ignore[assignment]
            response = wire.write_response(request.id, predictor.manifest, asked.outputs, predictions, job.queue_ns)
        except TriviumError as error:
            if counted is not None:
                counted.rejected += isinstance(error, QueueFull)
                counted.expired += isinstance(error, DeadlineExceeded)
            self._failed(counted, error.status, start)
            await _abort(context, error, self._advice(error))
        except Exception:
            _log.exception("a request failed")
            self._failed(counted, "INTERNAL", start)
            await _abort(context, EngineError("the request could not be answered; the server's log says why"))
        except asyncio.CancelledError:
            # gRPC cancels the call when its deadline passes as well as when the client leaves
            expired = deadline is not None and monotonic() >= deadline - EXPIRY_SLACK
            if counted is not None:
                counted.expired += expired
                counted.cancelled += not expired
            self._failed(counted, "DEADLINE_EXCEEDED" if expired else "CANCELLED", start)
            raise
        self.in_flight -= 1
        counted.succeeded(predictions, job.queue_ns, perf_counter_ns() - start)
        self._last_ms[predictor] = time.time_ns() // 1_000_000
        return response

    def _failed(self, counted: ModelMetrics | None, code: str, start: int) -> None:
        """Count a request before its status is sent, so that whoever has the status finds it in the metrics."""
        self.in_flight -= 1
        if counted is None:
            self._metrics.unknown(code)
        else:
            counted.failed(code, perf_counter_ns() - start)

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
            await _abort(context, error)
        return service_pb2.ModelReadyResponse(ready=self.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        extensions = ["model_repository", "model_configuration", "binary_tensor_data", "parameters", "statistics"]
        return service_pb2.ServerMetadataResponse(name="trivium", version=version("trivium"), extensions=extensions)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        manifest = (await self._predictor(request, context)).manifest
        versions = [manifest.version] if request.version else self._repository.versions(manifest.name)
        return wire.metadata(manifest, versions)

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        predictor = await self._predictor(request, context)
        return wire.config(predictor.manifest, self._max_batch, self._scheduler.instances, predictor.engine.device)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        if request.name:
            wanted = await self._predictor(request, context)
            chosen = [
                predictor
                for predictor in self._repository
                if predictor is wanted or (not request.version and predictor.manifest.name == request.name)
            ]
        else:
            chosen = list(self._repository)
        return service_pb2.ModelStatisticsResponse(model_stats=[self._statistics(predictor) for predictor in chosen])

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        response = service_pb2.RepositoryIndexResponse()
        for predictor in self._repository:
            if self.ready or not request.ready:
                manifest: Manifest = predictor.manifest
                state = "READY" if self.ready else "UNAVAILABLE"
                response.models.add(name=manifest.name, version=manifest.version, state=state)
        return response

    async def _run(
        self, predictor: Predictor, asked: wire.Request, deadline: float | None, nbytes: int
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

        def answer(index: int) -> Prediction:
            return _answer(predictor, asked, index, job.queue_ns)

        job = Job(
            asked.size,
            answer,
            finished,
            nbytes=nbytes,
            lane=predictor.manifest.name,
            priority=asked.priority,
            deadline=deadline,
        )
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

    async def _predictor(self, request: Any, context: Any) -> Predictor:
        try:
            return self._repository.get(request.name, request.version)
        except TriviumError as error:
            return await _abort(context, error)

    def _advice(self, error: TriviumError) -> tuple[tuple[str, str], ...]:
        """Trailing metadata: how long a client should wait before it tries a full server again, in milliseconds.

        The time in which half of the queue will be answered; gRPC's own clients obey grpc-retry-pushback-ms (gRFC A6).
        """
        if not isinstance(error, QueueFull):
            return ()
        pictures = sum(counted.answered_pictures for counted in self._models.values())
        compute = sum(counted.sums_ns["compute"] for counted in self._models.values())
        each_ms = compute / pictures / 1e6 if pictures else 10.0
        wait = max(1, round(self._scheduler.depth / 2 * each_ms / self._scheduler.instances))
        return (("grpc-retry-pushback-ms", str(wait)),)

    def _statistics(self, predictor: Predictor) -> Any:
        counted, manifest = self._models[predictor], predictor.manifest
        sums, count = counted.sums_ns, counted.successes
        statistics = service_pb2.ModelStatistics(
            name=manifest.name,
            version=manifest.version,
            last_inference=self._last_ms.get(predictor, 0),
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


def _unsupported(text: str) -> Callable[[Service, Any, Any], Awaitable[NoReturn]]:
    async def call(self: Service, request: Any, context: Any) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
        raise AssertionError  # abort raises

    return call


for _name, _text in UNSUPPORTED.items():
    setattr(Service, _name, _unsupported(_text))


async def _abort(context: Any, error: TriviumError, metadata: tuple[tuple[str, str], ...] = ()) -> NoReturn:
    await context.abort(grpc.StatusCode[error.status], str(error), metadata)
    raise AssertionError  # abort raises


def _answer(predictor: Predictor, asked: wire.Request, index: int, queue_ns: int) -> Prediction:
    """One picture, in a worker thread."""
    if asked.images is not None:
        return predictor.infer(asked.images[index], asked.router, queue_ns=queue_ns)
    start = perf_counter_ns()
    try:
        image = predictor.decode(asked.encoded[index])
    except TriviumError as error:
        if asked.size == 1:
            raise
        raise type(error)(f"picture {index}: {error}") from None
    return predictor.infer(image, asked.router, decode_ns=perf_counter_ns() - start, queue_ns=queue_ns)

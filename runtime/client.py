"""The blocking client: pictures in, typed predictions out, with deadlines and a budget of retries."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import grpc

from .client_codec import ModelMetadata, Picture, ServedPrediction
from .client_core import Ask, ClientCore, Pause, Step, Steps, T


class Client(ClientCore):
    """A connection to a server; may be shared by threads.

    with Client("127.0.0.1:8001") as client:
        (answer,) = client.predict("cat.jpg", timeout=2)

    Its arguments and errors are ClientCore's.
    """

    def _open(self) -> None:
        self._connect(grpc)

    def predict(
        self,
        pictures: Picture | Iterable[Picture],
        *,
        router: str | None = None,
        priority: int | None = None,
        coverage: float | None = None,
        max_risk: float | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> list[ServedPrediction]:
        """Ask about one picture or several, of any kinds mixed, and get one prediction each, in their order.

        Args:
            router: a head's name or a rule; the model's own choice by default.
            priority: 1 urgent, 2 normal.
            coverage: of the prediction sets, where the bundle has guarantees; the model's own by default.
            max_risk: of error among the answers that are not abstained from; likewise.
            timeout: seconds for all of it, retries included; the client's by default.
            request_id: for the server's log; made up by default.
            traceparent, tracestate: of the caller's span, as W3C Trace Context writes them.

        Raises: InvalidPicture for a file that cannot be read; InvalidRequest, UnknownModel, Unauthenticated,
            PermissionDenied, QueueFull, DeadlineExceeded, Unavailable or another TriviumError as the server answered.
        """
        return self._run(
            self._predict(pictures, router, priority, coverage, max_risk, timeout, request_id, traceparent, tracestate)
        )

    def metadata(self, timeout: float | None = None) -> ModelMetadata:
        """What the server says of the model.

        Raises: as predict.
        """
        return self._run(self._describe(timeout))

    def ready(self, timeout: float | None = 1.0) -> bool:
        """Whether a server answers and is ready, asked once."""
        return self._run(self._ready(timeout))

    def health(self, service: str = "", timeout: float | None = None) -> str:
        """SERVING or NOT_SERVING, as grpc.health.v1 has it of the server, or of a model.

        Raises: UnknownModel, Unavailable or another TriviumError.
        """
        return self._run(self._health(service, timeout))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                step = steps.send(self._do(step))
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            steps.close()

    def _do(self, step: Step) -> Any:
        if isinstance(step, Ask):
            try:
                return self._methods[step.method](step.message, timeout=step.timeout, metadata=step.metadata)
            except grpc.RpcError as error:
                return error
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return step.function()

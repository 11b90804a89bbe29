"""The asyncio client: the same calls as the blocking one, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import grpc

from .client_codec import ModelMetadata, Picture, ServedPrediction
from .client_core import Ask, ClientCore, Pause, Step, Steps, T


class AsyncClient(ClientCore):
    """A connection to a server; for the tasks of one event loop.

    async with AsyncClient("127.0.0.1:8001") as client:
        (cat,), (dog,) = await asyncio.gather(client.predict("cat.jpg"), client.predict("dog.jpg"))

    Its arguments and errors are ClientCore's. Cancelling a task that waits for an answer cancels the call, and the
    server takes it from its queue.
    """

    async def predict(
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
        """As Client.predict; files are read and PIL images encoded in a thread."""
        return await self._run(
            self._predict(pictures, router, priority, coverage, max_risk, timeout, request_id, traceparent, tracestate)
        )

    async def metadata(self, timeout: float | None = None) -> ModelMetadata:
        """As Client.metadata."""
        return await self._run(self._describe(timeout))

    async def ready(self, timeout: float | None = 1.0) -> bool:
        """As Client.ready."""
        return await self._run(self._ready(timeout))

    async def health(self, service: str = "", timeout: float | None = None) -> str:
        """As Client.health."""
        return await self._run(self._health(service, timeout))

    async def close(self) -> None:
        """Calls under way are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        if self._channel is None:
            # not before: the channel belongs to the event loop that runs when it is made
            self._connect(grpc.aio)
        try:
            step = next(steps)
            while True:
                step = steps.send(await self._do(step))
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            steps.close()

    async def _do(self, step: Step) -> Any:
        if isinstance(step, Ask):
            try:
                return await self._methods[step.method](step.message, timeout=step.timeout, metadata=step.metadata)
            except grpc.RpcError as error:
                return error
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await asyncio.to_thread(step.function)

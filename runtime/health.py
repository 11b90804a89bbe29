"""Health: one state behind grpc.health.v1 (Check, Watch) and the HTTP probes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """States of services by name ("" is the whole server), of the event loop that owns it."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {"": NOT_SERVING}
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether the server takes requests."""
        return bool(self._states[""] == SERVING)

    def set(self, states: dict[str, int]) -> None:
        """Change the state of services and tell those who watch."""
        self._states |= states
        # each change has an event of its own, so that no watcher can miss one or keep another's from waking
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Say NOT_SERVING for everything."""
        self.set(dict.fromkeys(self._states, NOT_SERVING))

    async def Check(self, request: Any, context: Any) -> Any:  # the protocol's spelling
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service[:200]!r}")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        told: int | None = None
        while True:
            changed = self._changed
            state = self._states.get(request.service, UNKNOWN)
            if state != told:
                told = state
                yield health_pb2.HealthCheckResponse(status=state)
            if changed is self._changed:
                await changed.wait()

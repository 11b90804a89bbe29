"""How an error ends a gRPC call: one status, for whoever is still there to read it."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc

from .errors import TriviumError

Metadata = tuple[tuple[str, str], ...]


async def abort(context: Any, error: TriviumError, metadata: Metadata = ()) -> NoReturn:
    """End a call with an error's status and text.

    Raises: always; CancelledError where the client has left meanwhile, which gRPC would report as a failure of its own.
    """
    try:
        await context.abort(grpc.StatusCode[error.status], str(error), metadata)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError  # abort raises

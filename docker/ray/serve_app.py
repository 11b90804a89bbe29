"""The Open Inference Protocol by Ray Serve, for teams that already run Ray: the predictor of `trivium serve`.

serve run serve_app:build bundle=/path/of/bundle, with this directory on PYTHONPATH on every node; see README.md.
"""

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import grpc
from pydantic import BaseModel, ConfigDict
from ray import serve
from tritonclient.grpc import service_pb2

from trivium.runtime import wire
from trivium.runtime.errors import TriviumError, UnknownModel
from trivium.runtime.predictor import Predictor

MAX_BATCH = 64
T = TypeVar("T")


class Arguments(BaseModel):
    """What `serve run` and serve.yaml may say."""

    model_config = ConfigDict(extra="forbid")

    bundle: str
    """A directory that every node sees."""
    replicas: int = 1
    """Processes, each with a CPU."""
    queued: int = 256
    """Most requests that wait in a proxy; beyond it RESOURCE_EXHAUSTED."""


# one request that runs, and one that is at hand when it ends
@serve.deployment(max_ongoing_requests=2, ray_actor_options={"num_cpus": 1})
class Replica:
    """One bundle. Ray's proxies call the methods, which are named after the protocol's."""

    def __init__(self, bundle: str) -> None:
        self._predictor = Predictor.load(bundle)

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:
        empty = service_pb2.ModelInferResponse
        # so that the replica's loop can say meanwhile that it is alive
        return await asyncio.to_thread(self._answered, grpc_context, empty, self._infer, request)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:
        def answer(_: Any) -> Any:
            manifest = self._predictor.manifest
            return wire.metadata(manifest, [manifest.version])

        return self._answered(grpc_context, service_pb2.ModelMetadataResponse, answer, request)

    async def ModelConfig(self, request: Any, grpc_context: Any) -> Any:
        def answer(_: Any) -> Any:
            return wire.config(self._predictor.manifest, MAX_BATCH, 1, self._predictor.engine.device)

        return self._answered(grpc_context, service_pb2.ModelConfigResponse, answer, request)

    async def ModelReady(self, request: Any) -> Any:
        manifest = self._predictor.manifest
        return service_pb2.ModelReadyResponse(
            ready=request.name == manifest.name and request.version in ("", manifest.version)
        )

    async def ServerLive(self, request: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="trivium", version=version("trivium"))

    async def RepositoryIndex(self, request: Any) -> Any:
        manifest = self._predictor.manifest
        response = service_pb2.RepositoryIndexResponse()
        response.models.add(name=manifest.name, version=manifest.version, state="READY")
        return response

    def _answered(self, context: Any, empty: Callable[[], T], answer: Callable[[Any], T], request: Any) -> T:
        """What a function answers to a request for this model, or nothing and the status of its error."""
        try:
            self._check(request)
            return answer(request)
        except TriviumError as error:
            context.set_code(grpc.StatusCode[error.status])
            context.set_details(str(error))
            return empty()

    def _check(self, request: Any) -> None:
        """Raises: UnknownModel for a request for another model or version."""
        manifest = self._predictor.manifest
        inference = isinstance(request, service_pb2.ModelInferRequest)
        name, asked = (request.model_name, request.model_version) if inference else (request.name, request.version)
        if name != manifest.name or asked not in ("", manifest.version):
            raise UnknownModel(f"no model {name[:200]!r}, version {asked[:40] or 'any'}; there is {manifest.name!r}")

    def _infer(self, request: Any) -> Any:
        predictor = self._predictor
        asked = wire.read_request(request, predictor.manifest, MAX_BATCH)
        predictions = []
        for index in range(asked.size):
            if asked.images is None:
                image, decode_ns = predictor.decode_one(asked.encoded, index)
            else:
                image, decode_ns = asked.images[index], 0
            predictions.append(predictor.infer(image, asked.router, asked.terms, decode_ns=decode_ns))
        return wire.write_response(request.id, predictor.manifest, asked.outputs, predictions, 0, predictor.digest)


def build(arguments: Arguments) -> serve.Application:
    """The application; the first thing that a replica does is the bundle's self-test."""
    return Replica.options(num_replicas=arguments.replicas, max_queued_requests=arguments.queued).bind(arguments.bundle)

"""The client: pictures in, typed predictions out, with deadlines and a budget of retries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidPicture,
    InvalidRequest,
    PermissionDenied,
    QueueFull,
    ServerError,
    TriviumError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from .predictor import Prediction, Timings
from .wire import ENCODED, IMAGE, OUTPUTS, pack_bytes, unpack_bytes

Picture: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8]"
"""A file's path, the bytes of a JPEG, PNG or WebP, or uint8 [H, W, 3] in the model's size."""
MESSAGE_PICTURES, MESSAGE_BYTES = 16, 16 << 20
"""Most of one message; more pictures are asked in several."""
ERRORS: dict[grpc.StatusCode, type[TriviumError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: UnknownModel,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}
# A retry costs a token and a success gives a tenth back: an overloaded server is not asked ever more (gRFC A6).
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}


class Client:
    """A connection to a server; may be shared by threads.

    Args:
        url: host:port of the server's gRPC.
        model: its name; may be left out where the server has one model.
        version: empty for the highest.
        timeout: seconds for each request, retries included.
        retries: ask again, up to three times and with growing pauses, where the server is away or full.
        token: a bearer token, where the server asks for one.
        tls: encrypt, and believe the certificates that the system believes.
        tls_ca: PEM file of who must have signed the server's certificate; implies tls.
        tls_cert, tls_key: PEM files of one's own certificate, where the server asks for one; imply tls.

    Raises: ConfigError where a PEM file cannot be read.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        version: str = "",
        *,
        timeout: float = 30.0,
        retries: bool = True,
        token: str | None = None,
        tls: bool = False,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
    ) -> None:
        if (tls_cert is None) != (tls_key is None):
            raise ConfigError("tls_cert and tls_key belong together")
        self.url = url
        self.version = version
        self.timeout = timeout
        self._model = model
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_retries", int(retries)),
        ]
        if retries:
            options.append(("grpc.service_config", json.dumps(RETRIES)))
        self._metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        if tls or tls_ca is not None or tls_cert is not None:
            credentials = grpc.ssl_channel_credentials(_pem(tls_ca), _pem(tls_key), _pem(tls_cert))
            self._channel = grpc.secure_channel(url, credentials, options)
        else:
            self._channel = grpc.insecure_channel(url, options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def predict(
        self, pictures: Sequence[Picture], *, router: str | None = None, timeout: float | None = None
    ) -> list[Prediction]:
        """Ask about pictures, and get one prediction each, in their order.

        Raises: InvalidPicture for a file that cannot be read; InvalidRequest, UnknownModel, QueueFull,
            DeadlineExceeded, Unavailable or ServerError as the server answered.
        """
        predictions: list[Prediction] = []
        for message in self._messages(pictures, router):
            response = self._call(self._stub.ModelInfer, message, timeout)
            predictions.extend(read_response(response))
        return predictions

    def ready(self, timeout: float = 1.0) -> bool:
        """Whether a server answers and is ready."""
        try:
            return bool(self._call(self._stub.ServerReady, service_pb2.ServerReadyRequest(), timeout).ready)
        except ServerError:
            return False

    @property
    def model(self) -> str:
        """The model's name, asked from the server where none was given.

        Raises: ConfigError where the server has several, or does not tell.
        """
        if self._model is None:
            try:
                index = self._call(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest(), None)
            except PermissionDenied:
                raise ConfigError(f"{self.url} does not tell which models it has; name one") from None
            names = sorted({model.name for model in index.models})
            if len(names) != 1:
                raise ConfigError(f"{self.url} has {len(names)} models, name one of: {', '.join(names)}")
            self._model = names[0]
        return self._model

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, message: Any, timeout: float | None) -> Any:
        try:
            return method(message, timeout=self.timeout if timeout is None else timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            kind = ERRORS.get(error.code(), ServerError)
            raise kind(f"{self.url}: {error.details() or error.code().name}") from None

    def _messages(self, pictures: Sequence[Picture], router: str | None) -> Iterator[Any]:
        loaded = (_load(picture) for picture in pictures)
        # neighbours of one kind and size share messages, so that the answers keep the pictures' order
        for shape, group in groupby(loaded, lambda one: None if isinstance(one, bytes) else one.shape):
            batch: list[Any] = []
            nbytes = 0
            for picture in group:
                size = len(picture) if isinstance(picture, bytes) else picture.nbytes
                if batch and (len(batch) == MESSAGE_PICTURES or nbytes + size > MESSAGE_BYTES):
                    yield self._message(batch, shape, router)
                    batch, nbytes = [], 0
                batch.append(picture)
                nbytes += size
            yield self._message(batch, shape, router)

    def _message(self, batch: list[Any], shape: tuple[int, ...] | None, router: str | None) -> Any:
        message = service_pb2.ModelInferRequest(model_name=self.model, model_version=self.version)
        if router is not None:
            message.parameters["router"].string_param = router
        if shape is None:
            message.inputs.add(name=ENCODED, datatype="BYTES", shape=[len(batch)])
            message.raw_input_contents.append(b"".join(pack_bytes(one) for one in batch))
        else:
            message.inputs.add(name=IMAGE, datatype="UINT8", shape=[len(batch), *shape])
            message.raw_input_contents.append(b"".join(one.tobytes() for one in batch))
        return message


def read_response(response: Any) -> list[Prediction]:
    """The predictions of a ModelInferResponse with all outputs.

    Their timings are the request's: sums over its pictures, and the wait of the first.
    """
    found: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        shape = tuple(tensor.shape)
        if tensor.datatype == "BYTES":
            found[tensor.name] = [one.decode() for one in unpack_bytes(raw, shape[0], tensor.name)]
        else:
            found[tensor.name] = np.frombuffer(raw, DTYPES[tensor.datatype]).reshape(shape)
    if missing := [name for name in OUTPUTS if name not in found]:
        raise ServerError(f"the server's answer lacks {', '.join(missing)}; is it a trivium server?")
    ns = {name: response.parameters[f"{name}_ns"].int64_param for name in ("decode", "queue", "compute", "route")}
    timings = Timings(**ns)
    return [
        Prediction(
            probabilities=found["probabilities"][i],
            class_id=int(found["class_id"][i]),
            label=found["label"][i],
            head=found["head"][i],
            head_probabilities=found["head_probabilities"][i],
            predictive_entropy=found["predictive_entropy"][i],
            mutual_information=found["mutual_information"][i],
            divergence=found["divergence"][i],
            energy=found["energy"][i],
            timings=timings,
        )
        for i in range(len(found["label"]))
    ]


DTYPES: dict[str, Any] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}


def _pem(path: str | os.PathLike[str] | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{os.fspath(path or '')}: {error.strerror}") from None


def _load(picture: Picture) -> bytes | NDArray[np.uint8]:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise InvalidRequest(f"an array must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
        return picture
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise InvalidPicture(f"{os.fspath(picture)}: {error.strerror}") from None

"""What a client sends and gets: pictures to request messages, response messages to typed predictions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from .errors import InvalidPicture, InvalidRequest, ServerError
from .predictor import Prediction, Timings
from .wire import ENCODED, IMAGE, OUTPUTS, pack_bytes, unpack_bytes

if TYPE_CHECKING:
    from PIL import Image

Picture: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
"""A file's path, the bytes of a JPEG, PNG or WebP, a PIL image, or uint8 [H, W, 3] or [N, H, W, 3] in the model's
size."""
Loaded: TypeAlias = "bytes | NDArray[np.uint8]"
"""A picture as it is sent: encoded, or uint8 [H, W, 3]."""
MESSAGE_PICTURES, MESSAGE_BYTES = 16, 16 << 20
"""Most of one message; more pictures are asked in several."""
PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}
"""Of PIL images: those that a PNG can hold as they are."""
NEAREST_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
"""What keeps the pixels of others; the rest becomes RGB."""
DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8"), "BOOL": np.dtype("?")}


@dataclass(frozen=True, slots=True, eq=False)
class ServedPrediction(Prediction):
    """A prediction, and where it comes from. Its timings are the request's: sums over the pictures of its message."""

    request_id: str
    """As the server's log has it."""
    model: str
    version: str
    bundle: str
    """SHA-256 of the manifest.json that answered, hexadecimal; empty where the server does not say."""


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a server says of a model."""

    name: str
    versions: tuple[str, ...]
    """Served now, ascending."""
    heads: tuple[str, ...]
    """In the order of a prediction's axis K."""
    classes: tuple[str, ...]
    """In the order of a prediction's axis C."""
    routers: tuple[str, ...]
    """What a request may route by."""
    size: tuple[int, int]
    """Height and width of pictures that are sent as arrays."""
    max_batch: int
    """Most pictures of one message."""
    guarantees: dict[str, Any] | None = None
    """What may be asked of the bundle's guarantees, as promises.ranges has it; None where it has none."""


def each(pictures: Picture | Iterable[Picture]) -> Iterator[Picture]:
    """One picture, several, or arrays of several, one by one; nothing is read yet."""
    several: Iterable[Any]
    if isinstance(pictures, np.ndarray) or not isinstance(pictures, Iterable) or isinstance(pictures, _SINGLE):
        several = (pictures,)
    else:
        several = pictures
    for picture in several:
        if isinstance(picture, np.ndarray) and picture.ndim == 4:
            yield from picture
        else:
            yield picture


_SINGLE = (str, os.PathLike, bytes, bytearray, memoryview)


def blocks(picture: Picture) -> bool:
    """Whether loading it takes a disk's or an encoder's time."""
    return not isinstance(picture, (bytes, bytearray, memoryview, np.ndarray))


def load(picture: Picture) -> Loaded:
    """A picture as it is sent; of a PIL image the pixels as PNG, turned as its EXIF orientation says.

    Raises: InvalidPicture for a file that cannot be read or an image that cannot be decoded; InvalidRequest for
        anything else.
    """
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InvalidRequest(
                f"an array must be uint8 [H, W, 3] or [N, H, W, 3], got {picture.dtype} {list(picture.shape)}"
            )
        return picture
    if isinstance(picture, (str, os.PathLike)):
        try:
            return Path(picture).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise InvalidPicture(f"{os.fspath(picture)}: {getattr(error, 'strerror', None) or error}") from None
    from PIL import Image

    if isinstance(picture, Image.Image):
        return _png(picture)
    raise InvalidRequest(f"a picture must be a path, bytes, a PIL image or a NumPy array, not {type(picture).__name__}")


def _png(picture: Image.Image) -> bytes:
    from PIL import ImageOps

    out = BytesIO()
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode not in PNG_MODES:
            picture = picture.convert(NEAREST_MODES.get(picture.mode, "RGB"))
        # the fastest compression: the network is usually near, and the bytes are read once
        picture.save(out, "PNG", compress_level=1)
    except Exception as error:  # the file behind a lazy image may be broken in any way
        raise InvalidPicture(f"the PIL image cannot be encoded: {error or type(error).__name__}") from None
    return out.getvalue()


class Batch:
    """Neighbours of one kind and size, which can share a message."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pictures: list[Loaded] = []
        self._nbytes = 0

    def takes(self, picture: Loaded) -> bool:
        """Whether it still fits in; the first always does."""
        if not self.pictures:
            return True
        return (
            _shape(picture) == _shape(self.pictures[0])
            and len(self.pictures) < self.limit
            and self._nbytes + _size(picture) <= MESSAGE_BYTES
        )

    def add(self, picture: Loaded) -> None:
        self.pictures.append(picture)
        self._nbytes += _size(picture)


def write_request(
    pictures: Sequence[Loaded],
    model: str,
    version: str = "",
    *,
    request_id: str = "",
    router: str | None = None,
    priority: int | None = None,
    coverage: float | None = None,
    max_risk: float | None = None,
) -> Any:
    """The ModelInferRequest for pictures of one kind and size.

    Raises: InvalidRequest for an id, a router, a priority or a level that no message can hold.
    """
    try:
        message = service_pb2.ModelInferRequest(model_name=model, model_version=version, id=request_id)
        if router is not None:
            message.parameters["router"].string_param = router
        if priority is not None:
            message.parameters["priority"].int64_param = priority
        for name, level in (("coverage", coverage), ("max_risk", max_risk)):
            if level is not None:
                # text is exact, by whatever way a server hands it on
                message.parameters[name].string_param = repr(float(level))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be written: {error}") from None
    if (shape := _shape(pictures[0])) is None:
        message.inputs.add(name=ENCODED, datatype="BYTES", shape=[len(pictures)])
        message.raw_input_contents.append(b"".join(pack_bytes(bytes(one)) for one in pictures))
    else:
        message.inputs.add(name=IMAGE, datatype="UINT8", shape=[len(pictures), *shape])
        # tobytes alone for one picture: joining would copy it once more
        raw = [one.tobytes() for one in pictures if isinstance(one, np.ndarray)]
        message.raw_input_contents.append(raw[0] if len(raw) == 1 else b"".join(raw))
    return message


def read_response(response: Any) -> list[ServedPrediction]:
    """The predictions of a ModelInferResponse with all outputs.

    Raises: ServerError for one that is not a trivium server's.
    """
    try:
        found = {
            tensor.name: _tensor(tensor, raw)
            for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }
        if missing := [name for name in OUTPUTS if name not in found]:
            raise ServerError(f"the server's answer lacks {', '.join(missing)}; is it a trivium server?")
        if len({len(values) for values in found.values()}) != 1:
            raise ValueError("the outputs differ in length")
    except (KeyError, ValueError, IndexError, InvalidRequest) as error:
        raise ServerError(f"the server's answer cannot be read: {error}") from None
    ns = {name: response.parameters[f"{name}_ns"].int64_param for name in ("decode", "queue", "compute", "route")}
    timings = Timings(**ns)
    bundle = response.parameters["bundle"].string_param
    return [
        ServedPrediction(
            probabilities=found["probabilities"][i],
            class_id=found["class_id"][i].item(),
            label=found["label"][i],
            head=found["head"][i],
            head_probabilities=found["head_probabilities"][i],
            predictive_entropy=found["predictive_entropy"][i],
            mutual_information=found["mutual_information"][i],
            divergence=found["divergence"][i],
            energy=found["energy"][i],
            prediction_set=found["prediction_set"][i] if "prediction_set" in found else None,
            abstain=found["abstain"][i].item() if "abstain" in found else None,
            shift_score=found["shift_score"][i].item() if "shift_score" in found else None,
            timings=timings,
            request_id=response.id,
            model=response.model_name,
            version=response.model_version,
            bundle=bundle,
        )
        for i in range(len(found["label"]))
    ]


def read_metadata(metadata: Any, config: Any) -> ModelMetadata:
    """What ModelMetadataResponse and ModelConfigResponse say together.

    Raises: ServerError where they do not name heads, routers and classes.
    """
    parameters = {name: value.string_value for name, value in config.config.parameters.items()}
    try:
        # Triton's models that do not batch have the batch's axis in front
        (height, width) = next(tensor.dims[-3:-1] for tensor in config.config.input if tensor.name == IMAGE)
        return ModelMetadata(
            name=metadata.name,
            versions=tuple(metadata.versions),
            heads=tuple(parameters["heads"].split(",")),
            classes=tuple(str(label) for label in json.loads(parameters["classes"])),
            routers=tuple(parameters["routers"].split(",")),
            size=(height, width),
            max_batch=most_pictures(config),
            guarantees=json.loads(parameters["guarantees"]) if "guarantees" in parameters else None,
        )
    except (KeyError, ValueError, TypeError, StopIteration):
        raise ServerError(f"the server does not say what heads and classes {metadata.name!r} has") from None


def most_pictures(config: Any) -> int:
    """Of one message, as a ModelConfigResponse says it: by a parameter where Triton does not batch."""
    parameter = config.config.parameters["max_batch"].string_value
    return max(1, config.config.max_batch_size or (int(parameter) if parameter.isdecimal() else 1))


def _tensor(tensor: Any, raw: bytes) -> Any:
    shape = tuple(tensor.shape)
    if tensor.datatype == "BYTES":
        elements = unpack_bytes(raw, shape[0], tensor.name)
        if len(elements) != shape[0]:
            raise ValueError(f"{tensor.name!r} holds {len(elements)} elements, its shape says {shape[0]}")
        return [one.decode() for one in elements]
    return np.frombuffer(raw, DTYPES[tensor.datatype]).reshape(shape)


def _shape(picture: Loaded) -> tuple[int, ...] | None:
    """None for an encoded picture."""
    return None if isinstance(picture, bytes) else picture.shape


def _size(picture: Loaded) -> int:
    return len(picture) if isinstance(picture, bytes) else picture.nbytes

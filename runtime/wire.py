"""The wire contract: Open Inference Protocol v2 messages to typed requests, and predictions back to messages."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2

from .bundle import Manifest
from .errors import InvalidRequest
from .predictor import Prediction
from .promises import LEVELS, WITHOUT, Terms, number, ranges, terms
from .router import unknown_router
from .scheduler import NORMAL, URGENT

IMAGE, ENCODED = "image", "encoded_image"
PARAMETERS = ("router", "priority", "timeout", "coverage", "max_risk")
_LENGTH = struct.Struct("<I")


class InferMessage:
    """A ModelInferRequest whose raw contents were not copied out of the message that came.

    Raises: google.protobuf.message.DecodeError where the bytes are no such message.
    """

    __slots__ = ("message", "nbytes", "raw")

    def __init__(self, data: bytes) -> None:
        self.nbytes = len(data)
        """Of the message as it came."""
        head, self.raw = _split(data)
        self.message = service_pb2.ModelInferRequest.FromString(head)
        """Everything but raw_input_contents."""

    @property
    def id(self) -> str:
        return self.message.id  # type: ignore[no-any-return]

    @id.setter
    def id(self, value: str) -> None:
        self.message.id = value

    @property
    def model_name(self) -> str:
        return self.message.model_name  # type: ignore[no-any-return]

    @property
    def model_version(self) -> str:
        return self.message.model_version  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Request:
    """A request that fits its model."""

    size: int
    """Pictures."""
    images: NDArray[np.uint8] | None
    """[N, H, W, 3], a view of the message; None where the pictures came encoded."""
    encoded: list[bytes]
    router: str | None
    priority: int
    timeout: float | None
    """Seconds from arrival, beside the call's own deadline."""
    outputs: tuple[str, ...]
    terms: Terms | None
    """Of the bundle's guarantees; None where it has none."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the answer."""

    datatype: str
    dims: Callable[[int, int], tuple[int, ...]]
    """Shape behind the batch, of K heads and C classes."""
    pack: Callable[[Prediction], bytes]


def _label(prediction: Prediction) -> bytes:
    return pack_bytes(prediction.label.encode())


def _head(prediction: Prediction) -> bytes:
    return pack_bytes(prediction.head.encode())


def _set(prediction: Prediction) -> bytes:
    assert prediction.prediction_set is not None, "looked up for every request that has it among its outputs"
    return prediction.prediction_set.tobytes()


_INT64, _FP32, _BOOL = struct.Struct("<q"), struct.Struct("<f"), struct.Struct("?")
OUTPUTS: dict[str, Output] = {
    "probabilities": Output("FP32", lambda k, c: (c,), lambda p: p.probabilities.tobytes()),
    "class_id": Output("INT64", lambda k, c: (), lambda p: _INT64.pack(p.class_id)),
    "label": Output("BYTES", lambda k, c: (), _label),
    "head": Output("BYTES", lambda k, c: (), _head),
    "head_probabilities": Output("FP32", lambda k, c: (k, c), lambda p: p.head_probabilities.tobytes()),
    "predictive_entropy": Output("FP32", lambda k, c: (k,), lambda p: p.predictive_entropy.tobytes()),
    "mutual_information": Output("FP32", lambda k, c: (k,), lambda p: p.mutual_information.tobytes()),
    "divergence": Output("FP32", lambda k, c: (k, k), lambda p: p.divergence.tobytes()),
    "energy": Output("FP32", lambda k, c: (k,), lambda p: p.energy.tobytes()),
}
"""The outputs of every model by name, in the order of an answer that was not asked for some."""
PROMISES: dict[str, Output] = {
    "prediction_set": Output("BOOL", lambda k, c: (c,), _set),
    "abstain": Output("BOOL", lambda k, c: (), lambda p: _BOOL.pack(p.abstain)),
    "shift_score": Output("FP32", lambda k, c: (), lambda p: _FP32.pack(p.shift_score)),
}
"""Those that a model has besides where its bundle has guarantees."""
EVERY = OUTPUTS | PROMISES
_NAMES = {False: tuple(OUTPUTS), True: tuple(EVERY)}


def outputs_of(manifest: Manifest) -> dict[str, Output]:
    """The outputs that a model has."""
    return OUTPUTS if manifest.guarantees is None else EVERY


def read_request(
    message: Any, manifest: Manifest, max_batch: int, raw_contents: Sequence[bytes | memoryview] | None = None
) -> Request:
    """A ModelInferRequest as a Request; its raw contents are those given, where they lie outside of it.

    Raises: InvalidRequest, one line that says what is wrong and what is expected.
    """
    inputs = message.inputs
    if len(inputs) != 1:
        names = ", ".join(repr(tensor.name[:40]) for tensor in inputs[:8]) or "none"
        raise InvalidRequest(f"expected one input, {IMAGE!r} or {ENCODED!r}, got {len(inputs)}: {names}")
    tensor = inputs[0]
    name = tensor.name
    if name not in (IMAGE, ENCODED):
        raise InvalidRequest(
            f"unexpected inference input {name[:100]!r} for model {manifest.name!r}; expected {IMAGE!r} or {ENCODED!r}"
        )
    if tensor.parameters:
        raise InvalidRequest(f"input {name!r} has parameters, shared memory perhaps; only plain contents are read")
    datatype = "UINT8" if name == IMAGE else "BYTES"
    if tensor.datatype != datatype:
        raise InvalidRequest(
            f"inference input {name!r} data-type is {tensor.datatype[:20]!r}, but model {manifest.name!r} "
            f"expects {datatype!r}"
        )
    shape = tuple(tensor.shape)
    height, width = manifest.preprocessing.height, manifest.preprocessing.width
    tail = (height, width, 3) if name == IMAGE else ()
    if len(shape) != len(tail) + 1 or shape[1:] != tail or shape[0] < 1:
        expected = ",".join(map(str, (-1, *tail)))
        raise InvalidRequest(
            f"unexpected shape for input {name!r} for model {manifest.name!r}. "
            f"Expected [{expected}], got [{','.join(map(str, shape[:8]))}]"
        )
    size = shape[0]
    if size > max_batch:
        raise InvalidRequest(f"inference request batch-size must be <= {max_batch} for {manifest.name!r}, got {size}")
    raw = _raw(message.raw_input_contents if raw_contents is None else raw_contents, tensor, name)
    images: NDArray[np.uint8] | None = None
    encoded: list[bytes] = []
    if isinstance(raw, list):
        encoded = raw
    elif name == ENCODED:
        encoded = unpack_bytes(raw, size, name)
    else:
        if len(raw) != size * height * width * 3:
            raise InvalidRequest(
                f"input {name!r} holds {len(raw)} bytes, its shape [{','.join(map(str, shape))}] "
                f"needs {size * height * width * 3}"
            )
        images = np.frombuffer(raw, np.uint8).reshape(shape)
    if name == ENCODED and len(encoded) != size:
        raise InvalidRequest(f"input {name!r} holds {len(encoded)} elements, its shape says {size}")
    router, priority, timeout, coverage, max_risk = (
        _parameters(message.parameters, manifest) if message.parameters else (None, NORMAL, None, None, None)
    )
    outputs = _outputs(message.outputs, manifest)
    asked = terms(manifest, router, coverage, max_risk, outputs)
    return Request(size, images, encoded, router, priority, timeout, outputs, asked)


def write_response(
    message_id: str,
    manifest: Manifest,
    outputs: tuple[str, ...],
    predictions: Sequence[Prediction],
    queue_ns: int,
    bundle: str = "",
) -> Any:
    """The ModelInferResponse to a request.

    decode_ns, compute_ns and route_ns are sums over its pictures; queue_ns is the wait until the first was taken up;
    bundle is the digest of what answered.
    """
    size = len(predictions)
    response = service_pb2.ModelInferResponse()
    response.CopyFrom(
        _frame(manifest.name, manifest.version, len(manifest.heads), len(manifest.classes), size, outputs, bundle)
    )
    response.id = message_id
    parameters = response.parameters
    parameters["decode_ns"].int64_param = sum([p.timings.decode for p in predictions])
    parameters["queue_ns"].int64_param = queue_ns
    parameters["compute_ns"].int64_param = sum([p.timings.compute for p in predictions])
    parameters["route_ns"].int64_param = sum([p.timings.route for p in predictions])
    packs = [EVERY[name].pack for name in outputs]
    if size == 1:
        response.raw_output_contents.extend([pack(predictions[0]) for pack in packs])
    else:
        response.raw_output_contents.extend([b"".join(map(pack, predictions)) for pack in packs])
    return response


@lru_cache(maxsize=256)
def _frame(model: str, version: str, heads: int, classes: int, size: int, outputs: tuple[str, ...], bundle: str) -> Any:
    """All of a response that does not change from request to request."""
    frame = service_pb2.ModelInferResponse(model_name=model, model_version=version)
    if bundle:
        frame.parameters["bundle"].string_param = bundle
    for name in outputs:
        output = EVERY[name]
        frame.outputs.add(name=name, datatype=output.datatype, shape=(size, *output.dims(heads, classes)))
    return frame


def pack_bytes(data: bytes) -> bytes:
    """One element of a BYTES tensor: its length, uint32 little endian, then itself."""
    return _LENGTH.pack(len(data)) + data


def unpack_bytes(raw: bytes | memoryview, size: int, name: str) -> list[bytes]:
    """The elements of a BYTES tensor, at most size + 1 of them: one too many is enough to tell.

    Raises: InvalidRequest where lengths and bytes do not agree.
    """
    elements: list[bytes] = []
    offset = 0
    while offset < len(raw) and len(elements) <= size:
        start = offset + 4
        if start > len(raw):
            raise InvalidRequest(f"input {name!r} ends within the length of element {len(elements)}")
        offset = start + _LENGTH.unpack_from(raw, offset)[0]
        if offset > len(raw):
            raise InvalidRequest(
                f"input {name!r}: element {len(elements)} says {offset - start} bytes, {len(raw) - start} are left"
            )
        elements.append(bytes(raw[start:offset]))
    return elements


def metadata(manifest: Manifest, versions: Sequence[str]) -> Any:
    """ModelMetadataResponse: inputs and outputs with their batch axis as -1."""
    height, width = manifest.preprocessing.height, manifest.preprocessing.width
    response = service_pb2.ModelMetadataResponse(name=manifest.name, versions=versions, platform="onnxruntime_onnx")
    response.inputs.add(name=IMAGE, datatype="UINT8", shape=[-1, height, width, 3])
    response.inputs.add(name=ENCODED, datatype="BYTES", shape=[-1])
    for name, output in outputs_of(manifest).items():
        response.outputs.add(
            name=name, datatype=output.datatype, shape=[-1, *output.dims(len(manifest.heads), len(manifest.classes))]
        )
    return response


def config_parameters(manifest: Manifest) -> dict[str, str]:
    """What a model's configuration says beside Triton's own fields.

    `heads` in the order of the outputs' axis K and `routers`, what a request may route by, with commas between;
    `classes` as a JSON list in the order of axis C. `guarantees`, where there are some, as promises.ranges has them,
    in JSON.
    """
    parameters = {
        "heads": ",".join(manifest.heads),
        "routers": ",".join(manifest.routers()),
        "classes": json.dumps(manifest.classes),
    }
    if (offered := ranges(manifest)) is not None:
        parameters["guarantees"] = json.dumps(offered)
    return parameters


def config(manifest: Manifest, max_batch: int, instances: int, device: str) -> Any:
    """ModelConfigResponse: shapes without their batch axis, as Triton writes them; one of the two inputs is given."""
    pb = model_config_pb2
    types = {"UINT8": pb.TYPE_UINT8, "BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL}
    types |= {"FP32": pb.TYPE_FP32, "INT64": pb.TYPE_INT64}
    height, width = manifest.preprocessing.height, manifest.preprocessing.width
    model = pb.ModelConfig(
        name=manifest.name,
        platform="onnxruntime_onnx",
        backend="trivium",
        max_batch_size=max_batch,
        default_model_filename=manifest.model,
        parameters={name: pb.ModelParameter(string_value=value) for name, value in config_parameters(manifest).items()},
        instance_group=[
            pb.ModelInstanceGroup(
                name=manifest.name,
                count=instances,
                kind=pb.ModelInstanceGroup.KIND_CPU if device == "cpu" else pb.ModelInstanceGroup.KIND_GPU,
            )
        ],
    )
    model.input.add(name=IMAGE, data_type=types["UINT8"], dims=[height, width, 3], optional=True)
    model.input.add(name=ENCODED, data_type=types["BYTES"], optional=True)
    for name, output in outputs_of(manifest).items():
        model.output.add(
            name=name, data_type=types[output.datatype], dims=output.dims(len(manifest.heads), len(manifest.classes))
        )
    return service_pb2.ModelConfigResponse(config=model)


_RAW = 7 << 3 | 2
"""The tag of raw_input_contents on the wire."""


def _split(data: bytes) -> tuple[bytes, list[memoryview]]:
    """A serialised ModelInferRequest without its raw contents, and these; whatever is unusual is left to protobuf."""
    view = memoryview(data)
    raw: list[memoryview] = []
    head: list[memoryview] = []
    at, size = 0, len(data)
    while at < size:
        start, tag = at, data[at]
        # every field of the message is length-delimited and has a number below 8
        if tag & 7 != 2 or tag > _RAW:
            return data, _copied(data)
        at += 1
        length = shift = 0
        while True:
            if at >= size or shift > 28:
                return data, _copied(data)
            byte = data[at]
            at += 1
            length |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        end = at + length
        if end > size:
            return data, _copied(data)
        if tag == _RAW:
            raw.append(view[at:end])
        else:
            head.append(view[start:end])
        at = end
    return b"".join(head), raw


def _copied(data: bytes) -> list[memoryview]:
    return [memoryview(one) for one in service_pb2.ModelInferRequest.FromString(data).raw_input_contents]


def _raw(raw: Sequence[bytes | memoryview], tensor: Any, name: str) -> bytes | memoryview | list[bytes]:
    """The input's bytes; a list where they came as elements in `contents`, for clients without raw contents."""
    if len(raw) == 1 and not tensor.HasField("contents"):
        return raw[0]
    contents = tensor.contents
    given = [field.name for field, _ in contents.ListFields()]
    if raw:
        raise InvalidRequest(f"expected the bytes of {name!r} once, got {len(raw)} raw contents and {given}")
    wanted = "uint_contents" if name == IMAGE else "bytes_contents"
    if given != [wanted]:
        raise InvalidRequest(f"expected the bytes of {name!r} in raw_input_contents or {wanted}, got {given or 'none'}")
    if name == ENCODED:
        return list(contents.bytes_contents)
    values = np.fromiter(contents.uint_contents, np.uint32, len(contents.uint_contents))
    if values.max(initial=0) > 255:
        raise InvalidRequest(f"input {name!r} holds {values.max()}, more than UINT8 can")
    return values.astype(np.uint8).tobytes()


def _parameters(
    parameters: Any, manifest: Manifest
) -> tuple[str | None, int, float | None, float | None, float | None]:
    router: str | None = None
    levels: dict[str, float] = {}
    priority = NORMAL
    timeout: float | None = None
    for name in parameters:
        value = parameters[name]
        kind = value.WhichOneof("parameter_choice")
        if name not in PARAMETERS:
            raise InvalidRequest(f"unknown request parameter {name[:100]!r}; known: {', '.join(PARAMETERS)}")
        if name == "router":
            if kind != "string_param":
                raise InvalidRequest(f"parameter 'router' must be a string, got {kind}")
            router = value.string_param
            if router not in (available := manifest.routers()):
                raise unknown_router(router, available)
            continue
        if name in LEVELS:
            levels[name] = number(name, getattr(value, kind) if kind else None)
            continue
        if kind not in ("int64_param", "uint64_param"):
            raise InvalidRequest(f"parameter {name!r} must be an integer, got {kind}")
        whole = getattr(value, kind)
        if name == "priority":
            if whole not in (0, 1, 2):
                raise InvalidRequest(f"parameter 'priority' must be 1 (urgent), 2 (normal) or 0 (default), got {whole}")
            priority = URGENT if whole == 1 else NORMAL
        else:
            if whole < 0:
                raise InvalidRequest(f"parameter 'timeout' must be microseconds >= 0, got {whole}")
            timeout = whole / 1e6 if whole else None
    return router, priority, timeout, levels.get("coverage"), levels.get("max_risk")


def _outputs(requested: Any, manifest: Manifest) -> tuple[str, ...]:
    if not requested:
        return _NAMES[manifest.guarantees is not None]
    available = outputs_of(manifest)
    names = tuple(dict.fromkeys(output.name for output in requested))
    for name in names:
        if name not in available:
            reason = WITHOUT if name in PROMISES else f"it has: {', '.join(available)}"
            raise InvalidRequest(f"unexpected inference output {name[:100]!r} for model {manifest.name!r}; {reason}")
    for output in requested:
        if output.parameters:
            raise InvalidRequest(f"output {output.name!r} has parameters, classification perhaps; none is known")
    return names

"""The wire contract, asked with tritonclient: the same questions to our server and to a real tritonserver.

Both serve the same bundles, Triton from a repository that export wrote. Where Triton gives another answer, DIFFERENCES
says which and why. Words of an error are ours alone.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from trivium.runtime.client import Client
from trivium.runtime.errors import InvalidRequest
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import ranges, terms
from trivium.runtime.wire import OUTPUTS, PROMISES, pack_bytes

MODEL = "tiny"
K, C, SIZE = 3, 10, 32
HEADS = ("clean", "robust", "combined")
ONE = np.zeros((1, SIZE, SIZE, 3), np.uint8)


class Endpoint(NamedTuple):
    server: str
    url: str
    client: triton.InferenceServerClient
    stub: Any


def ask(server: str, url: str) -> Iterator[Endpoint]:
    with triton.InferenceServerClient(url) as client, grpc.insecure_channel(url) as channel:
        yield Endpoint(server, url, client, service_pb2_grpc.GRPCInferenceServiceStub(channel))


@pytest.fixture(scope="module", params=["trivium", "triton"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """Each server in turn."""
    fixture = "server" if request.param == "trivium" else "triton_server"
    yield from ask(request.param, request.getfixturevalue(fixture).url)


def picture_input(images: NDArray[Any], name: str = "image", datatype: str = "UINT8") -> triton.InferInput:
    tensor = triton.InferInput(name, list(images.shape), datatype)
    tensor.set_data_from_numpy(images)
    return tensor


def encoded_input(*pictures: bytes) -> triton.InferInput:
    array = np.array(pictures, dtype=object)
    tensor = triton.InferInput("encoded_image", [len(pictures)], "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def png(image: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def message(images: NDArray[np.uint8] | None = None, **fields: Any) -> Any:
    """A raw request; fields replace those of one that is right."""
    images = np.zeros((1, SIZE, SIZE, 3), np.uint8) if images is None else images
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=images.shape)
    right: dict[str, Any] = {"model_name": MODEL, "inputs": [tensor], "raw_input_contents": [images.tobytes()]}
    return service_pb2.ModelInferRequest(**(right | fields))


def refused(endpoint: Endpoint, call: Callable[[], Any], *words: str) -> str:
    """The status code of a call that must fail, with one line of text; our server's holds the words."""
    with pytest.raises((InferenceServerException, grpc.RpcError)) as caught:
        call()
    error = caught.value
    if isinstance(error, InferenceServerException):
        code, text = error.status().removeprefix("StatusCode."), error.message()
    else:
        code, text = error.code().name, error.details()
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    if endpoint.server == "trivium":
        for word in words:
            assert word in text
    return str(code)


def test_server_and_model_are_described(endpoint: Endpoint) -> None:
    client, model = endpoint.client, MODEL
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert not client.is_model_ready("nobody")
    described = client.get_model_metadata(model)
    assert {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in described.inputs} == {
        "image": ("UINT8", [-1, SIZE, SIZE, 3]),
        "encoded_image": ("BYTES", [-1]),
    }
    assert {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in described.outputs} == {
        "probabilities": ("FP32", [-1, C]),
        "class_id": ("INT64", [-1]),
        "label": ("BYTES", [-1]),
        "head": ("BYTES", [-1]),
        "head_probabilities": ("FP32", [-1, K, C]),
        "predictive_entropy": ("FP32", [-1, K]),
        "mutual_information": ("FP32", [-1, K]),
        "divergence": ("FP32", [-1, K, K]),
        "energy": ("FP32", [-1, K]),
    }


def test_versions_and_index(endpoint: Endpoint) -> None:
    client = endpoint.client
    assert list(client.get_model_metadata(MODEL).versions) == ["1", "3"]
    assert list(client.get_model_metadata(MODEL, "1").versions) == ["1"]
    index = {(one.name, one.version): one.state for one in client.get_model_repository_index().models}
    models = (("tiny", "1"), ("tiny", "3"), ("single", "1"), ("guaranteed", "1"))
    assert index == dict.fromkeys(models, "READY")


def test_config(endpoint: Endpoint) -> None:
    config = endpoint.client.get_model_config(MODEL).config
    inputs = {one.name: (one.data_type, one.optional, list(one.dims)) for one in config.input}
    image, encoded = inputs["image"], inputs["encoded_image"]
    assert image[:2] == (model_config_pb2.TYPE_UINT8, True)
    assert encoded[:2] == (model_config_pb2.TYPE_STRING, True)
    assert [one.name for one in config.output] == list(OUTPUTS)
    assert config.instance_group[0].count == 2
    assert config.parameters["heads"].string_value == "clean,robust,combined"
    if endpoint.server == "triton":
        # without Triton's batching, which knows no encoded_image of shape [N]: the batch's axis is one of the dims
        assert (config.max_batch_size, image[2], encoded[2]) == (0, [-1, SIZE, SIZE, 3], [-1])
    else:
        assert (config.max_batch_size, image[2], encoded[2]) == (64, [SIZE, SIZE, 3], [])


def test_values_are_the_predictors(endpoint: Endpoint, tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    predictor = Predictor.load(tiny_bundle)
    for router in (None, "robust", "mean", "min_entropy", "paper", "blend"):
        expected = [predictor.infer(image, router) for image in some_pictures]
        found = endpoint.client.infer(
            MODEL, [picture_input(some_pictures)], parameters={"router": router} if router else None
        )
        assert found.as_numpy("class_id").tolist() == [one.class_id for one in expected]
        for name in ("label", "head"):
            assert [text.decode() for text in found.as_numpy(name)] == [getattr(one, name) for one in expected]
        for name in set(OUTPUTS) - {"class_id", "label", "head"}:
            np.testing.assert_allclose(
                found.as_numpy(name), np.stack([getattr(one, name) for one in expected]), rtol=0, atol=1e-5
            )


LEVELS: list[tuple[dict[str, Any], tuple[float | None, float | None]]] = [
    ({}, (None, None)),
    ({"coverage": "0.93"}, (0.95, None)),
    ({"coverage": "0.8", "max_risk": "0.06"}, (0.8, 0.05)),
    ({"coverage": "0.99", "max_risk": "0.3"}, (0.99, 0.3)),
]
"""Parameters of a request, and the levels that they mean."""


@pytest.mark.parametrize("size", [1, 12])
def test_guarantees_are_the_predictors_bit_for_bit(
    endpoint: Endpoint, guaranteed_bundle: Path, some_pictures: NDArray[np.uint8], size: int
) -> None:
    predictor = Predictor.load(guaranteed_bundle)
    model, images = "guaranteed", some_pictures[:size]
    described = {one.name: (one.datatype, list(one.shape)) for one in endpoint.client.get_model_metadata(model).outputs}
    assert list(described)[-3:] == list(PROMISES)
    assert described["prediction_set"] == ("BOOL", [-1, C])
    assert (described["abstain"], described["shift_score"]) == (("BOOL", [-1]), ("FP32", [-1]))
    offered = json.loads(endpoint.client.get_model_config(model).config.parameters["guarantees"].string_value)
    assert offered == json.loads(json.dumps(ranges(predictor.manifest)))
    for router in (None, "robust", "mean"):
        for parameters, levels in LEVELS:
            asked = terms(predictor.manifest, router, *levels)
            expected = [predictor.infer(image, router, asked) for image in images]
            given = parameters | ({"router": router} if router else {})
            found = endpoint.client.infer(model, [picture_input(images)], parameters=given)
            for name in PROMISES:
                np.testing.assert_array_equal(found.as_numpy(name), [getattr(one, name) for one in expected])
            alone = endpoint.client.infer(
                model, [picture_input(images)], outputs=[triton.InferRequestedOutput("abstain")], parameters=given
            )
            np.testing.assert_array_equal(alone.as_numpy("abstain"), found.as_numpy("abstain"))
            with Client(endpoint.url, model) as client:
                names = ("coverage", "max_risk")
                own: dict[str, Any] = {name: float(parameters[name]) for name in names if name in parameters}
                answers = client.predict(images, router=router, **own)
            for answer, right in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(answer.prediction_set, right.prediction_set)
                assert (answer.abstain, answer.shift_score) == (right.abstain, right.shift_score)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"coverage": "1.0"}, "must be from 0.8 to 0.99, got 1"),
        ({"coverage": "0.1"}, "must be from 0.8 to 0.99, got 0.1"),
        ({"coverage": "nan"}, "must be from 0.8 to 0.99, got nan"),
        ({"coverage": "-0.9"}, "must be from 0.8 to 0.99, got -0.9"),
        ({"coverage": "high"}, "parameter 'coverage' must be a number, got 'high'"),
        ({"coverage": True}, "parameter 'coverage' must be a number, got True"),
        ({"coverage": 1}, "must be from 0.8 to 0.99, got 1"),
        ({"max_risk": "0.01"}, "must be from 0.05 to 0.3 for router 'blend', got 0.01"),
        ({"max_risk": "0.31"}, "must be from 0.05 to 0.3 for router 'blend', got 0.31"),
        ({"max_risk": "nan"}, "must be from 0.05 to 0.3"),
        ({"risk": "0.2"}, "unknown request parameter 'risk'"),
    ],
)
def test_levels_that_cannot_be_kept(endpoint: Endpoint, parameters: dict[str, Any], words: str) -> None:
    ask = lambda: endpoint.client.infer("guaranteed", [picture_input(ONE)], parameters=parameters)  # noqa: E731
    assert refused(endpoint, ask, words) == "INVALID_ARGUMENT"


def test_a_level_may_come_as_a_double(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    ask = lambda level: endpoint.client.infer(  # noqa: E731
        "guaranteed", [picture_input(some_pictures)], parameters={"coverage": level}
    )
    text, double = (ask(level).as_numpy("prediction_set") for level in ("0.99", 0.99))
    np.testing.assert_array_equal(text, double)
    assert text.sum() > ask("0.8").as_numpy("prediction_set").sum()


@pytest.mark.parametrize("level", [1.0, 0.01, math.nan, -0.9, math.inf])
def test_levels_that_are_numbers(endpoint: Endpoint, level: float) -> None:
    with Client(endpoint.url, "guaranteed") as client:
        with pytest.raises(InvalidRequest, match=r"'coverage' must be from 0.8 to 0.99"):
            client.predict(ONE, coverage=level)
        with pytest.raises(InvalidRequest, match=r"'max_risk' must be from 0.05 to 0.3"):
            client.predict(ONE, max_risk=level)


def test_nothing_is_promised_without_guarantees(endpoint: Endpoint) -> None:
    tensor, says = [picture_input(ONE)], "its bundle has no guarantees; run: trivium calibrate BUNDLE"
    for name in PROMISES:
        asked = lambda name=name: endpoint.client.infer(MODEL, tensor, outputs=[triton.InferRequestedOutput(name)])  # noqa: E731
        assert refused(endpoint, asked, name, says) == "INVALID_ARGUMENT"
    for parameters in ({"coverage": "0.9"}, {"max_risk": "0.1"}):
        asked = lambda p=parameters: endpoint.client.infer(MODEL, tensor, parameters=p)  # noqa: E731
        assert refused(endpoint, asked, says) == "INVALID_ARGUMENT"
    with Client(endpoint.url, MODEL) as client:
        assert client.metadata().guarantees is None
        assert client.predict(ONE)[0].prediction_set is None


@pytest.mark.parametrize("count", [1, 5])
def test_all_outputs_and_response_parameters(endpoint: Endpoint, some_pictures: NDArray[np.uint8], count: int) -> None:
    result = endpoint.client.infer(MODEL, [picture_input(some_pictures[:count])], request_id="seven")
    response = result.get_response()
    assert response.id == "seven"
    assert response.model_name == MODEL
    assert [one.name for one in response.outputs] == list(OUTPUTS)
    shapes = {"probabilities": (C,), "head_probabilities": (K, C), "divergence": (K, K)}
    for name in OUTPUTS:
        tail = shapes.get(name, () if name in ("class_id", "label", "head") else (K,))
        assert result.as_numpy(name).shape == (count, *tail)
    probabilities = result.as_numpy("probabilities")
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(result.as_numpy("class_id"), probabilities.argmax(1))
    assert [label.decode() for label in result.as_numpy("label")] == [f"class {i}" for i in probabilities.argmax(1)]
    timings = {name: response.parameters[name].int64_param for name in response.parameters}
    if endpoint.server == "triton":
        # Python back ends before tritonserver 2.52 cannot send parameters with a response
        assert timings == {}
        return
    assert set(timings) == {"decode_ns", "queue_ns", "compute_ns", "route_ns", "bundle"}
    assert len(response.parameters["bundle"].string_param) == 64
    assert timings["decode_ns"] == 0
    assert timings["compute_ns"] > 0


def test_our_client_speaks_to_both(endpoint: Endpoint, tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    predictor = Predictor.load(tiny_bundle)
    expected = [predictor.infer(image, "mean") for image in some_pictures[:3]]
    with Client(endpoint.url, model=MODEL) as client:
        described = client.metadata()
        assert (described.heads, described.size, described.max_batch) == (HEADS, (SIZE, SIZE), 64)
        assert described.versions == ("1", "3")
        assert described.routers == tuple(predictor.manifest.routers())
        for pictures in (some_pictures[:3], [png(image) for image in some_pictures[:3]]):
            answers = client.predict(pictures, router="mean")
            assert [(one.label, one.head, one.version) for one in answers] == [
                (one.label, "mean", "3") for one in expected
            ]
            for answer, right in zip(answers, expected, strict=True):
                np.testing.assert_allclose(answer.head_probabilities, right.head_probabilities, rtol=0, atol=1e-5)


def test_requested_outputs_alone(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    wanted = [triton.InferRequestedOutput(name) for name in ("head", "class_id")]
    response = endpoint.client.infer(MODEL, [picture_input(some_pictures[:2])], outputs=wanted).get_response()
    # Triton does not say in which order they were asked for
    assert {one.name for one in response.outputs} == {"head", "class_id"}
    if endpoint.server == "trivium":
        assert [one.name for one in response.outputs] == ["head", "class_id"]
    assert len(response.raw_output_contents) == 2


def test_encoded_pictures_equal_plain_ones(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    plain = endpoint.client.infer(MODEL, [picture_input(some_pictures[:3])])
    encoded = endpoint.client.infer(MODEL, [encoded_input(*(png(one) for one in some_pictures[:3]))])
    for name in OUTPUTS:
        np.testing.assert_array_equal(encoded.as_numpy(name), plain.as_numpy(name))
    if endpoint.server == "trivium":
        assert encoded.get_response().parameters["decode_ns"].int64_param > 0


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats_and_sizes_are_answered(endpoint: Endpoint, kind: str) -> None:
    large = np.random.default_rng(0).integers(0, 256, (90, 61, 3)).astype(np.uint8)
    result = endpoint.client.infer(MODEL, [encoded_input(png(large, kind))])
    assert result.as_numpy("probabilities").shape == (1, C)


def test_router_can_be_chosen_by_request(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    def ask(router: str) -> triton.InferResult:
        return endpoint.client.infer(
            MODEL, [picture_input(some_pictures[:4])], parameters={"router": router}
        )  # fmt: skip

    robust = ask("robust")
    assert robust.as_numpy("head").tolist() == [b"robust"] * 4
    np.testing.assert_array_equal(robust.as_numpy("probabilities"), robust.as_numpy("head_probabilities")[:, 1])
    mean = ask("mean")
    np.testing.assert_allclose(
        mean.as_numpy("probabilities"), mean.as_numpy("head_probabilities").mean(1), rtol=1e-6, atol=1e-7
    )


def test_small_clients_may_send_contents(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    image = some_pictures[:1]
    expected = endpoint.stub.ModelInfer(message(image)).raw_output_contents
    plain = message(image, raw_input_contents=[])
    plain.inputs[0].contents.uint_contents.extend(image.ravel().tolist())
    assert endpoint.stub.ModelInfer(plain).raw_output_contents == expected
    encoded = service_pb2.ModelInferRequest(model_name=MODEL)
    tensor = encoded.inputs.add(name="encoded_image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(png(image[0]))
    assert endpoint.stub.ModelInfer(encoded).raw_output_contents == expected


def test_versions(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    tensor = [picture_input(some_pictures[:1])]
    assert endpoint.client.infer(MODEL, tensor).get_response().model_version == "3"
    assert endpoint.client.infer(MODEL, tensor, model_version="1").get_response().model_version == "1"
    single = endpoint.client.infer("single", tensor)
    assert single.as_numpy("head").tolist() == [b"original"]
    assert single.as_numpy("divergence").shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([picture_input(np.zeros((1, 16, 16, 3), np.uint8))], ["unexpected shape", "[-1,32,32,3]", "[1,16,16,3]"]),
        ([picture_input(np.zeros((SIZE, SIZE, 3), np.uint8))], ["unexpected shape"]),
        ([picture_input(np.zeros((0, SIZE, SIZE, 3), np.uint8))], ["unexpected shape"]),
        ([picture_input(ONE.astype(np.float32), datatype="FP32")], ["FP32", "UINT8"]),
        ([picture_input(np.zeros((65, SIZE, SIZE, 3), np.uint8))], ["batch-size must be <= 64", "65"]),
        ([picture_input(ONE, name="pixels")], ["'pixels'", "'image'", "'encoded_image'"]),
        ([], ["'image'", "'encoded_image'", "none"]),
        ([picture_input(ONE), encoded_input(b"x")], ["expected one input"]),
        ([encoded_input(b"")], ["0 bytes"]),
        ([encoded_input(b"not a picture")], ["JPEG, PNG"]),
        ([encoded_input(png(ONE[0])[:60])], []),
        ([encoded_input(png(ONE[0]), b"not a picture")], ["picture 1"]),
    ],
)  # fmt: skip
def test_wrong_inputs(endpoint: Endpoint, tensors: list[triton.InferInput], words: list[str]) -> None:
    assert refused(endpoint, lambda: endpoint.client.infer(MODEL, tensors), *words) == "INVALID_ARGUMENT"


def test_wrong_names(endpoint: Endpoint) -> None:
    tensor = [picture_input(ONE)]
    client, model = endpoint.client, MODEL
    assert refused(endpoint, lambda: client.infer("nobody", tensor), "nobody", "tiny") == "NOT_FOUND"
    assert refused(endpoint, lambda: client.infer(model, tensor, model_version="9"), "version 9") == "NOT_FOUND"
    assert refused(endpoint, lambda: client.infer(model, tensor, model_version="new"), "'new'") == "INVALID_ARGUMENT"
    outputs = [triton.InferRequestedOutput("logits")]
    unknown = lambda: client.infer(model, tensor, outputs=outputs)  # noqa: E731
    assert refused(endpoint, unknown, "logits", "energy") == "INVALID_ARGUMENT"
    for router in ("best", ""):
        routed = lambda router=router: client.infer(model, tensor, parameters={"router": router})  # noqa: E731
        assert refused(endpoint, routed, "unknown router", "combined") == "INVALID_ARGUMENT"
    assert refused(endpoint, lambda: client.get_model_metadata("nobody")) == "NOT_FOUND"
    assert refused(endpoint, lambda: client.get_model_config("nobody")) == "NOT_FOUND"


@pytest.mark.parametrize(
    ("request_message", "word"),
    [
        (message(raw_input_contents=[b"12345"]), "holds 5 bytes"),
        (message(raw_input_contents=[]), "raw_input_contents"),
        (message(parameters={"ruoter": service_pb2.InferParameter(string_param="mean")}), "'ruoter'"),
        (message(parameters={"router": service_pb2.InferParameter(int64_param=1)}), "must be a string"),
        (message(parameters={"priority": service_pb2.InferParameter(int64_param=-1)}), "priority"),
        (message(parameters={"priority": service_pb2.InferParameter(string_param="1")}), "priority"),
    ],
)
def test_wrong_messages(endpoint: Endpoint, request_message: Any, word: str) -> None:
    assert refused(endpoint, lambda: endpoint.stub.ModelInfer(request_message), word) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"\x01\x00", "ends within the length"),
        (b"\xff\xff\xff\xff12", "says 4294967295 bytes"),
        (pack_bytes(b"a") * 2, "shape says 1"),
        (b"", "raw_input_contents"),
    ],
)
def test_broken_bytes_tensors(endpoint: Endpoint, raw: bytes, word: str) -> None:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="encoded_image", datatype="BYTES", shape=[1])
    asked = message(inputs=[tensor], raw_input_contents=[raw] if raw else [])
    assert refused(endpoint, lambda: endpoint.stub.ModelInfer(asked), word) == "INVALID_ARGUMENT"


def infer(**fields: Any) -> Callable[[Endpoint], Any]:
    return lambda endpoint: endpoint.stub.ModelInfer(message(**fields))


def call(method: str, **fields: Any) -> Callable[[Endpoint], Any]:
    """One rpc, with an empty request or the fields given."""
    request = getattr(service_pb2, SERVICE.methods_by_name[method].input_type.name)
    return lambda endpoint: getattr(endpoint.stub, method)(request(**fields))


def stream(endpoint: Endpoint) -> list[Any]:
    return list(endpoint.stub.ModelStreamInfer(iter([message()])))


def with_output_parameter(endpoint: Endpoint) -> Any:
    output = service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="probabilities")
    output.parameters["classification"].int64_param = 3
    return endpoint.stub.ModelInfer(message(outputs=[output]))


def with_input_parameter(endpoint: Endpoint) -> Any:
    asked = message()
    asked.inputs[0].parameters["strange"].string_param = "x"
    return endpoint.stub.ModelInfer(asked)


SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SAME = {
    "ServerLive": "OK", "ServerReady": "OK", "ModelReady": "OK", "ServerMetadata": "OK", "ModelMetadata": "NOT_FOUND",
    "ModelInfer": "NOT_FOUND", "ModelConfig": "NOT_FOUND", "ModelStatistics": "OK", "RepositoryIndex": "OK",
}  # fmt: skip
"""What both servers answer to an empty request."""
NO_SHARED_MEMORY = "we read contents from the message alone: a region is a way into the process's memory"
DIFFERENCES = {
    "surplus raw contents": (
        infer(raw_input_contents=[ONE.tobytes(), b""]), "INVALID_ARGUMENT", "OK", "Triton ignores what it does not need"
    ),
    "priority 7": (
        infer(parameters={"priority": service_pb2.InferParameter(int64_param=7)}), "INVALID_ARGUMENT", "OK",
        "Triton takes a level that there is not for the default",
    ),
    "timeout -7": (
        infer(parameters={"timeout": service_pb2.InferParameter(int64_param=-7)}), "INVALID_ARGUMENT", "OK",
        "Triton reads it as an unsigned number, many thousand years",
    ),
    "strange input parameter": (
        with_input_parameter, "INVALID_ARGUMENT", "OK", "what we do not obey we do not ignore"
    ),
    "classification": (
        with_output_parameter, "INVALID_ARGUMENT", "OK", "an extension of Triton's: text of the likeliest classes"
    ),
    "statistics of nobody": (
        call("ModelStatistics", name="nobody"), "NOT_FOUND", "INVALID_ARGUMENT",
        "elsewhere Triton too says NOT_FOUND of a model that it does not have",
    ),
    "ModelStreamInfer": (
        stream, "UNIMPLEMENTED", "OK", "an extension of Triton's; one answer a request needs no stream"
    ),
    "RepositoryModelLoad": (
        call("RepositoryModelLoad", model_name="nobody"), "NOT_FOUND", "INTERNAL",
        "the client asked for what is not there, and the server is well",
    ),
    "RepositoryModelUnload": (
        call("RepositoryModelUnload", model_name="nobody"), "NOT_FOUND", "OK", "a misspelt name should show"
    ),
    "SystemSharedMemoryStatus": (call("SystemSharedMemoryStatus"), "UNIMPLEMENTED", "OK", NO_SHARED_MEMORY),
    "SystemSharedMemoryRegister": (call("SystemSharedMemoryRegister"), "UNIMPLEMENTED", "INTERNAL", NO_SHARED_MEMORY),
    "SystemSharedMemoryUnregister": (call("SystemSharedMemoryUnregister"), "UNIMPLEMENTED", "OK", NO_SHARED_MEMORY),
    "CudaSharedMemoryStatus": (call("CudaSharedMemoryStatus"), "UNIMPLEMENTED", "OK", NO_SHARED_MEMORY),
    "CudaSharedMemoryRegister": (
        call("CudaSharedMemoryRegister"), "UNIMPLEMENTED", "INVALID_ARGUMENT", NO_SHARED_MEMORY
    ),
    "CudaSharedMemoryUnregister": (call("CudaSharedMemoryUnregister"), "UNIMPLEMENTED", "OK", NO_SHARED_MEMORY),
    "TraceSetting": (call("TraceSetting"), "UNIMPLEMENTED", "OK", "tracing is set when the server starts"),
    "LogSettings": (call("LogSettings"), "UNIMPLEMENTED", "OK", "--log-level is set when the server starts"),
}  # fmt: skip
"""Question -> how to ask it, our status, Triton's, and why they differ."""


@pytest.mark.parametrize("question", DIFFERENCES)
def test_where_the_servers_differ(endpoint: Endpoint, question: str) -> None:
    ask_it, ours_says, triton_says, _ = DIFFERENCES[question]
    expected = ours_says if endpoint.server == "trivium" else triton_says
    if expected == "OK":
        ask_it(endpoint)
    else:
        assert refused(endpoint, lambda: ask_it(endpoint)) == expected


def test_every_call_of_the_protocol_is_asked() -> None:
    assert {method.name for method in SERVICE.methods} <= {*SAME, *DIFFERENCES}


@pytest.mark.parametrize("method", SAME)
def test_calls_of_the_protocol(endpoint: Endpoint, method: str) -> None:
    if SAME[method] == "OK":
        call(method)(endpoint)
    else:
        assert refused(endpoint, lambda: call(method)(endpoint)) == SAME[method]


def test_shared_memory_is_refused(endpoint: Endpoint) -> None:
    asked = message()
    asked.inputs[0].parameters["shared_memory_region"].string_param = "region"
    assert refused(endpoint, lambda: endpoint.stub.ModelInfer(asked), "shared memory") == "INVALID_ARGUMENT"


def test_statistics_count_what_was_asked(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    def counts() -> tuple[int, int, int]:
        one = endpoint.client.get_inference_statistics(MODEL).model_stats[-1]
        return one.inference_count, one.inference_stats.success.count, one.inference_stats.fail.count

    before = counts()
    endpoint.client.infer(MODEL, [picture_input(some_pictures[:4])])
    refused(endpoint, lambda: endpoint.client.infer(MODEL, [encoded_input(b"nothing")]))
    # Triton counts requests where it does not batch, and knows of no failure that the Python back end answers with
    expected = (4, 1, 1) if endpoint.server == "trivium" else (2, 2, 0)
    end = time.monotonic() + 10
    # and it counts a request after its answer has left
    while (found := tuple(np.subtract(counts(), before).tolist())) != expected and time.monotonic() < end:
        time.sleep(0.05)
    assert found == expected

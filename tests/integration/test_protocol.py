"""The wire contract, asked with tritonclient.

Set TRIVIUM_TEST_ENDPOINT=host:port (and TRIVIUM_TEST_MODEL) to ask another server of the same bundle the same
questions: a Triton server with the bundle in its model repository, say. What our server alone promises is marked own.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from trivium.runtime.service import UNSUPPORTED
from trivium.runtime.wire import OUTPUTS, pack_bytes

ENDPOINT = os.environ.get("TRIVIUM_TEST_ENDPOINT")
own = pytest.mark.skipif(ENDPOINT is not None, reason="TRIVIUM_TEST_ENDPOINT names a foreign server")
K, C, SIZE = 3, 10, 32


class Endpoint(NamedTuple):
    url: str
    model: str
    client: triton.InferenceServerClient
    stub: Any


@pytest.fixture(scope="module")
def endpoint(request: pytest.FixtureRequest) -> Any:
    url = ENDPOINT or request.getfixturevalue("server").url
    client = triton.InferenceServerClient(url)
    channel = grpc.insecure_channel(url)
    yield Endpoint(
        url, os.environ.get("TRIVIUM_TEST_MODEL", "tiny"), client, service_pb2_grpc.GRPCInferenceServiceStub(channel)
    )
    channel.close()
    client.close()


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
    right: dict[str, Any] = {"model_name": "tiny", "inputs": [tensor], "raw_input_contents": [images.tobytes()]}
    return service_pb2.ModelInferRequest(**(right | fields))


def refused(call: Callable[[], Any], *words: str) -> str:
    """The status code of a call that must fail, with one line of text that holds the words."""
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
    if ENDPOINT is None:
        for word in words:
            assert word in text
    return str(code)


def test_server_and_model_are_described(endpoint: Endpoint) -> None:
    client, model = endpoint.client, endpoint.model
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


@own
def test_names_versions_and_config(endpoint: Endpoint) -> None:
    client = endpoint.client
    assert client.get_server_metadata().name == "trivium"
    assert list(client.get_model_metadata("tiny").versions) == ["1", "3"]
    assert list(client.get_model_metadata("tiny", "1").versions) == ["1"]
    config = client.get_model_config("tiny").config
    assert config.max_batch_size == 64
    assert {one.name: list(one.dims) for one in config.input} == {"image": [SIZE, SIZE, 3], "encoded_image": []}
    assert config.instance_group[0].count == 2
    assert config.parameters["heads"].string_value == "clean,robust,combined"
    index = {(one.name, one.version): one.state for one in client.get_model_repository_index().models}
    assert index == {("tiny", "1"): "READY", ("tiny", "3"): "READY", ("single", "1"): "READY"}


@pytest.mark.parametrize("count", [1, 5])
def test_all_outputs_and_response_parameters(endpoint: Endpoint, some_pictures: NDArray[np.uint8], count: int) -> None:
    result = endpoint.client.infer(endpoint.model, [picture_input(some_pictures[:count])], request_id="seven")
    response = result.get_response()
    assert response.id == "seven"
    assert response.model_name == endpoint.model
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
    assert set(timings) == {"decode_ns", "queue_ns", "compute_ns", "route_ns"}
    assert timings["decode_ns"] == 0
    assert timings["compute_ns"] > 0


def test_requested_outputs_alone(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    wanted = [triton.InferRequestedOutput(name) for name in ("head", "class_id")]
    response = endpoint.client.infer(endpoint.model, [picture_input(some_pictures[:2])], outputs=wanted).get_response()
    assert [one.name for one in response.outputs] == ["head", "class_id"]
    assert len(response.raw_output_contents) == 2


def test_encoded_pictures_equal_plain_ones(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    plain = endpoint.client.infer(endpoint.model, [picture_input(some_pictures[:3])])
    encoded = endpoint.client.infer(endpoint.model, [encoded_input(*(png(one) for one in some_pictures[:3]))])
    for name in OUTPUTS:
        np.testing.assert_array_equal(encoded.as_numpy(name), plain.as_numpy(name))
    assert encoded.get_response().parameters["decode_ns"].int64_param > 0


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats_and_sizes_are_answered(endpoint: Endpoint, kind: str) -> None:
    large = np.random.default_rng(0).integers(0, 256, (90, 61, 3)).astype(np.uint8)
    result = endpoint.client.infer(endpoint.model, [encoded_input(png(large, kind))])
    assert result.as_numpy("probabilities").shape == (1, C)


def test_router_can_be_chosen_by_request(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    def ask(router: str) -> triton.InferResult:
        return endpoint.client.infer(
            endpoint.model, [picture_input(some_pictures[:4])], parameters={"router": router}
        )  # fmt: skip

    robust = ask("robust")
    assert robust.as_numpy("head").tolist() == [b"robust"] * 4
    np.testing.assert_array_equal(robust.as_numpy("probabilities"), robust.as_numpy("head_probabilities")[:, 1])
    mean = ask("mean")
    np.testing.assert_allclose(
        mean.as_numpy("probabilities"), mean.as_numpy("head_probabilities").mean(1), rtol=1e-6, atol=1e-7
    )


@own
def test_small_clients_may_send_contents(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    image = some_pictures[:1]
    expected = endpoint.stub.ModelInfer(message(image)).raw_output_contents
    plain = message(image, raw_input_contents=[])
    plain.inputs[0].contents.uint_contents.extend(image.ravel().tolist())
    assert endpoint.stub.ModelInfer(plain).raw_output_contents == expected
    encoded = service_pb2.ModelInferRequest(model_name="tiny")
    tensor = encoded.inputs.add(name="encoded_image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(png(image[0]))
    assert endpoint.stub.ModelInfer(encoded).raw_output_contents == expected


@own
def test_versions(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    tensor = [picture_input(some_pictures[:1])]
    assert endpoint.client.infer("tiny", tensor).get_response().model_version == "3"
    assert endpoint.client.infer("tiny", tensor, model_version="1").get_response().model_version == "1"
    single = endpoint.client.infer("single", tensor)
    assert single.as_numpy("head").tolist() == [b"original"]
    assert single.as_numpy("divergence").shape == (1, 1, 1)


ONE = np.zeros((1, SIZE, SIZE, 3), np.uint8)


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
    assert refused(lambda: endpoint.client.infer(endpoint.model, tensors), *words) == "INVALID_ARGUMENT"


def test_wrong_names(endpoint: Endpoint) -> None:
    tensor = [picture_input(ONE)]
    client, model = endpoint.client, endpoint.model
    assert refused(lambda: client.infer("nobody", tensor), "nobody", "tiny") == "NOT_FOUND"
    assert refused(lambda: client.infer(model, tensor, model_version="9"), "version 9") == "NOT_FOUND"
    assert refused(lambda: client.infer(model, tensor, model_version="new"), "'new'") == "INVALID_ARGUMENT"
    output = [triton.InferRequestedOutput("logits")]
    assert refused(lambda: client.infer(model, tensor, outputs=output), "logits", "energy") == "INVALID_ARGUMENT"
    for router in ("best", ""):
        ask = lambda router=router: client.infer(model, tensor, parameters={"router": router})  # noqa: E731
        assert refused(ask, "unknown router", "combined") == "INVALID_ARGUMENT"
    assert refused(lambda: client.get_model_metadata("nobody")) == "NOT_FOUND"
    assert refused(lambda: client.get_model_config("nobody")) == "NOT_FOUND"
    assert refused(lambda: client.get_inference_statistics("nobody")) == "NOT_FOUND"


@own
@pytest.mark.parametrize(
    ("request_message", "word"),
    [
        (message(raw_input_contents=[b"12345"]), "holds 5 bytes"),
        (message(raw_input_contents=[]), "raw_input_contents"),
        (message(raw_input_contents=[ONE.tobytes(), b""]), "once"),
        (message(parameters={"ruoter": service_pb2.InferParameter(string_param="mean")}), "'ruoter'"),
        (message(parameters={"router": service_pb2.InferParameter(int64_param=1)}), "must be a string"),
        (message(parameters={"priority": service_pb2.InferParameter(int64_param=7)}), "priority"),
        (message(parameters={"timeout": service_pb2.InferParameter(int64_param=-7)}), "timeout"),
    ],
)
def test_wrong_messages(endpoint: Endpoint, request_message: Any, word: str) -> None:
    assert refused(lambda: endpoint.stub.ModelInfer(request_message), word) == "INVALID_ARGUMENT"


@own
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
    assert refused(lambda: endpoint.stub.ModelInfer(asked), word) == "INVALID_ARGUMENT"


@own
def test_shared_memory_and_classification_are_refused(endpoint: Endpoint) -> None:
    asked = message()
    asked.inputs[0].parameters["shared_memory_region"].string_param = "region"
    assert refused(lambda: endpoint.stub.ModelInfer(asked), "shared memory") == "INVALID_ARGUMENT"
    output = [triton.InferRequestedOutput("probabilities", class_count=3)]
    ask = lambda: endpoint.client.infer("tiny", [picture_input(ONE)], outputs=output)  # noqa: E731
    assert refused(ask, "classification") == "INVALID_ARGUMENT"


@own
def test_every_call_of_the_protocol_is_answered(endpoint: Endpoint) -> None:
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in service.methods:
        request = getattr(service_pb2, method.input_type.name)()
        call = getattr(endpoint.stub, method.name)
        if method.name == "ModelStreamInfer":
            assert refused(lambda: list(call(iter([message()]))), "ModelInfer") == "UNIMPLEMENTED"  # noqa: B023
        elif method.name in UNSUPPORTED:
            assert refused(lambda: call(request), "not supported") == "UNIMPLEMENTED"  # noqa: B023
        else:
            future = call.future(request)
            assert future.code() in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND), method.name


def test_statistics_count_what_was_asked(endpoint: Endpoint, some_pictures: NDArray[np.uint8]) -> None:
    def counts() -> tuple[int, int, int]:
        one = endpoint.client.get_inference_statistics(endpoint.model).model_stats[-1]
        return one.inference_count, one.inference_stats.success.count, one.inference_stats.fail.count

    before = counts()
    endpoint.client.infer(endpoint.model, [picture_input(some_pictures[:4])])
    refused(lambda: endpoint.client.infer(endpoint.model, [encoded_input(b"nothing")]))
    assert tuple(np.subtract(counts(), before)) == (4, 1, 1)

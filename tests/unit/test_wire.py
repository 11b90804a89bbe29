"""The wire's codec: any bytes are either a request that fits or one InvalidRequest, and answers survive the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from trivium.runtime.bundle import Manifest
from trivium.runtime.client_codec import read_response
from trivium.runtime.errors import InvalidRequest
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import Terms, terms
from trivium.runtime.scheduler import NORMAL, URGENT
from trivium.runtime.wire import (
    EVERY,
    OUTPUTS,
    PROMISES,
    InferMessage,
    metadata,
    outputs_of,
    pack_bytes,
    read_request,
    unpack_bytes,
    write_response,
)


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.fixture(scope="module")
def manifest(predictor: Predictor) -> Manifest:
    return predictor.manifest


@pytest.fixture(scope="module")
def guaranteed(guaranteed_bundle: Path) -> Predictor:
    return Predictor.load(guaranteed_bundle)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or the InvalidRequest raised."""
    try:
        return function(*arguments)
    except InvalidRequest as error:
        return error


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_bytes_tensors_come_back(elements: list[bytes]) -> None:
    raw = b"".join(map(pack_bytes, elements))
    assert unpack_bytes(raw, len(elements), "x") == elements


@given(st.binary(max_size=60), st.integers(0, 5))
def test_any_bytes_are_elements_or_an_error(raw: bytes, size: int) -> None:
    elements = attempt(unpack_bytes, raw, size, "x")
    if isinstance(elements, InvalidRequest):
        assert "\n" not in str(elements)
    else:
        assert len(elements) <= size + 1
        assert raw.startswith(b"".join(map(pack_bytes, elements)))


NAMES = st.sampled_from(["image", "encoded_image", "", "probabilities", "Ünï"])
PARAMETERS = st.dictionaries(
    st.sampled_from(["router", "priority", "timeout", "coverage", "max_risk", "sequence_id"]),
    st.one_of(
        st.builds(lambda v: service_pb2.InferParameter(int64_param=v), st.integers(-5, 5)),
        st.builds(
            lambda v: service_pb2.InferParameter(string_param=v), st.sampled_from(["mean", "clean", "", "x", "0.9"])
        ),
        st.builds(lambda v: service_pb2.InferParameter(double_param=v), st.floats()),
        st.just(service_pb2.InferParameter()),
    ),
    max_size=2,
)
TENSORS = st.builds(
    lambda name, datatype, shape, ints: service_pb2.ModelInferRequest.InferInputTensor(
        name=name,
        datatype=datatype,
        shape=shape,
        contents=service_pb2.InferTensorContents(uint_contents=ints) if ints else None,
    ),
    NAMES,
    st.sampled_from(["UINT8", "BYTES", "FP32"]),
    st.one_of(
        st.sampled_from([[1, 32, 32, 3], [2, 32, 32, 3], [1], [2]]), st.lists(st.integers(-2, 2**62), max_size=5)
    ),
    st.lists(st.integers(0, 2**32 - 1), max_size=3),
)


@settings(max_examples=300)
@given(
    st.lists(TENSORS, max_size=2),
    st.lists(st.one_of(st.just(bytes(3072)), st.just(pack_bytes(b"a")), st.binary(max_size=20)), max_size=2),
    PARAMETERS,
    st.lists(st.sampled_from([*EVERY, "logits"]), max_size=2),
    st.booleans(),
)
def test_any_message_is_a_request_that_fits_or_an_error(
    manifest: Manifest,
    guaranteed: Predictor,
    tensors: list[Any],
    raw: list[bytes],
    parameters: dict[str, Any],
    outputs: list[str],
    promised: bool,
) -> None:
    manifest = guaranteed.manifest if promised else manifest
    message = service_pb2.ModelInferRequest(
        model_name="tiny",
        inputs=tensors,
        raw_input_contents=raw,
        parameters=parameters,
        outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
    )
    request = attempt(read_request, message, manifest, 4)
    if isinstance(request, InvalidRequest):
        assert "\n" not in str(request)
        assert len(str(request)) < 600
    else:
        assert 1 <= request.size <= 4
        if request.images is not None:
            assert request.images.shape == (request.size, 32, 32, 3)
        else:
            assert len(request.encoded) == request.size
        assert request.priority in (URGENT, NORMAL)
        assert set(request.outputs) <= set(outputs_of(manifest))
        assert (request.terms is not None) == promised


@given(st.binary(max_size=200))
def test_random_protobuf_is_a_request_or_an_error(manifest: Manifest, data: bytes) -> None:
    message = service_pb2.ModelInferRequest()
    try:
        message.ParseFromString(data)
    except Exception:  # what gRPC refuses before it reaches us
        return
    with pytest.raises(InvalidRequest):
        read_request(message, manifest, 4)


@settings(max_examples=500)
@given(
    st.lists(st.binary(max_size=300), max_size=3),
    st.text(max_size=5),
    PARAMETERS,
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    st.integers(0, 20),
)
def test_a_message_reads_the_same_without_copying_its_pictures(
    raw: list[bytes], name: str, parameters: dict[str, Any], edits: list[tuple[int, int]], cut: int
) -> None:
    message = service_pb2.ModelInferRequest(model_name=name, id="7", raw_input_contents=raw, parameters=parameters)
    data = bytearray(message.SerializeToString() + message.SerializeToString())
    for at, value in edits:
        if at < len(data):
            data[at] = value
    given_bytes = bytes(data[: len(data) - cut] if cut <= len(data) else data)
    try:
        expected = service_pb2.ModelInferRequest.FromString(given_bytes)
    except DecodeError:
        with pytest.raises(DecodeError):
            InferMessage(given_bytes)
        return
    found = InferMessage(given_bytes)
    assert [bytes(one) for one in found.raw] == list(expected.raw_input_contents)
    assert found.nbytes == len(given_bytes)
    del expected.raw_input_contents[:]
    del found.message.raw_input_contents[:]
    assert found.message == expected


def test_parameters_are_read(manifest: Manifest) -> None:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="encoded_image", datatype="BYTES", shape=[1])
    message = service_pb2.ModelInferRequest(inputs=[tensor], raw_input_contents=[pack_bytes(b"abc")])
    plain = read_request(message, manifest, 4)
    assert (plain.router, plain.priority, plain.timeout) == (None, NORMAL, None)
    assert plain.outputs == tuple(OUTPUTS)
    message.parameters["router"].string_param = "mean"
    message.parameters["priority"].uint64_param = 1
    message.parameters["timeout"].int64_param = 1500
    full = read_request(message, manifest, 4)
    assert (full.router, full.priority, full.timeout, full.encoded) == ("mean", URGENT, 0.0015, [b"abc"])


def with_parameters(**parameters: Any) -> Any:
    """A request that fits, with these parameters."""
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="encoded_image", datatype="BYTES", shape=[1])
    return service_pb2.ModelInferRequest(
        inputs=[tensor],
        raw_input_contents=[pack_bytes(b"abc")],
        parameters={name: service_pb2.InferParameter(**value) for name, value in parameters.items()},
    )


def test_levels_are_read_as_numbers_or_text(guaranteed: Predictor) -> None:
    manifest = guaranteed.manifest
    assert read_request(with_parameters(), manifest, 4).outputs == tuple(EVERY)
    asked = {"coverage": {"double_param": 0.93}, "max_risk": {"string_param": "0.2"}}

    def expected(router: str | None, outputs: tuple[str, ...]) -> Terms:
        higher = terms(manifest, router, 0.95, 0.2, outputs)
        assert higher is not None
        return higher._replace(coverage=0.93)  # what was asked for is what is promised

    assert read_request(with_parameters(router={"string_param": "mean"}, **asked), manifest, 4).terms == expected(
        "mean", tuple(EVERY)
    )
    part = with_parameters(**asked)
    part.outputs.add(name="abstain")
    assert read_request(part, manifest, 4).terms == expected(None, ("abstain",))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"coverage": {"double_param": 1.0}}, "parameter 'coverage' must be from 0.8 to 0.99, got 1"),
        ({"coverage": {"int64_param": 1}}, "parameter 'coverage' must be from 0.8 to 0.99, got 1"),
        ({"coverage": {"bool_param": True}}, "parameter 'coverage' must be a number, got True"),
        ({"coverage": {}}, "parameter 'coverage' must be a number, got None"),
        ({"coverage": {"string_param": "x" * 1000}}, f"parameter 'coverage' must be a number, got '{'x' * 99}"),
        (
            {"max_risk": {"double_param": 0.04}, "router": {"string_param": "mean"}},
            "parameter 'max_risk' must be from 0.05 to 0.3 for router 'mean', got 0.04",
        ),
    ],
)
def test_levels_that_cannot_be_kept_are_refused(guaranteed: Predictor, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_request(with_parameters(**parameters), guaranteed.manifest, 4)
    assert str(caught.value) == words


def test_without_guarantees_their_outputs_are_unknown(manifest: Manifest) -> None:
    assert [one.name for one in metadata(manifest, ["1"]).outputs] == list(OUTPUTS)
    for name in PROMISES:
        asked = with_parameters()
        asked.outputs.add(name=name)
        with pytest.raises(InvalidRequest, match=f"unexpected inference output '{name}' .*; run: trivium calibrate"):
            read_request(asked, manifest, 4)


@pytest.mark.parametrize("count", [1, 3])
def test_predictions_survive_the_way(guaranteed: Predictor, some_pictures: NDArray[np.uint8], count: int) -> None:
    predictor = guaranteed
    predictions = [predictor.infer(image, decode_ns=7) for image in some_pictures[:count]]
    response = write_response("id", predictor.manifest, tuple(EVERY), predictions, 11)
    found = read_response(service_pb2.ModelInferResponse.FromString(response.SerializeToString()))
    assert len(found) == count
    for one, other in zip(found, predictions, strict=True):
        for name in EVERY:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.timings.decode == 7 * count
        assert one.timings.queue == 11
        assert one.timings.compute == sum(p.timings.compute for p in predictions)
    assert read_response(write_response("", predictor.manifest, tuple(OUTPUTS), predictions, 0))[0].abstain is None
    # the frame of an answer is shared: one request's must not change the next one's
    again = write_response("other", predictor.manifest, ("label",), predictions, 0)
    assert [tensor.name for tensor in again.outputs] == ["label"]
    assert write_response("", predictor.manifest, tuple(EVERY), predictions, 11).id == ""

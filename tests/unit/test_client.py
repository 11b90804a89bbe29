"""The clients' shared core and both transports, against a gRPC server that answers as it is told to."""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

import trivium.runtime
from trivium.runtime import AsyncClient, Client, RetryPolicy, errors
from trivium.runtime.client_codec import (
    MESSAGE_PICTURES,
    Batch,
    each,
    load,
    read_metadata,
    read_response,
    write_request,
)
from trivium.runtime.connection import SPREAD
from trivium.runtime.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidPicture,
    InvalidRequest,
    QueueFull,
    ServerError,
    TriviumError,
    Unavailable,
)
from trivium.runtime.predictor import Predictor
from trivium.runtime.retries import RETRYABLE, RetryBudget, pushback_ms
from trivium.runtime.wire import OUTPUTS, config, metadata, read_request, write_response

FULL, AWAY = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE
PICTURE = np.zeros((32, 32, 3), np.uint8)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PATIENT = RetryPolicy(initial_backoff=0.001)
MODES = ("1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16", "F")


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Fails as `failures` says, one a request: (status, pushback or None); then answers with a real predictor."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.failures: list[tuple[grpc.StatusCode, str | None]] = []
        self.detail = "not now"
        self.times: list[float] = []
        self.requests: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.gone = threading.Event()
        """Set when a call ends, however it does."""
        self.delay = 0.0
        self.bundle = ""
        self.extra = 0
        """Answers too many."""

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.times.append(time.monotonic())
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        gone = threading.Event()
        context.add_callback(gone.set)
        context.add_callback(self.gone.set)
        if self.failures:
            status, pushback = self.failures.pop(0)
            if pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
            context.abort(status, self.detail)
        gone.wait(self.delay)
        manifest = self.predictor.manifest
        asked = read_request(request, manifest, 64)
        assert asked.images is not None
        answers = [self.predictor.infer(image) for image in asked.images] + [self.predictor.infer(PICTURE)] * self.extra
        return write_response(request.id, manifest, asked.outputs, answers, 0, self.bundle)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return config(self.predictor.manifest, 4, 1, "cpu")

    def pauses(self) -> list[float]:
        return np.diff(self.times).tolist()


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.fixture
def scripted(predictor: Predictor) -> Iterator[tuple[str, Scripted]]:
    servicer = Scripted(predictor)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(0).wait()


def blocking(method: str, url: str, *arguments: Any, settings: dict[str, Any], **options: Any) -> Any:
    with Client(url, "tiny", **settings) as client:
        return getattr(client, method)(*arguments, **options)


def awaited(method: str, url: str, *arguments: Any, settings: dict[str, Any], **options: Any) -> Any:
    async def call() -> Any:
        async with AsyncClient(url, "tiny", **settings) as client:
            return await getattr(client, method)(*arguments, **options)

    return asyncio.run(call())


@pytest.fixture(params=[blocking, awaited])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """call(method, url, *arguments, settings of the client, **options of the call), by either transport."""
    transport: Callable[..., Any] = request.param

    def run(method: str, url: str, *arguments: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        return transport(method, url, *arguments, settings=settings or {}, **options)

    return run


def test_the_package_offers_its_names_and_loads_them_on_use() -> None:
    code = (
        "import sys, trivium.runtime as r\n"
        "assert not {'numpy', 'grpc', 'pydantic'} & set(sys.modules)\n"
        "for name in r.__all__: assert getattr(r, name).__name__ == name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(trivium.runtime.__all__) <= set(dir(trivium.runtime))
    with pytest.raises(ImportError, match="Nobody"):
        from trivium.runtime import Nobody  # type: ignore[attr-defined]  # noqa: F401


@settings(deadline=None)
@given(
    attempts=st.integers(1, 10),
    pushback=st.none() | st.integers(-5, 5000),
    remaining=st.floats(0, 100) | st.just(math.inf),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_a_pause_ends_before_the_deadline_and_is_the_servers_or_random(
    attempts: int, pushback: int | None, remaining: float, draw: float
) -> None:
    policy = RetryPolicy(max_attempts=6)
    pause = policy.pause(attempts, pushback, remaining, draw)
    bound = min(1.0, 0.05 * 2 ** (attempts - 1))
    wanted = bound * draw if pushback is None else pushback / 1000
    if attempts >= 6 or wanted < 0 or wanted >= remaining:
        assert pause is None
    else:
        assert pause == pytest.approx(wanted)


def test_the_budget_bounds_retries_to_a_share_of_the_requests() -> None:
    budget = RetryBudget(RetryPolicy(max_tokens=10, token_ratio=0.25))
    assert [budget.failed("UNAVAILABLE", True) for _ in range(6)] == [True] * 4 + [False] * 2
    # a failure that no policy would ask again costs nothing
    assert not budget.failed("NOT_FOUND", False)
    for _ in range(12):
        budget.succeeded()
    # 4 and 3 tokens more: above the half again by 2
    assert [budget.failed("UNAVAILABLE", True) for _ in range(3)] == [True, False, False]
    statistics = budget.statistics()
    assert (statistics.failures, statistics.throttled) == ({"UNAVAILABLE": 9, "NOT_FOUND": 1}, 4)


@pytest.mark.parametrize(("failing", "share"), [(0.05, (1.0, 1.0)), (0.9, (0.0, 0.02))])
def test_few_failures_are_all_retried_and_many_hardly(failing: float, share: tuple[float, float]) -> None:
    budget = RetryBudget(RetryPolicy())
    generator = random.Random(7)
    failures = retries = successes = 0
    for _ in range(4000):
        if generator.random() < failing:
            failures += 1
            retries += budget.failed("UNAVAILABLE", True)
        else:
            successes += 1
            budget.succeeded()
    assert share[0] <= retries / failures <= share[1]
    assert retries <= 50 + 0.1 * successes


@pytest.mark.parametrize(
    ("trailing", "expected"),
    [
        (None, None),
        ((), None),
        ((("other", "5"),), None),
        ((("grpc-retry-pushback-ms", "25"),), 25),
        ((("grpc-retry-pushback-ms", b"0"),), 0),
        ((("grpc-retry-pushback-ms", "-1"),), -1),
        ((("grpc-retry-pushback-ms", "soon"),), -1),
        ((("grpc-retry-pushback-ms", "²"),), -1),
    ],
)
def test_pushback_is_read_as_grpc_reads_it(trailing: Any, expected: int | None) -> None:
    assert pushback_ms(trailing) == expected


def test_pictures_come_one_by_one(some_pictures: NDArray[np.uint8]) -> None:
    image = Image.fromarray(PICTURE)
    for one in ("a.png", Path("a.png"), b"a", bytearray(b"a"), memoryview(b"a"), image):
        assert list(each(one)) == [one]
        assert list(each(iter([one, one]))) == [one, one]
    assert [np.shape(picture) for picture in each(PICTURE)] == [(32, 32, 3)]  # type: ignore[arg-type]
    mixed = [b"a", some_pictures[:3], "b", some_pictures[3], np.zeros((0, 32, 32, 3), np.uint8)]
    found: list[Any] = list(each(mixed))
    assert [type(picture) for picture in found] == [bytes, *[np.ndarray] * 3, str, np.ndarray]
    np.testing.assert_array_equal(np.stack([*found[1:4], found[5]]), some_pictures[:4])
    assert list(each([])) == []


@pytest.mark.parametrize(
    ("picture", "kind", "text"),
    [
        ("nowhere.png", InvalidPicture, r"nowhere\.png: No such file"),
        ("a\0b", InvalidPicture, "null"),
        (Path("/"), InvalidPicture, "directory"),
        (np.zeros((4, 4, 3)), InvalidRequest, r"must be uint8 .*got float64 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), InvalidRequest, r"got uint8 \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), InvalidRequest, r"got uint8 \[4, 4, 4\]"),
        (7, InvalidRequest, "a picture must be a path, .* not int"),
        (["a.png"], InvalidRequest, "not list"),
    ],
)
def test_what_is_no_picture_is_named(picture: Any, kind: type[TriviumError], text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        load(picture)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_pil_images_of_every_mode_are_answered_as_their_pixels(
    mode: str, predictor: Predictor, some_pictures: NDArray[np.uint8]
) -> None:
    from trivium.runtime.preprocess import prepare

    picture = Image.fromarray(some_pictures[0])
    if mode == "I;16":
        picture = Image.fromarray(some_pictures[0][..., 0].astype(np.uint16) * 257)
    elif mode in ("RGBa", "La"):
        picture = picture.convert(mode.upper()).convert(mode)
    else:
        picture = picture.convert(mode)
    assert picture.mode == mode
    encoded = load(picture)
    assert isinstance(encoded, bytes)
    # Pillow makes nothing but LA of La
    pixels = picture.convert("LA") if mode == "La" else picture
    np.testing.assert_array_equal(predictor.decode(encoded), prepare(pixels, predictor.manifest.preprocessing))


def test_pil_images_are_turned_upright_as_files_are(
    predictor: Predictor, some_pictures: NDArray[np.uint8], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(some_pictures[0]).save(path, exif=exif)
    encoded = load(Image.open(path))
    assert isinstance(encoded, bytes)
    np.testing.assert_array_equal(predictor.decode(encoded), predictor.decode(path.read_bytes()))
    np.testing.assert_array_equal(predictor.decode(encoded), np.rot90(some_pictures[0], -1))


def test_a_broken_lazy_pil_image_is_an_invalid_picture(some_pictures: NDArray[np.uint8]) -> None:
    out = io.BytesIO()
    Image.fromarray(some_pictures[0]).save(out, "PNG")
    lazy = Image.open(io.BytesIO(out.getvalue()[:-200]))
    with pytest.raises(InvalidPicture, match="cannot be encoded") as caught:
        load(lazy)
    assert "\n" not in str(caught.value)


def test_messages_hold_neighbours_of_one_kind_and_size() -> None:
    large = np.zeros((3000, 3000, 3), np.uint8)
    pictures: list[Any] = [b"a", b"b", PICTURE, *[PICTURE] * MESSAGE_PICTURES, b"c", large, large]
    sizes: list[int] = []
    batch = Batch(MESSAGE_PICTURES)
    for picture in pictures:
        loaded = load(picture)
        if not batch.takes(loaded):
            sizes.append(len(batch.pictures))
            batch = Batch(MESSAGE_PICTURES)
        batch.add(loaded)
    # 27 MB of one picture alone; two of them are over the bound of a message
    assert sizes == [2, MESSAGE_PICTURES, 1, 1, 1]
    assert len(batch.pictures) == 1


def test_answers_of_other_servers_are_refused(predictor: Predictor) -> None:
    whole = write_response("", predictor.manifest, tuple(OUTPUTS), [predictor.infer(PICTURE)] * 2, 0)
    assert len(read_response(whole)) == 2

    def damaged(change: Callable[[Any], object]) -> Any:
        response = service_pb2.ModelInferResponse.FromString(whole.SerializeToString())
        change(response)
        return response

    def cut(response: Any, index: int) -> None:
        response.raw_output_contents[index] = response.raw_output_contents[index][:-1]

    def shorten(response: Any) -> None:
        response.outputs[1].shape[0] = 1
        response.raw_output_contents[1] = response.raw_output_contents[1][:8]

    assert [tensor.name for tensor in whole.outputs[:3]] == ["probabilities", "class_id", "label"]
    changes: list[Callable[[Any], object]] = [
        lambda response: response.outputs.pop(),
        lambda response: (response.outputs.pop(), response.raw_output_contents.pop()),
        lambda response: cut(response, 0),
        lambda response: cut(response, 2),
        lambda response: setattr(response.outputs[0], "datatype", "FP16"),
        lambda response: response.outputs[2].shape.pop(),
        shorten,
    ]
    for change in changes:
        with pytest.raises(ServerError, match="answer"):
            read_response(damaged(change))


def test_metadata_is_read_and_that_of_other_servers_refused(predictor: Predictor) -> None:
    manifest = predictor.manifest
    found = read_metadata(metadata(manifest, ["1", "3"]), config(manifest, 8, 2, "cpu"))
    assert (found.name, found.versions, found.size, found.max_batch) == ("tiny", ("1", "3"), (32, 32), 8)
    assert (list(found.heads), list(found.classes)) == (manifest.heads, manifest.classes)
    assert list(found.routers) == manifest.routers()
    other = service_pb2.ModelConfigResponse(config=model_config_pb2.ModelConfig(name="tiny"))
    with pytest.raises(ServerError, match="does not say what heads and classes 'tiny' has"):
        read_metadata(metadata(manifest, ["1"]), other)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"url": "https://example.org:443"}, "'https://example.org:443': expected HOST:PORT"),
        ({"url": ""}, "expected HOST:PORT"),
        ({"url": "localhost"}, "expected HOST:PORT"),
        ({"url": "127.0.0.1:99999"}, "expected HOST:PORT"),
        ({"url": "::1:8001"}, "expected HOST:PORT"),
        ({"url": []}, "expected HOST:PORT"),
        ({"url": ["10.0.0.1:8001", "10.0.0.2"]}, "'10.0.0.2': expected HOST:PORT"),
        ({"url": "10.0.0.1:1,replica:1"}, "'replica:1': a list has IP addresses; a name stands for all"),
        ({"url": ["10.0.0.1:1", "[::1]:1"]}, "addresses of IPv4 or of IPv6, not both"),
        ({"model": "a\udcff"}, "is no name or version"),
        ({"bundle": "latest"}, "bundle must be up to 64 hexadecimal digits, got 'latest'"),
        ({"keepalive": -1}, "keepalive must be seconds from 0 to 86400"),
        ({"keepalive": math.nan}, "keepalive must be seconds from 0 to 86400"),
        ({"timeout": 0}, "timeout must be seconds > 0"),
        ({"timeout": math.nan}, "timeout must be seconds > 0"),
        ({"token": "secret\nline"}, "the token must be printable ASCII"),
        ({"token": " "}, "the token must be printable ASCII"),
        ({"tls_cert": "a.pem"}, "belong together"),
        ({"tls_key": "a.pem"}, "belong together"),
        ({"tls_ca": "/nowhere.pem"}, "/nowhere.pem cannot be used: No such file"),
        ({"tls_ca": __file__}, "test_client.py cannot be used: NO_CERTIFICATE_OR_CRL_FOUND"),
        ({"tls_cert": __file__, "tls_key": __file__}, "cannot be used"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_settings_that_cannot_be_used(kind: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        kind(**{"url": "127.0.0.1:1", **settings})
    assert "secret" not in str(caught.value)


def test_addresses_of_every_kind_are_taken() -> None:
    several = ("10.0.0.1:1,10.0.0.2:2", ["10.0.0.1:1", "10.0.0.2:2"], ("[::1]:1", "[fe80::1%eth0]:2"))
    single = ("127.0.0.1:8001", "[::1]:8001", "a-host.example.org:1", "dns:///host:1", "unix:/tmp/socket")
    for url in (*single, *several):
        Client(url, "tiny").close()


def test_requests_that_no_message_can_hold(call: Callable[..., Any]) -> None:
    for options in ({"router": "\ud800"}, {"priority": "high"}, {"priority": 1 << 70}, {"request_id": "\ud800"}):
        with pytest.raises(InvalidRequest, match="cannot be written"):
            call("predict", "127.0.0.1:1", PICTURE, **options)


def test_a_bound_beyond_a_life_is_none(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    for timeout in (1e10, 1e300, math.inf, None):
        assert len(call("predict", scripted[0], PICTURE, settings={"timeout": timeout})) == 1


def test_ids_trace_context_and_parameters_reach_the_server(
    scripted: tuple[str, Scripted], call: Callable[..., Any], predictor: Predictor
) -> None:
    url, servicer = scripted
    (answer,) = call(
        "predict", url, PICTURE, settings={"token": "abc"}, router="mean", priority=1, request_id="mine",
        traceparent=TRACEPARENT, tracestate="vendor=1",
    )  # fmt: skip
    (request,) = servicer.requests
    assert request.parameters["router"].string_param == "mean"
    assert request.parameters["priority"].int64_param == 1
    assert servicer.metadata["authorization"] == "Bearer abc"
    assert (servicer.metadata["traceparent"], servicer.metadata["tracestate"]) == (TRACEPARENT, "vendor=1")
    assert (answer.request_id, answer.model, answer.version) == ("mine", "tiny", "1")
    assert answer.label == predictor.infer(PICTURE).label
    call("predict", url, PICTURE)
    assert len(servicer.requests[-1].id) == 32
    assert "traceparent" not in servicer.metadata
    for wrong in ("x", TRACEPARENT.upper(), "00-" + "0" * 32 + TRACEPARENT[35:], TRACEPARENT + "\n"):
        with pytest.raises(InvalidRequest, match="traceparent"):
            call("predict", url, PICTURE, traceparent=wrong)
    assert len(servicer.requests) == 2


def test_messages_are_as_long_as_the_server_takes(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    url, servicer = scripted
    assert len(call("predict", url, np.stack([PICTURE] * 10), request_id="ten")) == 10
    assert [request.inputs[0].shape[0] for request in servicer.requests] == [4, 4, 2]
    assert {request.id for request in servicer.requests} == {"ten"}


def test_a_full_server_is_asked_again_when_it_says(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    url, servicer = scripted
    servicer.failures = [(FULL, "60"), (FULL, "30"), (AWAY, "0")]
    assert len(call("predict", url, PICTURE)) == 1
    first, second, third = servicer.pauses()
    assert first >= 0.06
    assert second >= 0.03
    assert third < 5


def test_without_a_hint_pauses_are_random_and_attempts_bounded(
    scripted: tuple[str, Scripted], call: Callable[..., Any]
) -> None:
    url, servicer = scripted
    servicer.failures = [(AWAY, None)] * 9
    with pytest.raises(Unavailable, match=rf"^{url}: not now \(4 attempts\)$"):
        call("predict", url, PICTURE, settings={"retries": PATIENT})
    assert len(servicer.times) == 4
    servicer.failures = [(FULL, None)]
    with pytest.raises(QueueFull):
        call("predict", url, PICTURE, settings={"retries": False})
    assert len(servicer.times) == 5


def test_long_messages_are_asked_again_too(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    """gRPC itself would not retry one over 256 KB."""
    url, servicer = scripted
    servicer.failures = [(FULL, "1")] * 2
    servicer.failures.append((grpc.StatusCode.INVALID_ARGUMENT, None))
    with pytest.raises(InvalidRequest):
        call("predict", url, np.zeros((500, 500, 3), np.uint8))
    assert [request.ByteSize() > 700_000 for request in servicer.requests] == [True] * 3


@pytest.mark.parametrize("pushback", ["-1", "never"])
def test_a_server_may_ask_for_no_retry(scripted: tuple[str, Scripted], call: Callable[..., Any], pushback: str) -> None:
    url, servicer = scripted
    servicer.failures = [(FULL, pushback)]
    with pytest.raises(QueueFull):
        call("predict", url, PICTURE)
    assert len(servicer.times) == 1


def test_an_empty_budget_stops_retries_until_successes_fill_it(scripted: tuple[str, Scripted]) -> None:
    url, servicer = scripted
    servicer.failures = [(FULL, "0")] * 40
    policy = RetryPolicy(max_attempts=3, max_tokens=8, token_ratio=0.5)
    with Client(url, "tiny", retries=policy) as client:
        for _ in range(10):
            with pytest.raises(QueueFull):
                client.predict(PICTURE)
        # of 8 tokens the first request leaves 5, and with 4 nothing is asked again
        assert len(servicer.times) == 3 + 9
        servicer.failures = []
        for _ in range(14):
            client.predict(PICTURE)
        servicer.times, servicer.failures = [], [(FULL, "0")] * 2
        assert len(client.predict(PICTURE)) == 1
        assert len(servicer.times) == 3


def test_every_failed_attempt_is_counted(scripted: tuple[str, Scripted]) -> None:
    url, servicer = scripted
    servicer.failures = [(FULL, "0"), (AWAY, "0"), (grpc.StatusCode.INTERNAL, None)]
    with Client(url, "tiny") as client:
        with pytest.raises(ServerError):
            client.predict(PICTURE)
        client.predict(PICTURE)
        found = client.statistics
    assert (found.attempts, found.retries, found.throttled) == (4, 2, 0)
    assert found.failures == {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1, "INTERNAL": 1}
    assert found.attempts - found.failed == 1


@pytest.mark.parametrize(
    ("detail", "attempts"),
    [
        ("The actor died unexpectedly before finishing this task.\n\tclass_name: ServeReplica", 3),
        ("The actor 8c22c88e5dbb3e56 is unavailable: the connection broke.", 3),
        ("The actor died because of an error raised in its creation task, ray::ServeReplica", 1),
        ("ray::ServeReplica.handle()\nActorDiedError: The actor died unexpectedly before finishing this task.", 1),
        ("the request could not be answered; the server's log says why", 1),
        ("", 1),
    ],
)
def test_an_actor_of_ray_that_died_is_asked_again_where_that_is_wanted(
    scripted: tuple[str, Scripted], call: Callable[..., Any], detail: str, attempts: int
) -> None:
    url, servicer = scripted
    servicer.detail = detail
    for policy, wanted in ((RetryPolicy(3, 0.001, ray_actors=True), attempts), (RetryPolicy(3, 0.001), 1)):
        servicer.times, servicer.failures = [], [(grpc.StatusCode.INTERNAL, None)] * 3
        with pytest.raises(ServerError):
            call("predict", url, PICTURE, settings={"retries": policy})
        assert len(servicer.times) == wanted


def test_an_answer_of_another_bundle_is_an_error(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    url, servicer = scripted
    servicer.bundle = "ab" * 32
    (answer,) = call("predict", url, PICTURE, settings={"bundle": "ABab"})
    assert answer.bundle == servicer.bundle
    with pytest.raises(errors.OtherBundle, match=f"^{url}: a server answers from bundle {'ab' * 32}, expected abc$"):
        call("predict", url, PICTURE, settings={"bundle": "abc"})
    servicer.bundle = ""
    with pytest.raises(errors.OtherBundle, match="a bundle that it does not name, expected ab"):
        call("predict", url, PICTURE, settings={"bundle": "ab"})
    assert len(servicer.times) == 3


class Replicas:
    """Three servers with a health of their own."""

    def __init__(self, predictor: Predictor) -> None:
        self.servicers, self.health, self.servers, self.urls = [], [], [], []
        for _ in range(3):
            self.servicers.append(Scripted(predictor))
            self.health.append(health.HealthServicer())
            self.servers.append(grpc.server(futures.ThreadPoolExecutor(8)))
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.servicers[-1], self.servers[-1])
            health_pb2_grpc.add_HealthServicer_to_server(self.health[-1], self.servers[-1])
            self.urls.append(f"127.0.0.1:{self.servers[-1].add_insecure_port('127.0.0.1:0')}")
            self.servers[-1].start()

    def asked(self) -> list[int]:
        """Requests of each since the last time."""
        counts = [len(servicer.times) for servicer in self.servicers]
        for servicer in self.servicers:
            servicer.times = []
        return counts


@pytest.fixture
def replicas(predictor: Predictor) -> Iterator[Replicas]:
    running = Replicas(predictor)
    yield running
    for server in running.servers:
        server.stop(0).wait()


def ask_until(client: Client, replicas: Replicas, shares: Callable[[list[int]], bool]) -> None:
    """Every request is answered meanwhile."""
    end = time.monotonic() + 20
    while True:
        replicas.asked()
        for _ in range(12):
            client.predict(PICTURE)
        if shares(counts := replicas.asked()):
            return
        assert time.monotonic() < end, counts
        time.sleep(0.02)


def test_replicas_take_turns_as_long_as_they_say_that_they_serve(replicas: Replicas) -> None:
    with Client(replicas.urls, "tiny") as client:
        ask_until(client, replicas, lambda counts: counts == [4, 4, 4])
        replicas.health[1].set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        ask_until(client, replicas, lambda counts: counts == [6, 0, 6])
        assert client.statistics.failures == {}
        replicas.health[1].set("", health_pb2.HealthCheckResponse.SERVING)
        ask_until(client, replicas, lambda counts: counts == [4, 4, 4])
        # the next in turn answers for the one that cannot, and nobody is told
        replicas.servicers[0].failures = [(AWAY, "0")] * 4
        for _ in range(6):
            client.predict(PICTURE)
        assert 1 <= client.statistics.failures["UNAVAILABLE"] <= 4
        replicas.servers[2].stop(0).wait()
        ask_until(client, replicas, lambda counts: counts == [6, 6, 0])


def test_asyncio_takes_turns_too(replicas: Replicas) -> None:
    async def ask() -> Any:
        async with AsyncClient(",".join(replicas.urls), "tiny") as client:
            end = time.monotonic() + 20
            while True:
                replicas.asked()
                await asyncio.gather(*(client.predict(PICTURE) for _ in range(12)))
                if replicas.asked() == [4, 4, 4]:
                    return client.statistics
                assert time.monotonic() < end

    assert asyncio.run(ask()).failures == {}


def test_the_shipped_service_config_is_the_clients_policy(replicas: Replicas) -> None:
    """For clients of gRPC in any language; what they send must fit into their buffer for retries."""
    text = (Path(__file__).parents[2] / "docker/service-config.json").read_text()
    config, policy = json.loads(text), RetryPolicy()
    assert {name: config[name] for name in SPREAD} == SPREAD
    assert config["retryThrottling"] == {"maxTokens": policy.max_tokens, "tokenRatio": policy.token_ratio}
    (method,) = config["methodConfig"]
    assert method["retryPolicy"] == {
        "maxAttempts": policy.max_attempts,
        "initialBackoff": f"{policy.initial_backoff}s",
        "maxBackoff": f"{policy.max_backoff:g}s",
        "backoffMultiplier": policy.backoff_multiplier,
        "retryableStatusCodes": sorted(RETRYABLE, reverse=True),
    }
    replicas.servicers[0].failures = [(AWAY, None)] * 100
    replicas.health[1].set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    message = write_request([np.zeros((32, 32, 3), np.uint8)], "tiny")
    options = [("grpc.service_config", text), ("grpc.per_rpc_retry_buffer_size", 64 << 20)]
    with grpc.insecure_channel("ipv4:" + ",".join(replicas.urls), options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(6):
            assert len(read_response(stub.ModelInfer(message))) == 1
    failed, none, answered = replicas.asked()
    assert (failed > 0, none, answered) == (True, 0, 6)


def test_no_replica_that_serves_is_one_line_soon(replicas: Replicas, call: Callable[..., Any]) -> None:
    for one in replicas.health:
        one.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    start = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        call("predict", replicas.urls, PICTURE)
    assert str(caught.value).startswith(",".join(replicas.urls) + ": ")
    assert str(caught.value).endswith("backend unhealthy (4 attempts)")
    assert time.monotonic() - start < 10
    assert replicas.asked() == [0, 0, 0]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:1", ["127.0.0.1:1", "127.0.0.1:2"], "localhost:1", "no-such-host.invalid:1"]
)
def test_a_wrong_address_is_one_line_soon(call: Callable[..., Any], url: Any) -> None:
    start = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        call("predict", url, PICTURE, settings={"retries": PATIENT})
    text = str(caught.value)
    assert text.startswith((url if isinstance(url, str) else ",".join(url)) + ": ")
    assert text.endswith(" (4 attempts)")
    assert "\n" not in text
    assert time.monotonic() - start < 15


def test_no_retry_would_end_after_the_deadline(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    url, servicer = scripted
    servicer.failures = [(FULL, "600000")]
    start = time.monotonic()
    with pytest.raises(QueueFull):
        call("predict", url, PICTURE, timeout=60)
    assert time.monotonic() - start < 30
    assert len(servicer.times) == 1


def test_the_deadline_covers_all_of_a_call(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    url, servicer = scripted
    servicer.delay = 0.2
    start = time.monotonic()
    # 40 pictures are 10 messages of 0.2 s each
    with pytest.raises(DeadlineExceeded):
        call("predict", url, np.stack([PICTURE] * 40), timeout=0.7)
    assert 0.6 < time.monotonic() - start < 20
    assert len(servicer.times) <= 4
    servicer.delay = 60
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="Deadline Exceeded"):
        call("predict", url, PICTURE, settings={"timeout": 0.3})
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("INVALID_ARGUMENT", errors.InvalidRequest),
        ("NOT_FOUND", errors.UnknownModel),
        ("FAILED_PRECONDITION", errors.BundleError),
        ("UNAUTHENTICATED", errors.Unauthenticated),
        ("PERMISSION_DENIED", errors.PermissionDenied),
        ("RESOURCE_EXHAUSTED", errors.QueueFull),
        ("UNAVAILABLE", errors.Unavailable),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded),
        ("CANCELLED", errors.Cancelled),
        ("UNIMPLEMENTED", errors.Unimplemented),
        ("INTERNAL", errors.ServerError),
        ("UNKNOWN", errors.ServerError),
        ("DATA_LOSS", errors.ServerError),
    ],
)
def test_every_status_is_a_typed_error_of_one_line(
    scripted: tuple[str, Scripted], call: Callable[..., Any], status: str, kind: type[TriviumError]
) -> None:
    url, servicer = scripted
    servicer.failures = [(grpc.StatusCode[status], "-1")]
    servicer.detail = "no\nluck \x1b[31m"
    with pytest.raises(TriviumError) as caught:
        call("predict", url, PICTURE)
    assert type(caught.value) is kind
    assert str(caught.value).endswith(r"no\nluck \x1b[31m")
    if status != "INTERNAL":
        assert kind.status == status or kind is errors.ServerError


def test_a_message_too_long_for_the_server_is_the_callers_fault_and_not_retried(
    scripted: tuple[str, Scripted], call: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidRequest, match="larger than max"):
        call("predict", scripted[0], bytes(6 << 20))
    assert scripted[1].times == []


def test_an_answer_to_other_pictures_is_refused(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    scripted[1].extra = 1
    with pytest.raises(ServerError, match="3 answers to 2 pictures"):
        call("predict", scripted[0], [PICTURE, PICTURE])


def test_what_the_server_does_not_have_is_named(scripted: tuple[str, Scripted], call: Callable[..., Any]) -> None:
    with pytest.raises(errors.Unimplemented):
        call("health", scripted[0])
    with pytest.raises(errors.Unimplemented):
        call("metadata", scripted[0])
    assert not call("ready", scripted[0])


def test_cancelling_a_task_cancels_its_call(scripted: tuple[str, Scripted]) -> None:
    url, servicer = scripted
    servicer.delay = 60

    async def leave() -> None:
        async with AsyncClient(url, "tiny") as client:
            task = asyncio.ensure_future(client.predict(PICTURE))
            while not servicer.times:
                await asyncio.sleep(0.005)
            assert not servicer.gone.is_set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.gone.wait, 30)

    asyncio.run(leave())
    assert len(servicer.times) == 1


def test_a_cancelled_pause_ends_at_once(scripted: tuple[str, Scripted]) -> None:
    url, servicer = scripted
    servicer.failures = [(FULL, "20000")]

    async def leave() -> None:
        async with AsyncClient(url, "tiny") as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.predict(PICTURE), 0.5)

    start = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - start < 10
    assert len(servicer.times) == 1

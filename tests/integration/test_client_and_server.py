"""Both clients and `trivium predict --server` against real server processes."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trivium.runtime import AsyncClient, Client, RetryPolicy
from trivium.runtime.errors import InvalidRequest, OtherBundle, QueueFull, Unauthenticated, Unavailable, UnknownModel
from trivium.runtime.predictor import Prediction, Predictor
from trivium.runtime.promises import ranges, terms
from trivium.runtime.wire import OUTPUTS

if TYPE_CHECKING:
    from tests.integration.conftest import Serve, ServerProcess

PICTURE = np.zeros((32, 32, 3), np.uint8)
TIMES = ("decode_ns", "queue_ns", "compute_ns", "route_ns")


def content(prediction: Prediction) -> tuple[Any, ...]:
    """All of an answer but where and when it was given, bit for bit."""
    values = (getattr(prediction, name) for name in OUTPUTS)
    return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)


def trivium(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivium", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, some_pictures: NDArray[np.uint8]) -> Path:
    """Three pictures, one of them a larger JPEG."""
    root = tmp_path_factory.mktemp("pictures")
    Image.fromarray(some_pictures[0]).save(root / "a.png")
    Image.fromarray(some_pictures[1]).resize((90, 50)).save(root / "b.jpg")
    Image.fromarray(some_pictures[2]).save(root / "c.webp", lossless=True)
    return root


@pytest.mark.parametrize("transport", ["blocking", "asyncio"])
def test_all_kinds_of_pictures_mixed_get_the_predictors_answers(
    server: ServerProcess, predictor: Predictor, folder: Path, some_pictures: NDArray[np.uint8], transport: str
) -> None:
    png, jpeg = (folder / "a.png").read_bytes(), (folder / "b.jpg").read_bytes()
    pictures = [
        some_pictures[3], png, folder / "a.png", str(folder / "b.jpg"), Image.open(folder / "b.jpg"),
        some_pictures[4:9], bytearray(jpeg), Image.fromarray(some_pictures[9]), memoryview(png), some_pictures[10],
    ]  # fmt: skip
    wanted = [some_pictures[3], png, png, jpeg, jpeg, *some_pictures[4:9], jpeg, some_pictures[9], png]
    wanted.append(some_pictures[10])
    expected = [content(predictor.infer(predictor.decode(one) if isinstance(one, bytes) else one)) for one in wanted]

    async def ask() -> list[Any]:
        async with AsyncClient(server.url, "tiny", "1") as client:
            return [await client.predict(pictures), await client.predict(jpeg), await client.predict([])]

    if transport == "asyncio":
        several, one, none = asyncio.run(ask())
    else:
        with Client(server.url, "tiny", "1") as client:
            several, one, none = client.predict(pictures), client.predict(jpeg), client.predict([])
    assert [content(answer) for answer in several] == expected
    assert [content(answer) for answer in one] == [expected[3]]
    assert none == []
    assert {(answer.model, answer.version) for answer in several} == {("tiny", "1")}
    assert len({answer.request_id for answer in several}) == 1
    assert one[0].timings.decode > 0
    assert one[0].timings.compute > 0


def test_both_clients_ask_for_levels(
    server: ServerProcess, guaranteed_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    predictor = Predictor.load(guaranteed_bundle)
    asked = terms(predictor.manifest, "robust", 0.8, 0.05)
    expected = [predictor.infer(image, "robust", asked) for image in some_pictures]

    async def ask() -> tuple[list[Any], Any]:
        async with AsyncClient(server.url, "guaranteed") as client:
            answers = await client.predict(some_pictures, router="robust", coverage=0.8, max_risk=0.05)
            return answers, (await client.metadata()).guarantees

    with Client(server.url, "guaranteed") as client:
        blocking = client.predict(some_pictures, router="robust", coverage=0.8, max_risk=0.05)
        offered = client.metadata().guarantees
        with pytest.raises(InvalidRequest, match="cannot be written"):
            client.predict(some_pictures, coverage="high")  # type: ignore[arg-type]
    for answers, described in ((blocking, offered), asyncio.run(ask())):
        assert described == ranges(predictor.manifest)
        for one, right in zip(answers, expected, strict=True):
            assert content(one) == content(right)
            np.testing.assert_array_equal(one.prediction_set, right.prediction_set)
            assert (one.abstain, one.shift_score) == (right.abstain, right.shift_score)
    defaults = [predictor.infer(image, "robust") for image in some_pictures]
    assert [one.abstain for one in defaults] != [one.abstain for one in expected]


def test_what_the_server_says_of_itself(server: ServerProcess, predictor: Predictor) -> None:
    async def ask() -> list[Any]:
        async with AsyncClient(server.url, "tiny") as client:
            return [await client.metadata(), await client.ready(), await client.health(), await client.health("tiny")]

    with Client(server.url, "tiny") as client:
        told: list[Any] = [client.metadata(), client.ready(), client.health(), client.health("tiny")]
        with pytest.raises(UnknownModel):
            client.health("nobody")
    assert asyncio.run(ask()) == told
    metadata, manifest = told[0], predictor.manifest
    assert (metadata.name, metadata.versions, metadata.size) == ("tiny", ("1", "3"), (32, 32))
    assert (list(metadata.heads), list(metadata.classes)) == (manifest.heads, manifest.classes)
    assert list(metadata.routers) == manifest.routers()
    assert told[1:] == [True, "SERVING", "SERVING"]
    with Client(server.url, "single", "1") as client:
        assert client.metadata().heads == ("original",)
    with Client("127.0.0.1:1", "tiny") as client:
        assert not client.ready()
        with pytest.raises(Unavailable):
            client.metadata()


def test_64_tasks_get_their_own_answers(
    server: ServerProcess, predictor: Predictor, some_pictures: NDArray[np.uint8]
) -> None:
    expected = [content(predictor.infer(image)) for image in some_pictures]
    encoded = []
    for image in some_pictures:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        encoded.append(out.getvalue())

    async def ask(client: AsyncClient, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(4):
            chosen = rng.integers(0, len(some_pictures), rng.integers(1, 4))
            found = await client.predict([encoded[i] if rng.random() < 0.5 else some_pictures[i] for i in chosen])
            assert [content(answer) for answer in found] == [expected[i] for i in chosen]

    async def all_of_them() -> None:
        async with AsyncClient(server.url, "tiny", "1", timeout=120) as client:
            await asyncio.gather(*(ask(client, seed) for seed in range(64)))

    asyncio.run(all_of_them())


def test_a_cancelled_task_leaves_the_queue(serve: Serve, slow_bundle: Path) -> None:
    server = serve(slow_bundle, "--instances", "1")

    async def leave() -> None:
        async with AsyncClient(server.url, "slow", timeout=120) as client:
            first = asyncio.ensure_future(client.predict(np.stack([PICTURE] * 16)))
            while not server.metric("trivium_running_pictures"):
                await asyncio.sleep(0.01)
            second = asyncio.ensure_future(client.predict(np.stack([PICTURE] * 16)))
            await asyncio.to_thread(server.wait_until, lambda: server.metric("trivium_in_flight_requests") == 2)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            await asyncio.to_thread(server.wait_until, lambda: server.metric("trivium_cancelled_total") == 1)
            assert len(await first) == 16

    asyncio.run(leave())
    # of the cancelled request no picture was answered; one may have been running
    assert server.metric("trivium_executed_pictures_total") <= 17


def test_a_full_server_answers_all_who_come_back_when_it_says(serve: Serve, slow_bundle: Path) -> None:
    server = serve(slow_bundle, "--instances", "1", "--max-batch", "1", "--max-queue", "2")

    async def ask(policy: RetryPolicy | bool) -> list[Any]:
        async with AsyncClient(server.url, "slow", timeout=100, retries=policy) as client:
            return await asyncio.gather(*(client.predict(PICTURE) for _ in range(12)), return_exceptions=True)

    answers = asyncio.run(ask(False))
    assert {type(answer) for answer in answers} == {list, QueueFull}
    refused = server.metric("trivium_rejected_total")
    assert refused == sum(isinstance(answer, QueueFull) for answer in answers)
    answers = asyncio.run(ask(RetryPolicy(max_attempts=1000, max_tokens=10_000)))
    assert [type(answer) for answer in answers] == [list] * 12
    assert server.metric("trivium_rejected_total") > refused


def test_a_server_that_comes_back_is_found_again(serve: Serve, tiny_bundle: Path) -> None:
    server = serve(tiny_bundle)
    with Client(server.url, "tiny", retries=RetryPolicy(max_attempts=200, max_tokens=1000), timeout=60) as client:
        assert len(client.predict(PICTURE)) == 1
        assert server.stop() == 0
        with pytest.raises(Unavailable):
            client.predict(PICTURE, timeout=0.5)
        port = server.url.rpartition(":")[2]
        again = subprocess.Popen(
            [sys.executable, "-m", "trivium", "serve", str(tiny_bundle), "--grpc-port", port, "--http-port", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert len(client.predict(PICTURE)) == 1
        finally:
            again.kill()
            again.wait()


def test_a_replica_that_freezes_or_dies_costs_its_clients_no_answer(serve: Serve, tiny_bundle: Path) -> None:
    first, second = (serve(tiny_bundle, "--instances", "1") for _ in range(2))

    def shared() -> bool:
        client.predict(PICTURE)
        return all(one.metric("trivium_requests_total", code="OK") > 0 for one in (first, second))

    with Client([first.url, second.url], "tiny", keepalive=0.5) as client:
        first.wait_until(shared)
        first.process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            client.predict(PICTURE)
        assert client.statistics.failures == {"UNAVAILABLE": 1}
        first.stop(signal.SIGKILL)
        for _ in range(3):
            client.predict(PICTURE)
        assert second.stop() == 0
        with pytest.raises(Unavailable, match=rf"^{first.url},{second.url}: .* \(4 attempts\)$"):
            client.predict(PICTURE)
        assert client.statistics.failures == {"UNAVAILABLE": 5}


class Secured:
    """A server with TLS, client certificates and a token; one self-signed certificate serves all of them."""

    def __init__(self, serve: Serve, bundle: Path, root: Path) -> None:
        self.cert, self.key = root / "cert.pem", root / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", str(self.key), "-out", str(self.cert), "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run(command, check=True, capture_output=True)
        tokens = root / "tokens"
        tokens.write_text(hashlib.sha256(b"right").hexdigest() + " alice\n")
        self.token = root / "token"
        self.token.write_text("right\n")
        self.server = serve(
            bundle, "--tls-cert", self.cert, "--tls-key", self.key, "--tls-client-ca", self.cert, "--tokens", tokens
        )
        self.files = {"tls_ca": self.cert, "tls_cert": self.cert, "tls_key": self.key}
        self.flags = [word for name, path in self.files.items() for word in (f"--{name.replace('_', '-')}", path)]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with the openssl command line")
def test_tls_with_client_certificates_and_tokens(serve: Serve, tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    secured = Secured(serve, tiny_bundle, tmp_path)
    url = secured.server.url

    async def ask(**settings: Any) -> Any:
        async with AsyncClient(url, "tiny", **settings) as client:
            return await client.predict(PICTURE)

    assert len(asyncio.run(ask(**secured.files, token="right"))) == 1
    with pytest.raises(Unauthenticated, match="not known"):
        asyncio.run(ask(**secured.files, token="wrong"))
    for settings in ({}, {"tls_ca": secured.cert}, {"tls": True}):
        with pytest.raises(Unavailable) as caught:
            asyncio.run(ask(**settings, retries=False, timeout=20))
        assert "\n" not in str(caught.value)

    flags = ["--server", url, "--model", "tiny", *secured.flags, "--json", folder / "a.png"]
    done = trivium("predict", *flags, "--token-file", secured.token)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    done = trivium("predict", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"trivium predict: {url}: this call needs a token")
    assert done.stderr.count("\n") == 1
    done = trivium("predict", *flags, "--token-file", tmp_path / "nowhere")
    assert done.stderr == f"trivium predict: {tmp_path / 'nowhere'}: No such file or directory\n"


def test_predict_by_a_server_prints_what_predict_by_a_bundle_prints(
    server: ServerProcess, guaranteed_bundle: Path, folder: Path
) -> None:
    remote = ["--server", server.url, "--model", "guaranteed/1"]
    options = [folder, "--top", "3", "--router", "paper", "--coverage", "0.93", "--max-risk", "0.25"]
    offline, online = trivium("predict", guaranteed_bundle, *options), trivium("predict", *remote, *options)
    assert (online.returncode, online.stderr) == (0, "")
    assert online.stdout == offline.stdout
    assert "class " in online.stdout
    rows = []
    for source in ([guaranteed_bundle], remote):
        done = trivium("predict", *source, *options, "--json")
        rows.append([json.loads(line) for line in done.stdout.splitlines()])
        for row in rows[-1]:
            assert row["compute_ns"] > 0
            for name in TIMES:
                assert row.pop(name) >= 0
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3
    assert all(row["prediction_set"] for row in rows[0])
    done = trivium("predict", *remote, *options, "--coverage", "0.999")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "trivium predict: parameter 'coverage' must be from 0.8 to 0.99, got 0.999\n"


def test_predict_by_a_server_names_what_cannot_be_answered(server: ServerProcess, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 nonsense")
    remote = ["--server", server.url, "--model", "tiny"]
    done = trivium("predict", *remote, "--json", broken, folder / "a.png", folder / "absent.png")
    assert done.returncode == 1
    assert [Path(json.loads(line)["path"]).name for line in done.stdout.splitlines()] == ["a.png"]
    first, second = done.stderr.splitlines()
    assert first.startswith(f"trivium predict: {broken}: the JPEG cannot be decoded: ")
    assert second == f"trivium predict: {folder / 'absent.png'}: No such file or directory"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--server", "URL", "IMAGE"], "URL has 3 models, name one of: guaranteed, single, tiny"),
        (["--server", "URL", "--model", "nobody", "IMAGE"], "'nobody'"),
        (["--server", "URL", "--model", "tiny", "--router", "best", "IMAGE"], "unknown router 'best'; this model has:"),
        (["--server", "URL", "--model", "tiny", "--kernels", "on", "IMAGE"], "--kernels is of use only with a bundle"),
        (["--server", "URL", "--model", "tiny", "--tls-cert", "x", "IMAGE"], "belong together"),
        (["--server", "URL", "--model", "tiny", "--timeout", "0", "IMAGE"], "timeout must be seconds > 0"),
        (["--server", "http://URL", "IMAGE"], "expected HOST:PORT"),
        (["--token-file", "x", "BUNDLE", "IMAGE"], "--token-file is of use only with --server"),
        (["BUNDLE"], "expected a bundle and at least one IMAGE, or --server HOST:PORT"),
    ],
)
def test_mistakes_have_one_clear_line(
    server: ServerProcess, tiny_bundle: Path, folder: Path, arguments: list[str], reason: str
) -> None:
    names = {"URL": server.url, "http://URL": f"http://{server.url}", "BUNDLE": tiny_bundle, "IMAGE": folder / "a.png"}
    done = trivium("predict", *(names.get(word, word) for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert reason.replace("URL", server.url) in done.stderr.splitlines()[-1]


def test_no_server_is_one_line_soon() -> None:
    done = trivium("predict", "--server", "127.0.0.1:1", "--model", "tiny", "a.png")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("trivium predict: 127.0.0.1:1: ")


def test_a_version_asked_for_is_the_one_that_answers(server: ServerProcess) -> None:
    with Client(server.url, "tiny") as newest, Client(server.url, "tiny", "1") as first:
        assert newest.predict(PICTURE)[0].version == "3"
        assert first.predict(PICTURE)[0].version == "1"
    with (
        Client(server.url, "tiny", "2") as client,
        pytest.raises(UnknownModel, match=r"2 is not found; versions .* 1, 3"),
    ):
        client.predict(PICTURE)
    with Client(server.url, "tiny") as client:
        (answer,) = client.predict(PICTURE)
    assert server.metric("trivium_bundle_info", model="tiny", version="3", sha256=answer.bundle) == 1
    with (
        Client(server.url, "tiny", "1", bundle=answer.bundle) as client,
        pytest.raises(OtherBundle, match=answer.bundle),
    ):
        client.predict(PICTURE)
    with Client(server.url, "tiny") as client, pytest.raises(InvalidRequest, match=r"Expected \[-1,32,32,3\]"):
        client.predict(np.zeros((2, 8, 8, 3), np.uint8))
    with Client(server.url, "tiny") as client, pytest.raises(InvalidRequest, match="unknown router 'best'"):
        client.predict(PICTURE, router="best")

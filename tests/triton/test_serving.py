"""The exported repository in a real tritonserver: batches, errors, metrics, deadlines, reloads, NumPy 2."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tests.triton.conftest import Start
from tests.triton.server import Installation, TritonServer
from tritonclient.utils import InferenceServerException

from trivium.export.triton import write_repository
from trivium.runtime.predictor import Prediction, Predictor

ARRAYS = ("probabilities", "head_probabilities", "predictive_entropy", "mutual_information", "divergence", "energy")


def image_input(images: NDArray[np.uint8]) -> triton.InferInput:
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    return tensor


def encoded_input(pictures: list[bytes], batched: bool) -> triton.InferInput:
    array = np.array(pictures, dtype=object)
    array = array[:, None] if batched else array
    tensor = triton.InferInput("encoded_image", list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def png(image: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def samples(server: TritonServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(server.metrics())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


class Asker(threading.Thread):
    """A client that asks for good and bad pictures in turn, and notes every answer that is not the right one."""

    def __init__(
        self, seed: int, url: str, layout: str, pictures: NDArray[np.uint8], expected: dict[str, list[Prediction]]
    ) -> None:
        super().__init__(daemon=True)
        self.rng = np.random.default_rng(seed)
        self.url, self.batched = url, layout == "batched"
        self.pictures, self.expected = pictures, expected
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        with triton.InferenceServerClient(self.url) as client:
            while not self.stop.is_set():
                self.ask(client)

    def ask(self, client: Any) -> None:
        rng = self.rng
        chosen = rng.integers(0, len(self.pictures), rng.choice([1, 1, 3]))
        kind = rng.choice(["image", "encoded", "bad picture", "bad router"])
        router = str(rng.choice(list(self.expected)))
        tensor = image_input(self.pictures[chosen])
        if kind in ("encoded", "bad picture"):
            encoded = [png(self.pictures[i]) for i in chosen]
            if kind == "bad picture":
                encoded[-1] = encoded[-1][:-40]
            tensor = encoded_input(encoded, self.batched)
        try:
            answer = client.infer("tiny", [tensor], parameters={"router": "x" if kind == "bad router" else router})
        except InferenceServerException as error:
            self.outcomes[str(error.status())] += 1
            if not kind.startswith("bad") or "INVALID_ARGUMENT" not in str(error.status()):
                self.wrong.append(f"{kind}: {error}")
            return
        self.outcomes["OK"] += 1
        if kind.startswith("bad"):
            self.wrong.append(f"{kind}: answered")
            return
        for row, index in enumerate(chosen):
            expected = self.expected[router][index]
            if answer.as_numpy("label").ravel()[row].decode() != expected.label:
                self.wrong.append(f"{kind}: label")
            for name in ARRAYS:
                if not np.allclose(answer.as_numpy(name)[row], getattr(expected, name), rtol=0, atol=1e-5):
                    self.wrong.append(f"{kind}: {name}")


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> dict[str, list[Prediction]]:
    predictor = Predictor.load(tiny_bundle)
    return {
        router: [predictor.infer(image, router) for image in some_pictures] for router in ("blend", "robust", "mean")
    }


def asking(
    clients: int, server: TritonServer, layout: str, pictures: NDArray[np.uint8], expected: dict[str, list[Prediction]]
) -> list[Asker]:
    askers = [Asker(seed, server.url, layout, pictures, expected) for seed in range(clients)]
    for asker in askers:
        asker.start()
    return askers


def finish(askers: list[Asker]) -> Counter[str]:
    for asker in askers:
        asker.stop.set()
    for asker in askers:
        asker.join(60)
        assert not asker.is_alive()
    assert [wrong for asker in askers for wrong in asker.wrong] == []
    return sum((asker.outcomes for asker in askers), Counter())


@pytest.mark.parametrize("layout", ["one by one", "batched"])
def test_good_pictures_are_answered_among_bad_ones(
    start: Start,
    repositories: dict[str, Path],
    layout: str,
    some_pictures: NDArray[np.uint8],
    expected: dict[str, list[Prediction]],
) -> None:
    server = start(repositories[layout], ["tiny"])
    askers = asking(16, server, layout, some_pictures, expected)
    time.sleep(2)
    outcomes = finish(askers)
    assert outcomes["OK"] > 16
    assert outcomes["StatusCode.INVALID_ARGUMENT"] > 16
    with triton.InferenceServerClient(server.url) as client:
        (statistics,) = client.get_inference_statistics("tiny").model_stats
    mean_batch = statistics.inference_count / statistics.execution_count
    assert mean_batch > 1.5 if layout == "batched" else mean_batch == 1

    found = samples(server)
    pictures = sum(value for (name, _), value in found.items() if name == "trivium_routed_total")
    assert pictures >= outcomes["OK"]
    labels = {"model": "tiny", "version": "1"}
    for head in ("clean", "robust", "combined"):
        for name in ("trivium_predictive_entropy_nats_count", "trivium_mutual_information_nats_count"):
            assert found[name, frozenset((labels | {"head": head}).items())] == pictures


def test_shapes_of_the_batched_layout(
    start: Start, repositories: dict[str, Path], some_pictures: NDArray[np.uint8]
) -> None:
    server = start(repositories["batched"], ["tiny"])
    with triton.InferenceServerClient(server.url) as client:
        described = client.get_model_metadata("tiny")
        shapes = {one.name: list(one.shape) for one in (*described.inputs, *described.outputs)}
        assert shapes["image"] == [-1, 32, 32, 3]
        assert shapes["encoded_image"] == shapes["label"] == shapes["class_id"] == [-1, 1]
        answer = client.infer("tiny", [encoded_input([png(one) for one in some_pictures[:5]], True)])
        assert answer.as_numpy("label").shape == answer.as_numpy("head").shape == (5, 1)
        assert answer.as_numpy("head_probabilities").shape == (5, 3, 10)
        with pytest.raises(InferenceServerException, match="batch-size must be <= 64"):
            client.infer("tiny", [image_input(np.zeros((65, 32, 32, 3), np.uint8))])


@pytest.fixture
def busy(start: Start, slow_bundle: Path, tmp_path: Path) -> Iterator[tuple[TritonServer, Any]]:
    """A server with one instance of a slow model, and a client."""
    write_repository(slow_bundle, tmp_path / "slow", instances=1)
    server = start(tmp_path / "slow", ["slow"])
    with triton.InferenceServerClient(server.url) as client:
        yield server, client


def test_timeouts_and_priorities(busy: tuple[TritonServer, Any], some_pictures: NDArray[np.uint8]) -> None:
    _, client = busy
    outcomes: list[tuple[str, str]] = []
    finished = threading.Semaphore(0)

    def ask(name: str, size: int, **options: Any) -> None:
        def done(result: Any, error: Any) -> None:
            outcomes.append((name, "OK" if error is None else str(error.status())))
            finished.release()

        client.async_infer("slow", [image_input(some_pictures[:size])], done, **options)

    ask("first", 12)
    time.sleep(0.1)
    ask("normal", 1)
    ask("normal", 1)
    ask("late", 1, timeout=1000)
    ask("urgent", 1, priority=1)
    for _ in range(5):
        assert finished.acquire(timeout=60)
    answered = [name for name, status in outcomes if status == "OK"]
    assert answered == ["first", "urgent", "normal", "normal"]
    assert ("late", "StatusCode.UNAVAILABLE") in outcomes


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_reloads_under_load(
    start: Start,
    tiny_bundle: Path,
    build_bundle: Any,
    tmp_path: Path,
    some_pictures: NDArray[np.uint8],
    expected: dict[str, list[Prediction]],
) -> None:
    repository = tmp_path / "models"
    write_repository(tiny_bundle, repository, instances=1)
    write_repository(build_bundle(tmp_path / "other", heads=("original",), name="other"), repository, instances=1)
    server = start(repository, ["tiny"])
    process = psutil.Process(server.process.pid)

    def memory() -> int:
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))

    askers = asking(2, server, "one by one", some_pictures, expected)
    sizes = []
    with triton.InferenceServerClient(server.url) as client:
        for _ in range(20):
            # a load that changes something is a reload: the new one is loaded beside the old
            os.utime(repository / "tiny/1/model.py")
            client.load_model("tiny")
            client.load_model("other")
            client.infer("other", [image_input(some_pictures[:1])])
            client.unload_model("other")
            end = time.monotonic() + 60
            while client.is_model_ready("other") or len(process.children()) > 1:
                assert time.monotonic() < end, "the old instances did not end"
                time.sleep(0.05)
            sizes.append(memory())
    outcomes = finish(askers)
    assert set(outcomes) == {"OK", "StatusCode.INVALID_ARGUMENT"}
    early, late = np.median(sizes[2:7]), np.median(sizes[-5:])
    assert late < 1.1 * early, [size >> 20 for size in sizes]


@pytest.mark.slow
def test_numpy_2_is_refused_at_the_start(
    start: Start, installation: Installation, repositories: dict[str, Path], tmp_path: Path
) -> None:
    """With the fault this server would answer OK with empty tensors."""
    other = Installation(tmp_path / "numpy2")
    other.folder.mkdir()
    (other.folder / "server").symlink_to(installation.folder / "server")
    venv.create(other.folder / "venv", with_pip=False)
    site = next((other.folder / "venv/lib").glob("python*")) / "site-packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), "numpy>=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"numpy 2 cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    borrowed = next((installation.folder / "venv/lib").glob("python*")) / "site-packages"
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    with pytest.raises(RuntimeError, match=r"cannot read the arrays of NumPy 2.*pip install 'numpy<2'"):
        start(repositories["one by one"], ["tiny"], python=other)

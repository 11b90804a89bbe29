"""The predictor: what it answers is what the engine and the router say, with the time each stage took."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trivium.kernels import HeadStatistics
from trivium.runtime.errors import DigestMismatch, EngineError, InvalidPicture, InvalidRequest
from trivium.runtime.predictor import Predictor, Timings
from trivium.runtime.preprocess import Limits
from trivium.runtime.router import route

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'trivium[cpu]'")


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.mark.parametrize("router", [None, "clean", "mean", "paper", "blend", "min_entropy"])
def test_an_answer_is_the_engines_and_the_routers(
    predictor: Predictor, some_pictures: NDArray[np.uint8], router: str | None
) -> None:
    statistics = predictor.engine.run(some_pictures)
    routed = route(statistics, predictor.manifest, router)
    for i, image in enumerate(some_pictures):
        answer = predictor.infer(image, router)
        np.testing.assert_array_equal(answer.probabilities, routed.probabilities[i])
        assert (answer.class_id, answer.head) == (routed.class_id[i], routed.head[i])
        assert answer.label == f"class {answer.class_id}"
        np.testing.assert_array_equal(answer.head_probabilities, statistics.probabilities[i])
        for name in ("predictive_entropy", "mutual_information", "divergence", "energy"):
            np.testing.assert_array_equal(getattr(answer, name), getattr(statistics, name)[i])


def test_times_are_measured_and_those_from_before_passed_on(
    predictor: Predictor, some_pictures: NDArray[np.uint8]
) -> None:
    timings = predictor.infer(some_pictures[0], decode_ns=11, queue_ns=22).timings
    assert (timings.decode, timings.queue) == (11, 22)
    assert timings.compute > 0
    assert timings.route > 0


def test_encoded_pictures(predictor: Predictor, some_pictures: NDArray[np.uint8]) -> None:
    file = io.BytesIO()
    Image.fromarray(some_pictures[0]).save(file, "PNG")
    np.testing.assert_array_equal(predictor.decode(file.getvalue()), some_pictures[0])
    strict = Predictor(predictor.bundle, predictor.engine, Limits(max_bytes=100))
    with pytest.raises(InvalidPicture, match="more than the limit of 100"):
        strict.decode(file.getvalue())


def test_an_unknown_router_and_a_wrong_shape(predictor: Predictor, some_pictures: NDArray[np.uint8]) -> None:
    with pytest.raises(InvalidRequest, match="unknown router 'x'"):
        predictor.infer(some_pictures[0], "x")
    with pytest.raises(InvalidRequest, match=r"got uint8 \[1, 32, 16, 3\]"):
        predictor.infer(some_pictures[0, :, :16])


def test_an_answer_that_is_not_a_number_is_an_error(predictor: Predictor, some_pictures: NDArray[np.uint8]) -> None:
    statistics = predictor.engine.run(some_pictures[:1])
    poisoned = HeadStatistics(*(np.full_like(values, np.nan) for values in statistics))
    with pytest.raises(EngineError, match="not a number"):
        predictor.answer(poisoned, None, Timings())


def test_loading_verifies_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "golden.npz").write_bytes(b"")
    with pytest.raises(DigestMismatch):
        Predictor.load(copy)


def test_loading_and_answering_needs_few_packages(tiny_bundle: Path) -> None:
    code = (
        "import sys, numpy as np; from trivium.runtime.predictor import Predictor\n"
        "p = Predictor.load(sys.argv[1]); p.infer(np.zeros((32, 32, 3), np.uint8))\n"
        "print(*({'torch', 'onnx', 'rich', 'grpc', 'PIL.Image', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

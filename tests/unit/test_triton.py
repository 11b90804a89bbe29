"""The model of Triton's Python back end over a stand-in for triton_python_backend_utils.

That module exists in tritonserver's processes only; tests/triton asks a real one. Here stands what that cannot be made
to do: tensors that break, a model that fails, and a release that sends parameters with its responses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2 as pb

from trivium.export.triton import write_repository
from trivium.runtime.errors import EngineError
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import terms
from trivium.runtime.triton import Model, check_tensors
from trivium.runtime.wire import EVERY, PROMISES, metadata, outputs_of


class Tensor:
    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> NDArray[Any]:
        return self.array

    def to_dlpack(self) -> NDArray[Any]:
        return self.array

    @staticmethod
    def from_dlpack(name: str, array: NDArray[Any]) -> Tensor:
        return Tensor(name, array)


class Request:
    def __init__(self, parameters: str = "", **tensors: NDArray[Any]) -> None:
        self.tensors = {name: Tensor(name, array) for name, array in tensors.items()}
        self.parameters = lambda: parameters
        self.requested_output_names = lambda: list(EVERY)


class Response:
    def __init__(
        self, output_tensors: list[Tensor] | None = None, error: Any = None, parameters: dict[str, int] | None = None
    ) -> None:
        """Takes parameters."""
        self.tensors = {tensor.name: tensor.array for tensor in output_tensors or []}
        self.error, self.parameters = error, parameters


class Error(Exception):
    INVALID_ARG, NOT_FOUND, UNAVAILABLE, INTERNAL = "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "INTERNAL"


class Family:
    COUNTER, HISTOGRAM = "counter", "histogram"
    cells: dict[tuple[str, str], float]

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Cell:
        return Cell(self.cells, (self.name, labels["head"]))


class Cell:
    def __init__(self, cells: dict[tuple[str, str], float], key: tuple[str, str]) -> None:
        self.cells, self.key = cells, key
        cells.setdefault(key, 0)

    def increment(self, value: float) -> None:
        self.cells[self.key] += value

    def observe(self, value: float) -> None:
        self.cells[self.key] += 1


class Backend:
    """What of triton_python_backend_utils the model uses."""

    InferenceResponse, TritonError = Response, Error

    def __init__(self) -> None:
        self.Tensor = Tensor
        self.log: list[str] = []
        self.Logger = self
        self.MetricFamily = type("MetricFamily", (Family,), {"cells": {}})

    def log_error(self, text: str) -> None:
        self.log.append(text)

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
        return request.tensors.get(name)


def load(bundle: Path, root: Path) -> Model:
    """A model past its warm-up."""
    write_repository(bundle, root)
    config = text_format.Parse((root / "tiny/config.pbtxt").read_text(), pb.ModelConfig())
    document = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    made: Model = type("TritonPythonModel", (Model,), {"backend": Backend()})()
    made.initialize(
        {"model_config": json.dumps(document), "model_repository": str(root / "tiny"), "model_version": "1"}
    )
    (warm,) = made.execute([Request(image=np.zeros((1, 32, 32, 3), np.uint8))])
    assert warm.error is None
    assert set(made.backend.MetricFamily.cells.values()) == {0}
    return made


@pytest.fixture
def model(tiny_bundle: Path, tmp_path: Path) -> Model:
    return load(tiny_bundle, tmp_path)


def test_a_batch_of_good_and_bad_requests(model: Model, tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    predictor = Predictor.load(tiny_bundle)
    responses = model.execute(
        [
            Request(image=some_pictures[:2]),
            Request(encoded_image=np.array([b"no picture"], dtype=object)),
            Request('{"router": "robust"}', image=some_pictures[2:3]),
            Request('{"router": "x"}', image=some_pictures[:1]),
        ]
    )
    assert [response.error is None for response in responses] == [True, False, True, False]
    assert responses[1].error.args[1] == responses[3].error.args[1] == "INVALID_ARG"
    for response, images, router in (
        (responses[0], some_pictures[:2], None),
        (responses[2], some_pictures[2:3], "robust"),
    ):
        expected = [predictor.infer(image, router) for image in images]
        np.testing.assert_array_equal(response.tensors["probabilities"], [one.probabilities for one in expected])
        assert response.tensors["label"].tolist() == [one.label.encode() for one in expected]
        assert set(response.parameters) == {"decode_ns", "compute_ns", "route_ns", "bundle"}
        assert response.parameters["compute_ns"] > 0
    cells = model.backend.MetricFamily.cells
    assert sum(count for (name, _), count in cells.items() if name == "trivium_routed_total") == 3
    assert cells["trivium_predictive_entropy_nats", "clean"] == 3


def test_guarantees_are_the_predictor_s_bit_for_bit(
    guaranteed_bundle: Path, tmp_path: Path, some_pictures: NDArray[np.uint8]
) -> None:
    model, predictor = load(guaranteed_bundle, tmp_path), Predictor.load(guaranteed_bundle)
    manifest = predictor.manifest
    for parameters, router, coverage, max_risk in (
        ("", None, None, None),
        ('{"coverage": 0.93, "router": "robust"}', "robust", 0.95, None),
        ('{"coverage": "0.8", "max_risk": "0.1", "router": "mean"}', "mean", 0.8, 0.05),
    ):
        asked = terms(manifest, router, coverage, max_risk)
        expected = [predictor.infer(image, router, asked) for image in some_pictures]
        (response,) = model.execute([Request(parameters, image=some_pictures)])
        assert response.error is None
        assert list(response.tensors) == [one.name for one in metadata(manifest, ["1"]).outputs]
        types = {"prediction_set": np.bool_, "abstain": np.bool_, "shift_score": np.float32}
        for name in PROMISES:
            assert response.tensors[name].dtype == types[name]
            np.testing.assert_array_equal(response.tensors[name], [getattr(one, name) for one in expected])
        for name in outputs_of(manifest).keys() - {"label", "head"}:
            np.testing.assert_array_equal(response.tensors[name], [getattr(one, name) for one in expected])


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ('{"coverage": 1.0}', "must be from 0.8 to 0.99"),
        ('{"coverage": true}', "must be a number"),
        ('{"max_risk": "0.001"}', "for router 'blend'"),
        ('{"coverag": 0.9}', "known: priority, timeout, router, coverage, max_risk"),
    ],
)
def test_levels_that_cannot_be_kept(
    guaranteed_bundle: Path, tmp_path: Path, some_pictures: NDArray[np.uint8], parameters: str, words: str
) -> None:
    (response,) = load(guaranteed_bundle, tmp_path).execute([Request(parameters, image=some_pictures[:1])])
    assert words in response.error.args[0]
    assert response.error.args[1] == "INVALID_ARG"


def test_levels_without_guarantees(model: Model, some_pictures: NDArray[np.uint8]) -> None:
    (response,) = model.execute([Request('{"coverage": 0.9}', image=some_pictures[:1])])
    assert "run: trivium calibrate BUNDLE" in response.error.args[0]


def test_what_nobody_foresaw_tells_the_client_nothing(
    model: Model, some_pictures: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(images: Any) -> Any:
        raise MemoryError("at /home/someone")

    monkeypatch.setattr(model.predictor.engine, "run", fail)
    responses = model.execute([Request(image=some_pictures[:1]), Request("[", image=some_pictures[:1])])
    assert [response.error.args[1] for response in responses] == ["INTERNAL", "INTERNAL"]
    assert all("server's log says why" in response.error.args[0] for response in responses)
    assert any("MemoryError: at /home/someone" in text for text in model.backend.log)


def test_tensors_that_break_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tensors(Backend())
    monkeypatch.setattr(Tensor, "from_dlpack", lambda name, array: Tensor(name, np.zeros_like(array)))
    with pytest.raises(EngineError, match="pip install 'numpy<2'"):
        check_tensors(Backend())

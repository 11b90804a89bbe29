"""Answering inside a Triton server: the class behind the model.py of an exported model repository.

Triton's Python back end runs one process an instance, and hands each the requests of one batch at a time. Triton's
core checks names, types and shapes against config.pbtxt; what it cannot know is checked here, request by request, so
that a bad picture fails alone. `backend` is triton_python_backend_utils, which exists in the server's processes only.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .bundle import Manifest
from .errors import EngineError, InvalidRequest, TriviumError
from .metrics import ENTROPY, INFORMATION
from .predictor import Prediction, Predictor, Timings
from .promises import LEVELS, Terms, number, terms

BUNDLE = "bundle"
"""The bundle's folder within the version's."""
IMAGE, ENCODED = "image", "encoded_image"
CODES = {"INVALID_ARGUMENT": "INVALID_ARG", "NOT_FOUND": "NOT_FOUND", "UNAVAILABLE": "UNAVAILABLE"}
"""gRPC status -> the TritonError code that becomes it; any other is INTERNAL."""
SCALARS = {bool: np.bool_, int: np.int64, float: np.float32}
"""What one number a picture becomes."""
STAGES = ("decode", "compute", "route")
"""Of the response parameters; the queue is Triton's, whose statistics tell of it."""


@dataclass(slots=True)
class Pictures:
    """What one request asks."""

    images: NDArray[np.uint8]
    """[N, H, W, 3]."""
    decode_ns: list[int]
    router: str | None
    terms: Terms | None


class Model:
    """A bundle as a model of Triton's Python back end; a subclass in model.py sets `backend`."""

    backend: ClassVar[Any]

    def initialize(self, args: dict[str, str]) -> None:
        """Load this version's bundle, repeat its golden answers, and see that tensors reach the server.

        Raises: TriviumError, whose text Triton gives as the reason why the model is not loaded.
        """
        check_tensors(self.backend)
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.max_batch = int(parameters["max_batch"])
        self.outputs = [output["name"] for output in config["output"]]
        self.predictor = Predictor.load(
            Path(args["model_repository"], args["model_version"], BUNDLE),
            device="cuda" if parameters["device"] == "cuda" else "cpu",
            engine="auto",
        )
        # Triton's warm-up asks the same; a failure there would take tritonserver 2.51 down with all its models
        size = self.predictor.manifest.preprocessing
        self.predictor.infer(np.zeros((size.height, size.width, 3), np.uint8))
        self.counted = ModelMetrics(self.backend, self.predictor.manifest)
        # pictures of Triton's making, which come before any of a client's, and which no metric should show
        self.warmups = sum(max(1, sample["count"]) for sample in config["model_warmup"])
        # releases later than 2.51 can send them
        self.has_parameters = "parameters" in (self.backend.InferenceResponse.__init__.__doc__ or "")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The responses to the requests of one batch, each an answer or an error of its own."""
        asked = [self._read(request) for request in requests]
        good = [one for one in asked if isinstance(one, Pictures)]
        answers = iter(self._answer(good) if good else ())
        return [
            self._response(request, next(answers) if isinstance(one, Pictures) else one)
            for request, one in zip(requests, asked, strict=True)
        ]

    def _read(self, request: Any) -> Pictures | TriviumError:
        try:
            router, coverage, max_risk = _parameters(json.loads(request.parameters() or "{}"))
            asked = terms(self.predictor.manifest, router, coverage, max_risk, request.requested_output_names())
            tensors = {name: self.backend.get_input_tensor_by_name(request, name) for name in (IMAGE, ENCODED)}
            given = [name for name, tensor in tensors.items() if tensor is not None]
            if len(given) != 1:
                raise InvalidRequest(f"expected one input, {IMAGE!r} or {ENCODED!r}, got {', '.join(given) or 'none'}")
            array = tensors[given[0]].as_numpy()
            if not 1 <= len(array) <= self.max_batch:
                raise InvalidRequest(
                    f"inference request batch-size must be <= {self.max_batch} for "
                    f"{self.predictor.manifest.name!r}, and at least 1, got {len(array)}"
                )
            if given == [IMAGE]:
                return Pictures(array, [0] * len(array), router, asked)
            return self._decode(array.ravel().tolist(), router, asked)
        except Exception as error:
            return self._known(error)

    def _decode(self, encoded: Sequence[bytes], router: str | None, asked: Terms | None) -> Pictures:
        decoded = [self.predictor.decode_one(encoded, index) for index in range(len(encoded))]
        images = np.stack([image for image, _ in decoded])
        return Pictures(images, [decode_ns for _, decode_ns in decoded], router, asked)

    def _answer(self, asked: Sequence[Pictures]) -> list[list[Prediction] | TriviumError]:
        """One run of the engine for all requests; each is routed by its own rule."""
        images = asked[0].images if len(asked) == 1 else np.concatenate([one.images for one in asked])
        try:
            statistics, compute_ns = self.predictor.run_together(images)
        except Exception as error:
            return [self._known(error)] * len(asked)
        rows = iter(statistics)
        answers: list[list[Prediction] | TriviumError] = []
        for one in asked:
            own = [next(rows) for _ in one.decode_ns]
            try:
                answers.append(
                    [
                        self.predictor.answer(row, one.router, Timings(decode_ns, 0, compute_ns), one.terms)
                        for row, decode_ns in zip(own, one.decode_ns, strict=True)
                    ]
                )
            except Exception as error:
                answers.append(self._known(error))
        if self.warmups:
            self.warmups -= 1
        else:
            self.counted.add([one for answer in answers if isinstance(answer, list) for one in answer])
        return answers

    def _known(self, error: Exception) -> TriviumError:
        """An error that a client may read; of one that nobody foresaw Triton would send the traceback."""
        if isinstance(error, TriviumError):
            return error
        self.backend.Logger.log_error("".join(traceback.format_exception(error)))
        return EngineError("the request could not be answered; the server's log says why")

    def _response(self, request: Any, answer: list[Prediction] | TriviumError) -> Any:
        backend = self.backend
        if isinstance(answer, TriviumError):
            code = getattr(backend.TritonError, CODES.get(answer.status, "INTERNAL"))
            return backend.InferenceResponse(error=backend.TritonError(str(answer), code))
        wanted = set(request.requested_output_names())
        tensors = [backend.Tensor(name, column(answer, name)) for name in self.outputs if name in wanted]
        if not self.has_parameters:
            return backend.InferenceResponse(tensors)
        timings = [one.timings for one in answer]
        return backend.InferenceResponse(
            tensors,
            parameters={
                **{f"{stage}_ns": sum(getattr(one, stage) for one in timings) for stage in STAGES},
                "bundle": self.predictor.digest,
            },
        )


class ModelMetrics:
    """The uncertainty histograms and the router's counts of `trivium serve`, among Triton's own metrics.

    All instances of a model share the cells. A call here is a message to the server's process, some 30 microseconds.
    """

    def __init__(self, backend: Any, manifest: Manifest) -> None:
        labels = {"model": manifest.name, "version": manifest.version}

        def family(name: str, text: str, kind: str) -> Any:
            return backend.MetricFamily(name=name, description=text, kind=getattr(backend.MetricFamily, kind))

        self._labels = labels
        self._routed = family("trivium_routed_total", "Pictures answered, by what the router chose.", "COUNTER")
        self._entropy = family("trivium_predictive_entropy_nats", "Predictive entropy of each head.", "HISTOGRAM")
        self._information = family(
            "trivium_mutual_information_nats",
            "Mutual information of prediction and dropout mask, of each head.",
            "HISTOGRAM",
        )
        self._chosen = {head: self._routed.Metric(labels=labels | {"head": head}) for head in manifest.heads}
        self._entropies = [
            self._entropy.Metric(labels=labels | {"head": head}, buckets=ENTROPY) for head in manifest.heads
        ]
        self._informations = [
            self._information.Metric(labels=labels | {"head": head}, buckets=INFORMATION) for head in manifest.heads
        ]

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Count answered pictures."""
        for head, count in Counter(one.head for one in predictions).items():
            if head not in self._chosen:
                self._chosen[head] = self._routed.Metric(labels=self._labels | {"head": head})
            self._chosen[head].increment(count)
        for one in predictions:
            for cells, values in (
                (self._entropies, one.predictive_entropy),
                (self._informations, one.mutual_information),
            ):
                for cell, value in zip(cells, values.tolist(), strict=True):
                    cell.observe(value)


def column(predictions: Sequence[Prediction], name: str) -> NDArray[Any]:
    """One output of all predictions, batch first; text as objects of bytes, which is how Triton takes it."""
    values = [getattr(prediction, name) for prediction in predictions]
    if isinstance(values[0], np.ndarray):
        return np.stack(values)
    if isinstance(values[0], str):
        return np.array([value.encode() for value in values], dtype=np.object_)
    return np.array(values, SCALARS[type(values[0])])


def check_tensors(backend: Any) -> None:
    """See that an array comes back out of one of Triton's tensors.

    Raises: EngineError where it does not: a Python back end that was built before NumPy 2 misreads its arrays. Without
        an error it then takes every picture for black and answers OK with empty tensors.
    """
    array = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    tensor = backend.Tensor("probe", array)
    # as_numpy alone gives back the array it was made of
    if not np.array_equal(backend.Tensor.from_dlpack("probe", tensor.to_dlpack()).as_numpy(), array):
        raise EngineError(
            f"this tritonserver cannot read the arrays of NumPy {np.__version__}; "
            "run: pip install 'numpy<2' in the model's environment"
        )


def _parameters(parameters: dict[str, Any]) -> tuple[str | None, float | None, float | None]:
    """The request's router, coverage and max_risk; priority and timeout are Triton's own and do not come here."""
    for name, value in parameters.items():
        if name not in (known := ("router", *LEVELS)):
            raise InvalidRequest(
                f"unknown request parameter {name[:100]!r}; known: priority, timeout, {', '.join(known)}"
            )
        if name == "router" and not isinstance(value, str):
            raise InvalidRequest(f"parameter 'router' must be a string, got {type(value).__name__}")
    coverage, max_risk = (number(name, parameters[name]) if name in parameters else None for name in LEVELS)
    return parameters.get("router"), coverage, max_risk

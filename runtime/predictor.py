"""The predictor: the one way from a picture to an answer, for the server, the command line and calibration alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics

from .bundle import MANIFEST, Bundle, digest, open_bundle
from .engine import Backend
from .engines import EngineChoice, start_engine
from .errors import EngineError, TriviumError
from .preprocess import DEFAULT_LIMITS, Limits, decode
from .promises import Terms, abstentions, prediction_sets, shift_scores, terms
from .router import route


class Timings(NamedTuple):
    """Nanoseconds that a picture spent in each stage."""

    decode: int = 0
    queue: int = 0
    compute: int = 0
    route: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The answer to one picture."""

    probabilities: NDArray[np.float32]
    """[C]: of the routed head."""
    class_id: int
    label: str
    head: str
    """The head that answered, "mean", or "clean+combined"."""
    head_probabilities: NDArray[np.float32]
    """[K, C]."""
    predictive_entropy: NDArray[np.float32]
    """[K], nats."""
    mutual_information: NDArray[np.float32]
    """[K], nats."""
    divergence: NDArray[np.float32]
    """[K, K], nats: KL of the row's head from the column's."""
    energy: NDArray[np.float32]
    """[K]."""
    timings: Timings
    prediction_set: NDArray[np.bool_] | None = field(default=None, kw_only=True)
    """[C]: the classes of which the right one is one, as often as the coverage says. None, as the next two, where the
    bundle has no guarantees, or where it was not asked for."""
    abstain: bool | None = field(default=None, kw_only=True)
    """Whether the answer is too unsure for the risk."""
    shift_score: float | None = field(default=None, kw_only=True)
    """Probability, float32, that the picture is unlike the clean calibration pictures; it says nothing about error."""


class Predictor:
    """A bundle with a running engine. Its methods may be called from any number of threads at once."""

    def __init__(self, bundle: Bundle, engine: Backend, limits: Limits = DEFAULT_LIMITS, *, fallback: str = "") -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.engine = engine
        self.limits = limits
        self.digest = digest(bundle.path / MANIFEST)
        """SHA-256 of manifest.json, hexadecimal, and so of all that the bundle holds."""
        self.fallback = fallback
        """Why the engine is not the one that was asked for, in one word, or ""."""
        self.seconds = float("inf")
        """Of a picture in the engine, where that was measured."""

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        kernels: Literal["auto", "on", "off"] = "auto",
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int = 1,
        limits: Limits = DEFAULT_LIMITS,
        engine: EngineChoice = "onnx",
        cache: Path | None = None,
    ) -> Predictor:
        """Open and verify a bundle, start its engine, and repeat its golden answers.

        Raises: BundleError, EngineError, MissingExtra.
        """
        bundle = open_bundle(path)
        started, fallback = start_engine(
            bundle, engine=engine, kernels=kernels, device=device, threads=threads, cache=cache
        )
        return cls(bundle, started, limits, fallback=fallback)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """An encoded picture as the model's input, uint8 [H, W, 3].

        Raises: InvalidPicture.
        """
        return decode(data, self.manifest.preprocessing, self.limits)

    def decode_one(self, encoded: Sequence[bytes], index: int) -> tuple[NDArray[np.uint8], int]:
        """One of a request's encoded pictures as the model's input, and the nanoseconds that it took.

        Raises: InvalidPicture, that names the picture where there are several.
        """
        start = perf_counter_ns()
        try:
            image = self.decode(encoded[index])
        except TriviumError as error:
            if len(encoded) == 1:
                raise
            raise type(error)(f"picture {index}: {error}") from None
        return image, perf_counter_ns() - start

    def run_together(self, images: NDArray[np.uint8]) -> tuple[list[HeadStatistics], int]:
        """One run of the engine for pictures [N, H, W, 3]: the statistics of each (N = 1), its share of the time in ns.

        Raises: InvalidRequest for another shape; EngineError.
        """
        start = perf_counter_ns()
        statistics = self.engine.run(images)
        share = (perf_counter_ns() - start) // len(images)
        return [HeadStatistics(*(values[i : i + 1] for values in statistics)) for i in range(len(images))], share

    def infer(
        self,
        image: NDArray[np.uint8],
        router: str | None = None,
        asked: Terms | None = None,
        *,
        decode_ns: int = 0,
        queue_ns: int = 0,
    ) -> Prediction:
        """Answer one picture, uint8 [H, W, 3]. The time it took before comes back in the answer's timings.

        asked: of the bundle's guarantees, `promises.terms` of the same router; by default all, at its own levels.

        Raises: InvalidRequest for another shape or an unknown router; EngineError.
        """
        start = perf_counter_ns()
        statistics = self.engine.run(image[None])
        computed = perf_counter_ns()
        return self.answer(statistics, router, Timings(decode_ns, queue_ns, computed - start), asked)

    def answer(
        self, statistics: HeadStatistics, router: str | None, timings: Timings, asked: Terms | None = None
    ) -> Prediction:
        """Route the statistics of one picture (N = 1); `timings.route` is measured here.

        Raises: InvalidRequest for an unknown router; EngineError where the statistics are not numbers.
        """
        start = perf_counter_ns()
        routed = route(statistics, self.manifest, router)
        class_id = int(routed.class_id[0])
        if class_id < 0:
            raise EngineError("the model's answer to this picture is not a number")
        prediction_set: NDArray[np.bool_] | None = None
        abstain: bool | None = None
        shift_score: float | None = None
        if (guarantees := self.manifest.guarantees) is not None and (asked := asked or terms(self.manifest, router)):
            if "prediction_set" in asked.outputs:
                prediction_set = prediction_sets(routed, guarantees, asked.quantile)[0]
            if "abstain" in asked.outputs:
                abstain = bool(abstentions(routed, statistics, self.manifest, asked)[0])
            if "shift_score" in asked.outputs:
                shift_score = shift_scores(statistics, guarantees, self.manifest.heads).item(0)
        return Prediction(
            probabilities=routed.probabilities[0],
            class_id=class_id,
            label=self.manifest.classes[class_id],
            head=routed.head[0],
            head_probabilities=statistics.probabilities[0],
            predictive_entropy=statistics.predictive_entropy[0],
            mutual_information=statistics.mutual_information[0],
            divergence=statistics.divergence[0],
            energy=statistics.energy[0],
            timings=Timings(timings.decode, timings.queue, timings.compute, perf_counter_ns() - start),
            prediction_set=prediction_set,
            abstain=abstain,
            shift_score=shift_score,
        )

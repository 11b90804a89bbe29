"""What guarantees add to a request's CPU time: python -m tests.bench.guarantees, build/bench/guarantees.json.

EfficientNet-Lite0 with random weights, and the demo's student where `make demo` left one; one picture a request, all
outputs. The request is all that a server does from message to message but the transport, which would only make the
share smaller. The engine's time is measured on its own, since its noise is larger than what is looked for; requests
with and without guarantees, on the statistics that it gave, take turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Bundle, Manifest
from trivium.runtime.predictor import Predictor
from trivium.runtime.wire import read_request, write_response

from .serving import pictures

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build/bench/guarantees.json"
DEMO = ROOT / "build/demo/bundle"
ROUNDS, REPEATS = 60, 20
CONFIDENCES = ("max_probability", "predictive_entropy", "mutual_information")
LIMIT = 0.02
"""Of a request, for the defaults of `trivium calibrate`: LAC, ranked by the maximum probability."""


@dataclass(frozen=True)
class Row:
    model: str
    score: str
    confidence: str
    request_us: float
    """Without guarantees."""
    added_us: float

    @property
    def share(self) -> float:
        return self.added_us / self.request_us


class Replay:
    """An engine that gives the answer it is told to."""

    device = "cpu"

    def __init__(self, answer: HeadStatistics) -> None:
        self.answer = answer

    def run(self, images: NDArray[np.uint8]) -> HeadStatistics:
        return self.answer


def main() -> None:
    bundle = OUT.parent / "bundle-lite0"
    if not bundle.is_dir():
        pictures.build("lite0", bundle)
    bundles = [bundle] + [DEMO] * DEMO.is_dir()
    rows = [row for bundle in bundles for row in measure(bundle)]
    print("us of CPU time, medians       request   added   share")
    for row in rows:
        name = f"{row.model}, {row.score}, {row.confidence}"
        print(f"{name:<45} {row.request_us:9.1f} {row.added_us:7.2f} {row.share:7.2%}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps([asdict(row) | {"share": row.share} for row in rows], indent=2) + "\n")
    print(OUT)
    worst = max(row.share for row in rows if (row.score, row.confidence) == ("lac", CONFIDENCES[0]))
    if worst > LIMIT:
        raise SystemExit(f"guarantees add {worst:.2%}, more than {LIMIT:.0%}")


def measure(bundle: Path) -> list[Row]:
    predictor = Predictor.load(bundle)
    plain = predictor.manifest.model_copy(update={"guarantees": None})
    image = pictures.picture(bundle).pixels
    answer = predictor.engine.run(image[None])
    engine = statistics.median(timed(lambda: predictor.engine.run(image[None]), 5) for _ in range(ROUNDS))
    message = service_pb2.ModelInferRequest(model_name=plain.name, raw_input_contents=[image.tobytes()])
    message.inputs.add(name="image", datatype="UINT8", shape=[1, *image.shape])
    rows = []
    for score in ("lac", "raps"):
        for confidence in CONFIDENCES:
            promising = plain.model_copy(update={"guarantees": guarantees(plain, score, confidence)})
            both = [request(predictor, manifest, answer, message) for manifest in (plain, promising)]
            times = [[timed(one, REPEATS) for one in both] for _ in range(ROUNDS)]
            without = statistics.median(one for one, _ in times)
            added = statistics.median(other - one for one, other in times)
            rows.append(Row(plain.name, score, confidence, 1e6 * (engine + without), 1e6 * added))
    return rows


def request(predictor: Predictor, manifest: Manifest, answer: HeadStatistics, message: Any) -> Callable[[], object]:
    """One request to a bundle of this manifest whose engine gives this answer."""
    replay = Predictor(Bundle(predictor.bundle.path, manifest), Replay(answer))  # type: ignore[arg-type]

    def handle() -> bytes:
        asked = read_request(message, manifest, 64)
        assert asked.images is not None
        prediction = replay.infer(asked.images[0], asked.router, asked.terms)
        response = write_response("", manifest, asked.outputs, [prediction], 0)
        return bytes(response.SerializeToString())

    return handle


def guarantees(manifest: Manifest, score: str, confidence: str) -> Any:
    """Thresholds that leave some classes out and some answers: they cost what real ones do."""
    from trivium.runtime.guarantees import Guarantees

    coverages = [round(0.8 + 0.01 * step, 2) for step in range(20)]
    risks = [0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
    quantiles = np.linspace(0.5, 0.95, len(coverages)).tolist()
    least: Sequence[float] = np.linspace(0.9, 0.1, len(risks)).tolist()
    row = {"lac": quantiles, "raps": quantiles, "confidence": confidence, "least": least}
    names = ("divergence", "mutual_information", "energy")
    return Guarantees.model_validate(
        {
            "mixture": {"clean": 0.5, "corrupted": 0.5},
            "pictures": 1000,
            "tuning_pictures": 333,
            "data": "none",
            "seed": 0,
            "date": "2026-01-01",
            "coverages": coverages,
            "coverage": 0.9,
            "score": score,
            "raps_penalty": 0.01,
            "raps_free_ranks": 2,
            "delta": 0.05,
            "risks": risks,
            "max_risk": 0.05,
            "routers": dict.fromkeys(manifest.routers(), row),
            "shift": {key: dict.fromkeys(names, 1.0) for key in ("weights", "center", "scale")} | {"intercept": 0.0},
            "drift": {
                "pictures": 1,
                "edges": {},
                "counts": {"class_id": [1] + [0] * (len(manifest.classes) - 1)},
                "head": manifest.heads[0],
            },
        }
    )


def timed(call: Callable[[], object], repeats: int) -> float:
    """Seconds of CPU time, of one call."""
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


if __name__ == "__main__":
    main()

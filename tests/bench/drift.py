"""The server's drift alarm on a bundle's own answers: python -m tests.bench.drift BUNDLE prints the table of DRIFT.md.

Every test picture is asked about once as it is and once under one of the 15 test corruptions. Streams are then drawn
from these answers, independently and with replacement, and so are the calibration pictures: the test pictures are the
population, of which calibration and stream are samples as of any other. (A stream drawn with replacement from some of
the pictures, against calibration pictures that are others, is not exchangeable with them: it repeats its few pictures
until the difference of two finite samples shows. The last row is such a stream.)
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from time import thread_time

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.drift import BLOCK, Drift
from trivium.runtime.predictor import Predictor
from trivium.train.data.pictures import load_pictures, parse_spec
from trivium.train.guarantees.drift_reference import drift_reference, watched
from trivium.train.guarantees.views import Views, even, look
from trivium.train.shifts.corruptions import TEST_CORRUPTIONS

TUNING, CALIBRATION = 1_250, 3_750
STREAM, SOON = 50_000, 2_000
WINDOW, RUN_LENGTH = 1_000, 10_000_000
"""The server's defaults."""
GIVE_UP = 20_000
ROUNDS = 10
QUIET = f"{STREAM:,} clean"
Rows = NDArray[np.intp]


class Answers:
    """To the same N pictures, clean and corrupted."""

    def __init__(self, predictor: Predictor, views: Views) -> None:
        manifest = predictor.manifest
        self.manifest = manifest
        self.clean = views.clean
        head = "clean" if "clean" in manifest.heads else manifest.heads[0]
        both = [watched(part, manifest, head) for part in (views.clean, views.statistics)]
        self.values = {name: np.stack([one[name] for one in both]) for name in both[0]}
        self.count = len(views)

    def watch(self, tuning: Rows, calibration: Rows) -> Drift:
        """A server's, whose calibration pictures are these."""
        parts = [HeadStatistics(*(column[rows] for column in self.clean)) for rows in (tuning, calibration)]
        return Drift(self.manifest, drift_reference(parts[0], parts[1], self.manifest), WINDOW, RUN_LENGTH)

    def until_alarm(self, drift: Drift, rows: Iterable[Rows], share: float, rng: np.random.Generator) -> int | None:
        """Pictures until the alarm, a share of them corrupted, or None."""
        before = drift.alarms
        for block, own in enumerate(rows, 1):
            kind = (rng.random(BLOCK) < share).astype(np.intp)
            drift.work({name: values[kind, own] for name, values in self.values.items()})
            if drift.alarms > before:
                return block * BLOCK
        return None


class Trial:
    """One seed: a watch on calibration pictures drawn with replacement, and streams of the same population."""

    def __init__(self, answers: Answers, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.answers = answers
        self.drift = answers.watch(self._draw(TUNING), self._draw(CALIBRATION))

    def until_alarm(self, pictures: int, share: float) -> int | None:
        rows = (self._draw(BLOCK) for _ in range(pictures // BLOCK))
        return self.answers.until_alarm(self.drift, rows, share, self.rng)

    def _draw(self, size: int) -> Rows:
        return self.rng.integers(0, self.answers.count, size)


def cost(answers: Answers, predictor: Predictor, images: NDArray[np.uint8]) -> tuple[float, float]:
    """Thread CPU microseconds a picture of the watch, and of the predictor itself; the least of some rounds each."""
    drift = Trial(answers, 0).drift
    predictions = [predictor.infer(image) for image in images]
    watching = answering = np.inf
    for _ in range(ROUNDS):
        start = thread_time()
        for prediction in predictions:
            drift.add(prediction)
        watching = min(watching, thread_time() - start)
        start = thread_time()
        for image in images:
            predictor.infer(image)
        answering = min(answering, thread_time() - start)
    return 1e6 * watching / len(images), 1e6 * answering / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.drift", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", default="fashion-mnist", help="its test split is asked about (default fashion-mnist)")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=int, help="pictures at most")
    arguments = parser.parse_args()

    predictor = Predictor.load(arguments.bundle)
    pictures = load_pictures(parse_spec(arguments.data), "test", predictor.manifest.preprocessing)
    mixture = even(dict.fromkeys(TEST_CORRUPTIONS, 1.0))
    views = look(predictor, pictures, mixture, limit=arguments.limit, shifted=False)
    answers = Answers(predictor, views)
    rest = answers.count - TUNING - CALIBRATION
    found: dict[str, list[int | None]] = defaultdict(list)
    for seed in range(arguments.seeds):
        for share in (0.2, 0.05):
            title = f"{100 * share:.0f} % corrupted"
            found[f"{title} from the start"].append(Trial(answers, seed).until_alarm(GIVE_UP, share))
            trial = Trial(answers, seed)
            quiet = trial.until_alarm(STREAM, 0)
            if share == 0.2:
                found[QUIET].append(quiet)
            found[f"{title} after {STREAM:,} clean"].append(trial.until_alarm(GIVE_UP, share))
        rng = np.random.default_rng(seed)
        tuning, calibration, other = np.split(rng.permutation(answers.count), [TUNING, TUNING + CALIBRATION])
        drift = answers.watch(tuning, calibration)
        once = (other[start : start + BLOCK] for start in range(0, rest - BLOCK + 1, BLOCK))
        found[f"{rest // BLOCK * BLOCK:,} clean, each picture once"].append(answers.until_alarm(drift, once, 0, rng))
        drift = answers.watch(tuning, calibration)
        again = (rng.choice(other, BLOCK) for _ in range(STREAM // BLOCK))
        title = f"{STREAM:,} clean, {rest:,} other pictures again and again"
        found[title].append(answers.until_alarm(drift, again, 0, rng))

    print(
        f"{predictor.manifest.name}: {answers.count:,} test pictures, {arguments.seeds} seeds; {CALIBRATION:,} drawn to"
    )
    print(f"calibrate, {TUNING:,} for the bins; run length {RUN_LENGTH:,}\n")
    print("| stream | alarms | pictures until the alarm |\n|---|---|---|")
    for title in sorted(found, key=[QUIET, *found].index):
        delays = [delay for delay in found[title] if delay is not None]
        told = f"median {np.median(delays):,.0f}, at most {max(delays):,}" if delays else ""
        soon = sum(delay <= SOON for delay in delays)
        told += f", within {SOON:,} in {soon}" if "corrupted" in title else ""
        print(f"| {title} | {len(delays)} of {len(found[title])} | {told} |")
    images = pictures.batch(np.arange(2 * BLOCK)).permute(0, 2, 3, 1).contiguous().numpy()
    watching, answering = cost(answers, predictor, images)
    print(f"\n{watching:.2f} CPU microseconds a picture; the predictor takes {answering:.0f}")


if __name__ == "__main__":
    main()

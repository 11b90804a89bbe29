"""Trials: calibrate again and again on part of a pool of pictures, and measure what was promised on the rest.

Two kinds of repetition. Splits: calibration pictures are drawn without replacement, the rest is the test part. Draws:
calibration pictures are drawn with replacement, so that they are independent and the pool itself is the population,
whose true risk is known: there, without any noise of a test, delta bounds how often a promise is broken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import GuardRule, Manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.guarantees import Confidence, Guarantees, RouterGuarantees, SetScore
from trivium.runtime.promises import certified_least, confidence
from trivium.runtime.router import Routed, route, shift_probability

from ..calibration.observe import CLEAN
from ..evaluation.metrics import auroc
from .calibrate import (
    CONFIDENCES,
    Settings,
    check_size,
    conformity,
    guarantees_of,
    thresholds_of,
    tuning_pictures,
    with_guard,
)
from .conformal import Floats, covered, least_pictures, set_sizes
from .harm import Flags, measure_harm
from .pool import Pool

SCORES: tuple[SetScore, ...] = ("lac", "raps")
SPLIT, DRAW = "split", "draw"
DIAGRAM_SPLITS = 10
"""Splits whose shift scores make the reliability diagram."""
Rows = NDArray[np.intp]


class Record:
    """Measurements by name, one a repetition; what a repetition does not have is NaN."""

    def __init__(self) -> None:
        self._values: dict[Hashable, list[float]] = defaultdict(list)

    def add(self, value: float | None, *key: Hashable) -> None:
        self._values[key].append(np.nan if value is None else float(value))

    def of(self, *key: Hashable) -> Floats:
        return np.array(self._values.get(key, []), np.float64)

    def mean(self, *key: Hashable) -> float | None:
        """Of the repetitions that have it."""
        values = self.of(*key)
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else None

    def rate(self, *key: Hashable) -> float:
        """Mean of flags; 0 without any."""
        return self.mean(*key) or 0.0


@dataclass(frozen=True)
class Answers:
    """What one router answers to N pictures."""

    labels: NDArray[np.int64]
    wrong: Flags
    scores: Mapping[SetScore, Floats]
    """Conformity, [N, C]."""
    confidence: Mapping[Confidence, Floats]

    def sets(self, score: SetScore, quantile: float, rows: Rows) -> tuple[float, float]:
        """(coverage, mean set size) on some of the pictures."""
        scores = self.scores[score][rows]
        return float(covered(scores, self.labels[rows], quantile).mean()), float(set_sizes(scores, quantile).mean())

    def selective(self, own: RouterGuarantees, least: float, rows: Rows) -> tuple[float, float]:
        """(share answered, error among the answers, 0 where there are none) on some of the pictures."""
        answered = self.confidence[own.confidence][rows] >= least
        return float(answered.mean()), float(self.wrong[rows][answered].mean()) if answered.any() else 0.0


def answers_of(
    router: str, manifest: Manifest, statistics: HeadStatistics, labels: NDArray[np.int64], settings: Settings
) -> Answers:
    """What a router answers to pictures of these statistics and labels."""
    routed: Routed = route(statistics, manifest, router)
    return Answers(
        labels,
        routed.class_id != labels,
        {score: conformity(routed, settings, score) for score in SCORES},
        {kind: confidence(routed, statistics, manifest, kind) for kind in CONFIDENCES},
    )


def either(which: Flags, yes: Answers, no: Answers) -> Answers:
    """The first router's answers where `which` [N], else the second's."""
    return Answers(
        yes.labels,
        np.where(which, yes.wrong, no.wrong),
        {name: np.where(which[:, None], scores, no.scores[name]) for name, scores in yes.scores.items()},
        {kind: np.where(which, values, no.confidence[kind]) for kind, values in yes.confidence.items()},
    )


class Trial(NamedTuple):
    """One calibration."""

    found: Guarantees
    guard: GuardRule | None
    shift: Floats
    """[N]: probability that a picture of the whole pool is shifted; empty without a guard."""


class Trials:
    """A pool of pictures on which calibration is repeated. `record` holds what was measured.

    Args:
        manifest: of a bundle; a guard and guarantees that it has play no part.
        share: of the pool that calibrates, tuning part included.

    Raises: ConfigError where the share is too few pictures for the highest coverage, or leaves none to test on.
    """

    def __init__(self, manifest: Manifest, pool: Pool, settings: Settings, share: float) -> None:
        self.manifest = with_guard(manifest, None)
        self.pool, self.settings, self.record = pool, settings, Record()
        self.count = len(pool.declared)
        self.used = round(share * self.count)
        self.tuning = tuning_pictures(self.used)
        check_size(self.used - self.tuning, settings)
        if self.used >= self.count:
            raise ConfigError(f"--share {share:g} of {self.count} pictures leaves none to test on")
        self.default = self.manifest.router.default
        self.labels, self.is_clean = pool.declared.labels, pool.declared.kind == CLEAN
        self.known = {name: self._answers(name, pool.declared.statistics) for name in self.manifest.routers()}
        both = {self.default, "clean"} & self.known.keys()
        self.unseen = {name: self._answers(name, pool.unseen) for name in sorted(both)}
        self.scored: list[tuple[NDArray[np.float64], Flags]] = []
        """Shift scores of the first splits, and whether the picture was shifted."""

    def run(self, splits: int, seed: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Repeat; progress is told (calibrations done, calibrations in all)."""
        for repetition in range(splits):
            # generators of its own: the same pictures whatever the number of repetitions
            rng = np.random.Generator(np.random.Philox([seed, repetition]))
            order = rng.permutation(self.count)
            self._split(self._calibrate(order), order)
            self._draw(self._calibrate(rng.integers(0, self.count, self.used)))
            if progress is not None:
                progress(repetition + 1, splits)

    def _answers(self, router: str, statistics: HeadStatistics) -> Answers:
        return answers_of(router, self.manifest, statistics, self.labels, self.settings)

    def _calibrate(self, order: Rows) -> Trial:
        declared = self.pool.declared
        tuning, calibration = declared.take(order[: self.tuning]), declared.take(order[self.tuning : self.used])
        found, guard = guarantees_of(self.manifest, tuning, calibration, self.settings)
        shift = np.empty(0) if guard is None else shift_probability(declared.statistics, guard, self.manifest.heads)
        return Trial(found, guard, shift)

    def _routers(self, trial: Trial) -> dict[str, Answers]:
        """The answers of every router, the trial's own guard among them."""
        if trial.guard is None:
            return self.known
        base = self.known[trial.guard.base]
        return self.known | {"guard": either(trial.shift > trial.guard.threshold, base, self.known["clean"])}

    def _split(self, trial: Trial, order: Rows) -> None:
        """Measure on the pictures that did not calibrate."""
        test, routers, add = order[self.used :], self._routers(trial), self.record.add
        for name, answers in routers.items():
            own = trial.found.routers[name]
            add(1 - answers.wrong[test].mean(), "accuracy", name)
            for kind in CONFIDENCES:
                add(own.confidence == kind, "chosen", name, kind)
                add(auroc(-answers.confidence[kind][test], answers.wrong[test]), "errors", name, kind)
            for score in SCORES:
                quantiles = own.lac if score == "lac" else own.raps
                for level, quantile in zip(trial.found.coverages, quantiles, strict=True):
                    coverage, size = answers.sets(score, quantile, test)
                    add(coverage, "coverage", name, score, level)
                    add(size, "size", name, score, level)
        self._risks(SPLIT, trial, routers, test)
        self._harm(SPLIT, trial, test)
        if trial.guard is not None:
            add(1 - routers["guard"].wrong[test].mean(), "harm", "accuracy")
        self._shift(trial.found, test)
        self._conditions(trial.found, order[: self.used], test)

    def _draw(self, trial: Trial) -> None:
        """Judge by the whole pool as the population."""
        everything = np.arange(self.count)
        self._risks(DRAW, trial, self._routers(trial), everything)
        self._harm(DRAW, trial, everything)

    def _risks(self, where: str, trial: Trial, routers: Mapping[str, Answers], rows: Rows) -> None:
        found = trial.found
        for name, answers in routers.items():
            own = found.routers[name]
            asked: list[tuple[Hashable, float | None]] = [(risk, risk) for risk in found.risks]
            if name == self.default:
                asked.append(("own", found.max_risk))
                self.record.add(found.max_risk, where, name, "own", "asked")
            for key, max_risk in asked:
                least = None if max_risk is None else certified_least(found, own, max_risk)
                answered, risk = (None, None) if least is None else answers.selective(own, least, rows)
                self.record.add(answered, where, name, key, "answered")
                self.record.add(risk, where, name, key, "risk")
                broken = risk is not None and max_risk is not None and risk > max_risk
                self.record.add(broken, where, name, key, "broken")

    def _harm(self, where: str, trial: Trial, rows: Rows) -> None:
        add, guard = self.record.add, trial.guard
        if "clean" not in self.known or self.default == "clean":
            return
        add(guard is not None, where, "harm", "offered")
        if guard is None:
            add(False, where, "harm", "broken")
            return
        shift = trial.shift[rows]
        clean_right, base_right = ~self.known["clean"].wrong[rows], ~self.known[guard.base].wrong[rows]
        harm = measure_harm(shift, clean_right, base_right, self.is_clean[rows], guard.threshold)
        add(harm.accuracy_loss, where, "harm", "accuracy_loss")
        add(harm.negative_flips, where, "harm", "negative_flips")
        add((clean_right & ~base_right).mean(), where, "harm", "base_flips")
        add((shift > guard.threshold).mean(), where, "harm", "moved")
        broken = harm.accuracy_loss > guard.accuracy_loss or harm.negative_flips > guard.negative_flips
        add(broken, where, "harm", "broken")

    def _shift(self, found: Guarantees, test: Rows) -> None:
        """How shift scores tell the test pictures as they are from the same ones shifted."""
        pool, add = self.pool, self.record.add
        assert pool.declared.shifted is not None
        clean, unseen, seen = (
            shift_probability(each, found.shift, self.manifest.heads)[test]
            for each in (pool.declared.clean, pool.unseen, pool.declared.shifted)
        )
        kinds = pool.unseen_kind[test]
        for name, scores in (("calibrated", seen), ("unseen", unseen)):
            add(_told(clean, scores), "shift", name)
        for kind in np.unique(kinds):
            add(_told(clean, unseen[kinds == kind]), "shift", "kind", str(kind))
        if len(self.scored) < DIAGRAM_SPLITS:
            both = np.concatenate([clean, unseen])
            self.scored.append((both, np.arange(len(both)) >= len(clean)))

    def _conditions(self, found: Guarantees, calibrating: Rows, test: Rows) -> None:
        """Promises asked to hold on other mixtures than they were calibrated on; of the default router, and of the
        clean head, which answers as the original does."""
        clean = self.is_clean
        tuning, calibration = calibrating[: self.tuning], calibrating[self.tuning :]
        parts = tuning[clean[tuning]], calibration[clean[calibration]]
        on_clean = [self.pool.declared.take(rows) for rows in parts]
        enough = len(parts[0]) > 0 and len(parts[1]) >= least_pictures(self.settings.coverages[-1])
        for router, unseen in self.unseen.items():
            known = self.known[router]
            asked = {
                "declared": (known, test),
                CLEAN: (known, test[clean[test]]),
                "shifted": (known, test[~clean[test]]),
                "unseen": (unseen, test),
            }
            calibrated = {"declared": found.routers[router]}
            if enough:
                calibrated[CLEAN] = thresholds_of(router, self.manifest, on_clean[0], on_clean[1], self.settings)
            for on, own in calibrated.items():
                quantiles = own.lac if self.settings.score == "lac" else own.raps
                least = None if found.max_risk is None else certified_least(found, own, found.max_risk)
                for about, (answers, rows) in asked.items():
                    if not len(rows):
                        continue
                    key = ("condition", router, on, about)
                    for level, quantile in zip(found.coverages, quantiles, strict=True):
                        coverage, size = answers.sets(self.settings.score, quantile, rows)
                        self.record.add(coverage, *key, "coverage", level)
                        self.record.add(size, *key, "size", level)
                    answered, risk = (None, None) if least is None else answers.selective(own, least, rows)
                    self.record.add(answered, *key, "answered")
                    self.record.add(risk, *key, "risk")


def _told(clean: Floats, shifted: Floats) -> float | None:
    """AUROC of shift scores."""
    scores = np.concatenate([clean, shifted])
    return auroc(scores, np.arange(len(scores)) >= len(clean))

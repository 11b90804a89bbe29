"""Abstention and the guard's harm: exact tails, promises kept over many draws, and degenerate calibration sets."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.stats import beta

from trivium.runtime.guarantees import Confidence
from trivium.train.guarantees.harm import betting_p, certify_guard, measure_harm
from trivium.train.guarantees.selective import certify, choose_confidence, count, tail

DELTA = 0.1
LEVELS = 20
ERROR = np.linspace(0.35, 0.0, LEVELS)
"""Of a population whose confidence takes LEVELS values, equally often: error probability at each."""
DRAWS = 1000


def noise(draws: int = DRAWS) -> float:
    """Three standard errors of a rate DELTA over that many draws."""
    return 3 * (DELTA * (1 - DELTA) / draws) ** 0.5


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    level = rng.integers(0, LEVELS, n)
    return level / LEVELS, rng.random(n) < ERROR[level]


def risk_from(threshold: float) -> float:
    return float(ERROR[np.arange(LEVELS) / LEVELS >= threshold].mean())


def test_the_binomial_tail_is_the_exact_sum() -> None:
    for events, trials, rate in ((0, 1, Fraction(1, 2)), (3, 40, Fraction(1, 10)), (40, 40, Fraction(1, 10))):
        exact = sum(comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(events + 1))
        assert tail(np.array(events), np.array(trials), float(rate)) == pytest.approx(float(exact), rel=1e-12)
    assert tail(np.array(0), np.array(0), 0.1) == 1


@pytest.mark.parametrize(("events", "trials"), [(0, 1), (0, 300), (7, 200), (199, 200), (1234, 7500)])
def test_the_tail_is_delta_at_the_clopper_pearson_bound(events: int, trials: int) -> None:
    upper = float(beta.ppf(1 - DELTA, events + 1, trials - events))
    assert tail(np.array(events), np.array(trials), upper) == pytest.approx(DELTA, rel=1e-9)
    below, above = (tail(np.array(events), np.array(trials), upper + step) for step in (-1e-4, 1e-4))
    assert above < DELTA < below


def test_count_includes_the_threshold_itself() -> None:
    wrong, answered = count(np.array([0.2, 0.9, 0.5, 0.5]), np.array([1, 0, 0, 1], bool), np.array([1.0, 0.5, 0.2]))
    assert wrong.tolist() == [0, 1, 2]
    assert answered.tolist() == [0, 3, 4]


@pytest.mark.parametrize("level", [5, 10])
def test_selective_risk_is_kept_with_probability_1_minus_delta(level: int) -> None:
    # a threshold that breaks the promise by a hair is where a test errs most often
    risk = 0.999 * risk_from(level / LEVELS)
    rng = np.random.default_rng(0)
    broken = given = 0
    for _ in range(DRAWS):
        threshold = certify(*draw(rng, 300), *draw(rng, 900), [risk], DELTA)[0]
        given += threshold is not None
        broken += threshold is not None and risk_from(threshold) > risk
    assert given > 0.8 * DRAWS
    # of use: the promise is neither broken too often nor bought with far too much caution
    assert 0.2 * DELTA < broken / DRAWS <= DELTA + noise()


def test_more_risk_answers_more() -> None:
    rng = np.random.default_rng(1)
    found = certify(*draw(rng, 500), *draw(rng, 3000), [0.04, 0.06, 0.1, 0.15, 0.3], DELTA)
    thresholds = [each for each in found if each is not None]
    assert thresholds == sorted(set(thresholds), reverse=True)
    assert len(thresholds) == 5


def test_without_errors_all_are_answered_and_with_errors_alone_none() -> None:
    confidence = np.linspace(0.1, 1, 200)
    right, wrong = np.zeros(200, bool), np.ones(200, bool)
    assert certify(confidence, right, confidence, right, [0.05], DELTA) == [0.1]
    assert certify(confidence, wrong, confidence, wrong, [0.05, 0.5], DELTA) == [None, None]


def test_a_constant_confidence_answers_all_or_nothing() -> None:
    flat, errors = np.full(400, 0.5), np.arange(400) % 20 == 0
    assert certify(flat, errors, flat, errors, [0.04, 0.1], DELTA) == [None, 0.5]


def test_few_pictures_promise_nothing() -> None:
    one, right = np.array([0.9]), np.array([False])
    assert certify(one, right, one, right, [0.5, 0.95], DELTA) == [None, 0.9]
    assert certify(np.empty(0), np.empty(0, bool), one, right, [0.95], DELTA) == [None]
    assert certify(one, right, np.empty(0), np.empty(0, bool), [0.95], DELTA) == [None]


def test_the_confidence_is_the_one_that_ranks_errors_best() -> None:
    errors = np.array([0, 0, 0, 1, 1], bool)
    better, worse = np.array([5.0, 4, 3, 2, 1]), np.array([1.0, 4, 3, 2, 5])
    candidates: dict[Confidence, np.ndarray] = {"predictive_entropy": better, "max_probability": worse}
    assert choose_confidence(candidates, errors) == "predictive_entropy"
    candidates = {"mutual_information": worse, "max_probability": better}
    assert choose_confidence(candidates, errors) == "max_probability"
    tied: dict[Confidence, np.ndarray] = {"predictive_entropy": better, "max_probability": better}
    assert choose_confidence(tied, errors) == "max_probability"
    assert choose_confidence(tied, np.zeros(5, bool)) == choose_confidence(tied, np.ones(5, bool)) == "max_probability"


def test_the_betting_test_is_valid_and_tighter_than_hoeffding_where_little_varies() -> None:
    rng = np.random.default_rng(2)
    for worse, better in ((0.02, 0.01), (0.3, 0.29), (0.01, 0.0), (0.5, 0.0)):
        u = rng.random((DRAWS, 300))
        differences = (u < worse).astype(np.int8) - (u > 1 - better)
        rejected = np.mean([betting_p(row, worse - better, DELTA) <= DELTA for row in differences])
        assert rejected <= DELTA + noise()
    quiet = (rng.random((100, 2000)) < 0.005).astype(np.int8)
    hoeffding = [np.exp(-2 * 2000 * (max(0.02 - row.mean(), 0) / 2) ** 2) for row in quiet]
    betting = [betting_p(row, 0.02, DELTA) for row in quiet]
    assert min(hoeffding) > 0.5
    assert np.mean(np.array(betting) <= 0.01) > 0.95


def test_the_betting_test_of_nothing_and_of_extremes() -> None:
    assert betting_p(np.empty(0), 0.01, DELTA) == 1
    assert betting_p(np.ones(1000), 0.5, DELTA) == 1
    assert betting_p(-np.ones(1000), 0.01, DELTA) < 1e-12
    few, many = (betting_p(np.zeros(n), 0.01, DELTA) for n in (100, 1000))
    assert many < DELTA < few


def guard_case(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Clean pictures lose and shifted ones win by leaving the clean head; ten values of the shift's probability."""
    is_clean = rng.random(n) < 0.5
    shift = np.clip(rng.integers(0, 10, n) + np.where(is_clean, -2, 2), 0, 9) / 10
    u = rng.random(n)
    clean_right = u < 0.9
    base_right = np.where(is_clean, (u < 0.86) | (u > 0.99), u > 0.02)
    return {"shift": shift, "clean_right": clean_right, "base_right": base_right, "is_clean": is_clean}


def test_harm_is_kept_with_probability_1_minus_delta() -> None:
    rng = np.random.default_rng(3)
    world = guard_case(rng, 400_000)
    thresholds = [1.0, *(t / 10 + 0.05 for t in range(9, -2, -1))]
    true = {t: measure_harm(**world, threshold=t) for t in thresholds}
    broken, moved = 0, 0
    for _ in range(1000):
        found = certify_guard(
            **guard_case(rng, 1500), accuracy_loss=0.012, negative_flips=0.016, delta=DELTA, thresholds=thresholds
        )
        assert found is not None
        moved += found < 0.9
        broken += true[found].accuracy_loss > 0.012 or true[found].negative_flips > 0.016
    assert moved > 500
    assert broken / 1000 <= DELTA + noise(1000)


def test_either_harm_stops_the_sequence() -> None:
    case = guard_case(np.random.default_rng(4), 4000)
    thresholds = [1.0, 0.75, 0.55, 0.35, 0.15, 0.0]

    def found(accuracy_loss: float, negative_flips: float) -> float | None:
        return certify_guard(
            **case, accuracy_loss=accuracy_loss, negative_flips=negative_flips, delta=DELTA, thresholds=thresholds
        )

    assert found(0.5, 0.5) == 0.0
    for strict in (found(0.01, 0.5), found(0.5, 0.01)):
        assert strict is not None
        assert 0 < strict < 1
    # too few flips to certify so little even where none is made
    assert found(0.5, 1e-6) is None
    no_clean = case | {"is_clean": np.zeros(4000, bool)}
    assert certify_guard(**no_clean, accuracy_loss=0.5, negative_flips=0.5, delta=DELTA, thresholds=[1.0]) is None


def test_harm_is_measured_on_the_right_pictures() -> None:
    yes, no = True, False
    case = {
        "shift": np.array([0.9, 0.9, 0.1, 0.9]),
        "clean_right": np.array([yes, yes, yes, no]),
        "base_right": np.array([no, no, no, yes]),
        "is_clean": np.array([yes, no, yes, yes]),
    }
    assert measure_harm(**case, threshold=0.5) == (0.0, 0.5)
    assert measure_harm(**case, threshold=0.0) == pytest.approx((1 / 3, 0.75))
    assert measure_harm(**case, threshold=1.0) == (0.0, 0.0)

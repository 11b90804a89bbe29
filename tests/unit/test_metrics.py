"""Measures against values computed by hand, and against their definitions on random answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.train.evaluation import metrics
from trivium.train.shifts.corruptions import TEST_CORRUPTIONS


def random_answers(n: int = 400, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(classes, 0.4), n), generator.integers(0, classes, n)


def test_calibration_error_by_hand() -> None:
    # two pictures at .9, one right: gap .4; two at .6, both right: gap .4; one at .5, wrong: gap .5
    p = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.5, 0.5]]
    diagram = metrics.reliability(np.max(p, 1), [True, False, True, True, False], bins=10)
    assert diagram.counts.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 2, 0]
    assert metrics.calibration_error(diagram) == pytest.approx((2 * 0.4 + 2 * 0.4 + 1 * 0.5) / 5)
    assert np.isnan(diagram.accuracy[0])


def test_a_perfect_and_sure_classifier_has_no_calibration_error() -> None:
    assert metrics.calibration_error(metrics.reliability(np.ones(4), np.ones(4, bool))) == 0.0
    assert metrics.calibration_error(metrics.reliability(np.ones(4), np.zeros(4, bool))) == 1.0


def test_the_mean_corruption_error_of_alexnet_is_100() -> None:
    assert len(metrics.ALEXNET) == 15
    assert set(metrics.ALEXNET) == set(TEST_CORRUPTIONS)
    assert metrics.mean_corruption_error(metrics.ALEXNET, metrics.ALEXNET) == pytest.approx(100)


def test_the_mean_corruption_error_weighs_corruptions_by_their_difficulty() -> None:
    yardstick = {"fog": 0.8, "snow": 0.2, "frost": 0.5}
    assert metrics.mean_corruption_error({"fog": 0.4, "snow": 0.3}, yardstick) == pytest.approx(100 * (0.5 + 1.5) / 2)
    assert metrics.mean_corruption_error({"fog": 0.4}, {"fog": 0.0}) is None
    assert metrics.mean_corruption_error({}, yardstick) is None


def test_brier_and_likelihood_by_hand() -> None:
    p = [[0.8, 0.2, 0.0], [0.1, 0.1, 0.8]]
    assert metrics.squared_error(p, [0, 1]).mean() == pytest.approx(((0.04 + 0.04) + (0.01 + 0.81 + 0.64)) / 2)
    assert metrics.log_loss(p, [0, 1]).mean() == pytest.approx(-(np.log(0.8) + np.log(0.1)) / 2)


def test_likelihood_of_an_impossible_label_is_finite() -> None:
    assert metrics.log_loss([[1.0, 0.0]], [1])[0] == pytest.approx(-np.log(1e-30))


def test_brier_is_the_squared_distance_to_the_label() -> None:
    p, labels = random_answers()
    assert metrics.squared_error(p, labels) == pytest.approx(((p - np.eye(5)[labels]) ** 2).sum(1))


def test_auroc_by_hand_and_where_it_is_undefined() -> None:
    assert metrics.auroc([0.1, 0.2, 0.2, 0.9], [False, True, False, True]) == pytest.approx(3.5 / 4)
    assert metrics.auroc([0.1, 0.2], [True, True]) is None
    assert metrics.auroc([0.1, 0.2], [False, False]) is None


def test_risk_coverage_by_hand() -> None:
    curve = metrics.risk_coverage([0.9, 0.2, 0.8, 0.5], [True, False, False, True])
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert metrics.accuracy_at_coverage([0.9, 0.2, 0.8, 0.5], [True, False, False, True], 0.75) == pytest.approx(2 / 3)


def test_full_coverage_is_plain_accuracy_and_80_percent_counts_whole_pictures() -> None:
    confidence, correct = np.arange(10.0), np.arange(10) >= 2
    assert metrics.accuracy_at_coverage(confidence, correct, 1.0) == pytest.approx(0.8)
    assert metrics.accuracy_at_coverage(confidence, correct) == 1.0


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    difference = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 2000, p=[0.05, 0.85, 0.10])
    interval = metrics.paired_bootstrap(difference)
    half = 1.96 * difference.std() / np.sqrt(len(difference))
    assert interval.mean == difference.mean()
    assert interval.low == pytest.approx(difference.mean() - half, abs=half * 0.1)
    assert interval.high == pytest.approx(difference.mean() + half, abs=half * 0.1)


def test_bootstrap_is_deterministic_and_exact_where_nothing_differs() -> None:
    difference = np.random.default_rng(4).normal(size=100)
    assert metrics.paired_bootstrap(difference, seed=5) == metrics.paired_bootstrap(difference, seed=5)
    assert metrics.paired_bootstrap(difference, seed=5) != metrics.paired_bootstrap(difference, seed=6)
    assert metrics.paired_bootstrap(np.zeros(50)) == (0.0, 0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 2**31))
def test_measures_stay_in_their_ranges(n: int, classes: int, seed: int) -> None:
    p, labels = random_answers(n, classes, seed)
    correct = p.argmax(1) == labels
    diagram = metrics.reliability(p.max(1), correct)
    assert diagram.counts.sum() == n
    assert 0 <= metrics.calibration_error(diagram) <= 1
    errors = metrics.squared_error(p, labels)
    assert errors.min() >= 0
    assert errors.max() <= 2
    assert metrics.risk_coverage(p.max(1), correct).risk[-1] == pytest.approx(1 - correct.mean())

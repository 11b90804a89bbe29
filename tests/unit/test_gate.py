"""The learned gate: fits find what was planted, unseen kinds stay unseen, and controls get the credit they earn."""

from collections.abc import Sequence

import numpy as np
import pytest

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Dropout, Preprocessing, RouterSettings
from trivium.runtime.router import gate_features, gate_scores, route
from trivium.train.calibration.comparison import Candidate, choose_router, compare_routers, provisional
from trivium.train.calibration.gate import ALL, answer_unseen, fit_gate, learn_gate, scores_of, with_gate
from trivium.train.calibration.observe import Observations
from trivium.train.evaluation.metrics import Interval

HEADS = ["clean", "robust"]
KINDS = ("one", "two", "three")
MANIFEST = provisional(
    list("abcd"),
    HEADS,
    Preprocessing(height=8, width=8, mean=(0, 0, 0), std=(1, 1, 1)),
    Dropout(rate=0.5, passes=8, seed=1),
    RouterSettings(default="clean"),
)


def observations(
    right: np.ndarray, confidence: np.ndarray, kind: Sequence[str], picture: np.ndarray, information: float = 0.1
) -> Observations:
    """Answers of two heads that are right and sure as told, [N, 2] both; the second class is answered where wrong."""
    n = len(right)
    p = np.repeat((1 - confidence)[..., None] / 3, 4, axis=2)
    np.put_along_axis(p, np.where(right, 0, 1)[..., None], confidence[..., None], 2)
    entropy = -(p * np.log(p)).sum(-1)
    cross = -np.einsum("nic,njc->nij", p, np.log(p))
    divergence = np.maximum(cross - entropy[:, :, None], 0)
    level = np.full((n, 2), information)
    statistics = HeadStatistics(p, entropy, level, divergence, -level)
    labels = np.zeros(n, np.int64)
    return Observations(statistics, labels, None, np.array(kind), picture)


def rivals(n: int = 600, seed: int = 0) -> Observations:
    """Each head is right as often as it is sure, whatever the other is: only comparing them tells who is right."""
    generator = np.random.default_rng(seed)
    confidence = generator.uniform(0.3, 0.98, (2 * n, 2))
    right = generator.random((2 * n, 2)) < confidence
    kinds = np.array(KINDS)[np.arange(n) % 3]
    return observations(right, confidence, [*["clean"] * n, *kinds], np.tile(np.arange(n), 2))


def specialists(n: int = 600, seed: int = 0) -> Observations:
    """The clean head is right and sure on clean views, else wrong and unsure; the robust one always looks the same."""
    generator = np.random.default_rng(seed)
    shifted = np.arange(2 * n) >= n
    share = np.stack([np.where(shifted, 0.2, 0.95), np.full(2 * n, 0.7)], 1)
    right = generator.random((2 * n, 2)) < share
    confidence = np.stack([np.where(shifted, 0.4, 0.9) + generator.uniform(-0.1, 0.04, 2 * n), np.full(2 * n, 0.95)], 1)
    kinds = np.array(KINDS)[np.arange(n) % 3]
    return observations(right, confidence, [*["clean"] * n, *kinds], np.tile(np.arange(n), 2))


def accuracy(observed: Observations, answers: np.ndarray) -> float:
    return float((answers == observed.labels).mean())


def test_a_gate_sends_pictures_to_the_surer_of_two_rivals() -> None:
    fit, judged = rivals(), rivals(seed=1)
    found = with_gate(MANIFEST, fit_gate(fit, HEADS, HEADS))
    surer = judged.statistics.predictive_entropy.argmin(1)
    chosen = np.array([HEADS.index(head) for head in route(judged.statistics, found, "gate").head])
    assert (chosen == surer).mean() > 0.93
    gain = accuracy(judged, route(judged.statistics, found, "gate").class_id)
    assert gain > max(accuracy(judged, route(judged.statistics, found, head).class_id) for head in HEADS) + 0.1


def test_scores_are_log_odds_of_being_right() -> None:
    observed = rivals(4000)
    rule = fit_gate(observed, HEADS, HEADS)
    chance = 1 / (1 + np.exp(-gate_scores(observed.statistics, rule, HEADS)))
    right = observed.statistics.probabilities.argmax(2) == 0
    for k in range(2):
        for low in (0.3, 0.5, 0.7, 0.9):
            rows = (chance[:, k] >= low) & (chance[:, k] < low + 0.1)
            assert right[rows, k].mean() == pytest.approx(chance[rows, k].mean(), abs=0.06)


def test_features_are_standardised_over_the_declared_mixture() -> None:
    observed = specialists()
    rule = fit_gate(observed, HEADS, HEADS, clean_share=0.8)
    values = gate_features(observed.statistics, scores_of(HEADS), HEADS)
    mean = 0.8 * values[observed.clean].mean(0) + 0.2 * values[~observed.clean].mean(0)
    assert [feature.center for feature in rule.features] == pytest.approx(mean.tolist())
    assert [(feature.statistic, feature.heads) for feature in rule.features] == scores_of(HEADS)
    # what never changed here (mutual information, and all of the robust head) is not magnified where it does
    still = [feature for feature in rule.features if feature.heads == ["robust"]]
    assert {feature.scale for feature in still} == {1.0}
    assert max(abs(weight) for feature in still for weight in feature.weights.values()) < 1e-6


def test_a_head_that_is_always_right_needs_no_scores() -> None:
    observed = rivals(50)
    observed.statistics.probabilities[:, 1] = np.eye(4)[0]
    rule = fit_gate(observed, HEADS, HEADS)
    assert rule.intercept["robust"] == pytest.approx(np.log(100.5 / 0.5))
    assert all(feature.weights["robust"] == 0 for feature in rule.features)
    assert any(feature.weights["clean"] != 0 for feature in rule.features)


def test_a_kind_is_answered_by_a_gate_that_never_saw_it() -> None:
    fit, judged = rivals(), rivals(seed=1)
    answers = answer_unseen(fit, judged, MANIFEST, HEADS)
    without = with_gate(MANIFEST, fit_gate(fit.take(fit.kind != "two"), HEADS, HEADS))
    rows = np.isin(judged.picture, judged.picture[judged.kind == "two"])
    assert rows.sum() == 400
    np.testing.assert_array_equal(answers[rows], route(judged.take(rows).statistics, without, "gate").class_id)
    # in the pictures of one kind the surer head lies: whoever sees that kind knows, whoever does not is misled
    wrong = fit.statistics.probabilities.copy()
    lies = np.flatnonzero(fit.kind == "two")
    wrong[lies] = np.roll(wrong[lies], 1, axis=2)
    liar = Observations(fit.statistics._replace(probabilities=wrong), fit.labels, None, fit.kind, fit.picture)
    np.testing.assert_array_equal(answer_unseen(liar, judged, MANIFEST, HEADS)[rows], answers[rows])
    assert (answer_unseen(liar, judged, MANIFEST, HEADS)[~rows] != answers[~rows]).any()


def test_all_heads_are_looked_at_where_that_beats_each_alone() -> None:
    gate = learn_gate(rivals(), rivals(seed=1), MANIFEST)
    assert set(gate.answers) == {"gate", "gate on clean alone", "gate on robust alone"}
    assert {head for feature in gate.rule.features for head in feature.heads} == set(HEADS)


def test_one_head_is_looked_at_where_the_others_add_nothing() -> None:
    fit, judged = specialists(), specialists(seed=1)
    gate = learn_gate(fit, judged, MANIFEST)
    assert set(gate.answers) == {"gate", ALL, "gate on robust alone"}
    assert {head for feature in gate.rule.features for head in feature.heads} == {"clean"}
    null, rows = compare_routers(judged, with_gate(MANIFEST, gate.rule), learned=gate.answers)
    chosen, why = choose_router(null, rows)
    assert chosen == "gate"
    assert "more accurate on the mixture than the" in why


def test_rows_of_what_was_learned_are_those_of_unseen_kinds() -> None:
    fit, judged = specialists(), specialists(seed=1)
    gate = learn_gate(fit, judged, MANIFEST)
    _, rows = compare_routers(judged, with_gate(MANIFEST, gate.rule), learned=gate.answers)
    by_name = {row.router: row for row in rows}
    for name, answers in gate.answers.items():
        assert by_name[name].accuracy == pytest.approx(accuracy(judged, answers))
        assert by_name[name].control == (name != "gate")
    assert by_name["gate"].beats_heads
    assert not by_name["gate on robust alone"].beats_heads
    assert not by_name["clean"].control


def candidate(name: str, accuracy: float, difference: tuple[float, float, float]) -> Candidate:
    """With significantly fewer flips than the null."""
    return Candidate(name, accuracy, 0.9, 0.8, Interval(*difference), 0.02, Interval(-0.01, -0.02, -0.005))


def test_what_speaks_for_a_gate_and_what_does_not() -> None:
    null = Candidate("combined", 0.85, 0.9, 0.8, Interval(0, 0, 0), 0.03, Interval(0, 0, 0))
    better = candidate("gate", 0.87, (0.02, 0.01, 0.03))
    assert choose_router("combined", [null, better])[0] == "gate"
    # it beats the null head but not surely every other one
    assert choose_router("combined", [null, better._replace(beats_heads=False)])[0] == "combined"
    # fewer flips at equal accuracy
    equal = candidate("gate", 0.85, (0.0, -0.001, 0.001))._replace(beats_heads=False)
    assert choose_router("combined", [null, equal])[0] == "combined"
    # a better rule that is not learned
    assert choose_router("combined", [null, better, candidate("mean", 0.88, (0.03, 0.02, 0.04))])[0] == "mean"
    # controls are no routers
    control = candidate("gate on clean alone", 0.9, (0.05, 0.04, 0.06))._replace(control=True)
    assert choose_router("combined", [null, control])[0] == "combined"

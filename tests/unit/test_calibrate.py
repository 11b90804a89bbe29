"""Calibration: fits recover what was planted, and the choice of a router follows its rule in every direction."""

from collections.abc import Sequence

import numpy as np
import pytest

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Dropout, Preprocessing
from trivium.runtime.router import route, shift_probability, symmetric_divergence
from trivium.train.calibration import calibrate, comparison
from trivium.train.calibration.comparison import Candidate, choose_router, compare_routers, provisional
from trivium.train.calibration.observe import Observations
from trivium.train.evaluation.metrics import Interval
from trivium.train.sections import CalibrationSpec

HEADS = ["clean", "robust", "combined"]
PREPROCESSING = Preprocessing(height=28, width=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DROPOUT = Dropout(rate=0.5, passes=8, seed=1)


def statistics_of(probabilities: np.ndarray, information: np.ndarray, energy: np.ndarray) -> HeadStatistics:
    p = np.maximum(probabilities, 1e-9)
    log_p = np.log(p)
    entropy = -(p * log_p).sum(-1)
    divergence = -entropy[:, :, None] - np.einsum("bic,bjc->bij", p, log_p)
    return HeadStatistics(p, entropy, information, np.maximum(divergence, 0), energy)


def answers(right: np.ndarray, labels: np.ndarray, confidence: float = 0.8, classes: int = 4) -> np.ndarray:
    """Probabilities [N, C] whose largest is at the label where `right`, else at the next class."""
    p = np.full((len(labels), classes), (1 - confidence) / (classes - 1))
    p[np.arange(len(labels)), np.where(right, labels, (labels + 1) % classes)] = confidence
    return p


def observations(
    accuracy: dict[str, tuple[float, float]], original: tuple[float, float] | None = None, n: int = 600, seed: int = 0
) -> Observations:
    """n clean and n corrupted views with (clean, corrupted) accuracy a head; shifted views look shifted.

    All heads share one ranking of difficulty, so that a better head is right wherever a worse one is.
    """
    generator = np.random.default_rng(seed)
    labels = np.tile(generator.integers(0, 4, n), 2)
    shifted = np.arange(2 * n) >= n
    difficulty = generator.random(2 * n)
    heads = [answers(difficulty < np.where(shifted, *accuracy[h][::-1]), labels) for h in accuracy]
    noise = generator.normal(size=(2 * n, len(heads)))
    statistics = statistics_of(
        np.stack(heads, 1), np.exp(noise * 0.3 - 3 + 2 * shifted[:, None]), noise - 6 + 3 * shifted[:, None]
    )
    answered = None
    if original is not None:
        answered = answers(difficulty < np.where(shifted, *original[::-1]), labels).argmax(1)
    kind = np.where(shifted, "speckle_noise", "clean")
    return Observations(statistics, labels, answered, kind, np.tile(np.arange(n), 2))


def manifest(observed: Observations, heads: Sequence[str] = HEADS):
    return provisional(list("abcd"), heads, PREPROCESSING, DROPOUT, calibrate.fit_rules(observed, heads))


def candidate(name: str, accuracy: float, difference: tuple[float, float, float], flips: tuple | None) -> Candidate:
    own = None if flips is None else Interval(*flips)
    return Candidate(name, accuracy, 0.9, 0.8, Interval(*difference), None if flips is None else 0.02 + flips[0], own)


NULL = candidate("combined", 0.85, (0, 0, 0), (0, 0, 0))


@pytest.mark.parametrize("planted", [0.4, 1.0, 3.0])
def test_temperature_recovers_the_planted_one(planted: float) -> None:
    generator = np.random.default_rng(2)
    z = generator.normal(size=(4000, 1, 5)) * 2
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    labels = (p[:, 0].cumsum(1) > generator.random((4000, 1))).argmax(1)
    assert calibrate.fit_temperature((z * planted).astype(np.float32), labels) == pytest.approx(planted, rel=0.08)


def test_temperature_is_least_of_the_passes_mean() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(200, 6, 4)).astype(np.float32) * 4
    labels = generator.integers(0, 4, 200)

    def loss(tau: float) -> float:
        p = np.exp(logits / tau) / np.exp(logits / tau).sum(-1, keepdims=True)
        return -np.log(p.mean(1)[np.arange(200), labels]).mean()

    tau = calibrate.fit_temperature(logits, labels)
    grid = np.exp(np.linspace(-np.log(20), np.log(20), 200))
    assert loss(tau) <= min(map(loss, grid)) + 1e-5


def test_paper_rule_is_the_quantile_and_the_means_of_own_domains() -> None:
    observed = observations({"clean": (0.9, 0.5), "robust": (0.8, 0.8), "combined": (0.9, 0.8)})
    rule = calibrate.fit_paper(observed, HEADS)
    entropy = observed.statistics.predictive_entropy
    assert rule.entropy_scale["clean"] == pytest.approx(entropy[observed.clean, 0].mean())
    assert rule.entropy_scale["robust"] == pytest.approx(entropy[~observed.clean, 1].mean())
    assert rule.entropy_scale["combined"] == pytest.approx(entropy[:, 2].mean())
    divergence = symmetric_divergence(observed.take(observed.clean).statistics, 0, 1)
    assert (divergence <= rule.divergence_threshold).mean() >= 0.95


def test_paper_rule_by_the_recipe() -> None:
    observed = observations({"clean": (0.9, 0.5), "robust": (0.8, 0.8), "combined": (0.9, 0.8)})
    spec = CalibrationSpec(agreement=0.5, uncertainty="mutual_information", among="three")
    rule = calibrate.fit_paper(observed, HEADS, spec)
    information = observed.statistics.mutual_information
    assert rule.among == HEADS
    assert rule.entropy_scale["clean"] == pytest.approx(information[observed.clean, 0].mean())
    assert rule.entropy_scale["combined"] == pytest.approx(information[:, 2].mean())
    divergence = symmetric_divergence(observed.take(observed.clean).statistics, 0, 1)
    assert rule.divergence_threshold == pytest.approx(np.median(divergence))
    plain = calibrate.fit_paper(observed, HEADS, CalibrationSpec(normalised=False))
    assert set(plain.entropy_scale.values()) == {1.0}
    assert plain.uncertainty == "predictive_entropy"


def test_blend_rule_finds_the_shift_at_the_false_alarm_rate() -> None:
    accuracy = {"clean": (0.9, 0.5), "robust": (0.8, 0.8), "combined": (0.9, 0.8)}
    found = manifest(observations(accuracy))
    unseen = observations(accuracy, seed=7)
    assert found.router.blend is not None
    alarm = shift_probability(unseen.statistics, found.router.blend, HEADS) > found.router.blend.threshold
    assert alarm[unseen.clean].mean() == pytest.approx(0.10, abs=0.05)
    assert alarm[~unseen.clean].mean() > 0.9


def test_blend_rule_counts_clean_and_shifted_the_same_however_many() -> None:
    accuracy = {"clean": (0.9, 0.5), "robust": (0.8, 0.8), "combined": (0.9, 0.8)}
    observed = observations(accuracy)
    few = observed.take(observed.clean | (observed.picture < 60))
    rules = [calibrate.fit_blend(each, HEADS) for each in (observed, few)]
    found = [shift_probability(observed.statistics, rule, HEADS) for rule in rules]
    assert np.abs(found[0] - found[1]).mean() < 0.05


def test_mixture_weights_clean_and_shifted_as_declared() -> None:
    observed = observations({"clean": (1.0, 0.0), "robust": (0.5, 0.5), "combined": (0.6, 0.3)})
    uneven = observed.take(observed.clean | (observed.picture < 100))
    for share in (0.5, 0.9):
        _, rows = compare_routers(uneven, manifest(observed), share)
        by_name = {row.router: row for row in rows}
        assert by_name["clean"].accuracy == pytest.approx(share)
        combined = by_name["combined"]
        assert combined.accuracy == pytest.approx(
            share * combined.accuracy_clean + (1 - share) * combined.accuracy_shifted
        )
        assert sum(calibrate.mixture(uneven, share).values()) == pytest.approx(1)


def test_comparison_agrees_with_plain_counting() -> None:
    observed = observations({"clean": (0.9, 0.5), "robust": (0.7, 0.8), "combined": (0.85, 0.82)}, (0.92, 0.5))
    found = manifest(observed)
    best, rows = compare_routers(observed, found)
    assert best == "combined"
    assert observed.original is not None
    for row in rows:
        answer = route(observed.statistics, found, row.router).class_id
        right = answer == observed.labels
        assert row.accuracy == pytest.approx(right.mean())
        assert row.accuracy_clean == pytest.approx(right[observed.clean].mean())
        flips = (observed.original == observed.labels) & ~right
        assert row.negative_flips == pytest.approx(flips.mean())
        assert row.difference.low <= row.difference.mean <= row.difference.high
    assert next(row for row in rows if row.router == "combined").difference == (0, 0, 0)


def test_equal_heads_are_told_apart_by_negative_flips() -> None:
    labels = np.zeros(100, np.int64)
    original_right = np.arange(100) < 80
    heads = [answers(right, labels) for right in (np.arange(100) >= 20, original_right)]
    statistics = statistics_of(np.stack(heads, 1), np.ones((100, 2)), np.zeros((100, 2)))
    original = np.where(original_right, 0, 1)
    kind = np.where(np.arange(100) % 2, "clean", "saturate")
    observed = Observations(statistics, labels, original, kind, np.arange(100))
    best, rows = compare_routers(observed, manifest(observed, ["new", "same"]))
    assert best == "same"
    assert {row.router: row.negative_flips for row in rows}["same"] == 0


def test_a_router_that_beats_the_best_head_is_chosen() -> None:
    # each head knows what the other does not, and is unsure where it is wrong: least entropy is always right
    labels = np.zeros(400, np.int64)
    first = np.arange(400) % 2 == 0
    heads = [np.where(right[:, None], answers(right, labels, 0.9), answers(right, labels, 0.4))
             for right in (first, ~first)]  # fmt: skip
    statistics = statistics_of(np.stack(heads, 1), np.ones((400, 2)), np.zeros((400, 2)))
    kind = np.where(np.arange(400) < 200, "clean", "saturate")
    observed = Observations(statistics, labels, None, kind, np.arange(400))
    best, rows = compare_routers(observed, manifest(observed, ["one", "two"]))
    chosen, why = choose_router(best, rows)
    assert chosen in ("min_entropy", "mean")
    assert why.startswith(f"more accurate on the mixture than the {best} head: +50.00 points")


def test_always_combined_is_an_answer() -> None:
    observed = observations({"clean": (0.85, 0.5), "robust": (0.8, 0.8), "combined": (0.9, 0.85)}, (0.85, 0.5))
    chosen, why = choose_router(*compare_routers(observed, manifest(observed)))
    assert chosen == "combined"
    assert why.startswith("no other router is shown to be more accurate")


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (candidate("mean", 0.86, (0.01, 0.002, 0.02), (0.01, 0.005, 0.02)), "mean"),  # better beats flips
        (candidate("mean", 0.86, (0.01, -0.001, 0.02), (0, -0.01, 0.01)), "combined"),  # better, not surely
        (candidate("mean", 0.849, (-0.001, -0.004, 0.002), (-0.01, -0.02, -0.005)), "mean"),  # as good, steadier
        (candidate("mean", 0.849, (-0.001, -0.004, 0.002), (-0.01, -0.02, 0.001)), "combined"),  # not surely steadier
        (candidate("mean", 0.845, (-0.005, -0.008, -0.002), (-0.02, -0.03, -0.01)), "combined"),  # steadier but worse
        (candidate("mean", 0.86, (0.0, 0.0, 0.0), None), "combined"),  # no original to keep answers of
    ],
)
def test_rule_of_choice(other: Candidate, expected: str) -> None:
    chosen, why = choose_router("combined", [NULL, other])
    assert chosen == expected
    assert why


def test_a_possible_loss_on_one_kind_rules_a_router_out() -> None:
    better = candidate("mean", 0.86, (0.01, 0.002, 0.02), (0.0, -0.01, 0.01))
    assert choose_router("combined", [NULL, better])[0] == "mean"
    assert choose_router("combined", [NULL, better._replace(may_lose_on=("saturate",))])[0] == "combined"


def test_combined_is_the_null_unless_a_head_surely_beats_it() -> None:
    near = observations({"clean": (0.9, 0.5), "robust": (0.86, 0.86), "combined": (0.86, 0.86)})
    assert compare_routers(near, manifest(near))[0] == "combined"
    far = observations({"clean": (0.9, 0.5), "robust": (0.86, 0.86), "combined": (0.7, 0.7)})
    assert compare_routers(far, manifest(far))[0] == "robust"


def test_few_pictures_of_a_kind_exclude_no_loss_on_it() -> None:
    observed = observations({"clean": (0.9, 0.5), "robust": (0.7, 0.8), "combined": (0.85, 0.82)})
    rows = {row.router: row for row in compare_routers(observed, manifest(observed))[1]}
    assert rows["combined"].may_lose_on == ()
    assert "clean" not in rows["clean"].may_lose_on
    assert len(rows["clean"].may_lose_on) == len(set(observed.kind)) - 1


def test_of_several_the_fewest_flips_or_the_most_accurate() -> None:
    steady = [candidate(name, 0.85, (0, -0.004, 0.004), (-flips, -0.05, -0.001))
              for name, flips in (("mean", 0.01), ("blend", 0.015))]  # fmt: skip
    assert choose_router("combined", [NULL, *steady])[0] == "blend"
    better = [candidate("paper", 0.87, (0.02, 0.01, 0.03), (0, -0.01, 0.01))]
    assert choose_router("combined", [NULL, *steady, *better])[0] == "paper"


def test_a_single_head_needs_no_choice() -> None:
    observed = observations({"original": (0.9, 0.5)})
    best, rows = compare_routers(observed, manifest(observed, ["original"]))
    assert choose_router(best, rows) == ("original", "the only router of this model")


def test_rows_are_plain_json() -> None:
    row = candidate("mean", 0.85, (0, -0.004, 0.004), (-0.01, -0.05, -0.001)).row()
    assert all(isinstance(value, str | float | int) for value in row.values())
    assert comparison.points(Interval(-0.01, -0.05, 0.001)) == "-1.00 points, 95 % interval -5.00 to +0.10"

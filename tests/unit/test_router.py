"""Routers against values worked out by hand, their ties, and their indifference to the rest of the batch."""

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import THREE_HEADS, BlendRule, Manifest
from trivium.runtime.errors import InvalidRequest
from trivium.runtime.router import (
    FLOOR,
    RULES,
    gate_features,
    gate_scores,
    route,
    routers,
    shift_features,
    shift_probability,
    symmetric_divergence,
)

BLEND = {
    "weights": {"divergence": 2.0, "mutual_information": -1.0, "energy": 0.5},
    "center": {"divergence": math.log(0.1 + FLOOR), "mutual_information": math.log(0.2 + FLOOR), "energy": -3.0},
    "scale": {"divergence": 1.0, "mutual_information": 2.0, "energy": 4.0},
    "intercept": 0.0,
    "threshold": 0.5,
}
DETECTOR = BlendRule.model_validate(BLEND)
PAPER = {"divergence_threshold": 0.25, "entropy_scale": {"clean": 0.5, "robust": 1.0}}


def feature(statistic: str, heads: list[str], weights: list[float], center: float = 0.0, scale: float = 1.0) -> Any:
    named = dict(zip(("clean", "robust", "combined"), weights, strict=True))
    return {"statistic": statistic, "heads": heads, "center": center, "scale": scale, "weights": named}


GATE = {
    "intercept": {"clean": 0.5, "robust": 0.0, "combined": 0.25},
    "features": [
        feature("divergence", ["clean", "robust"], [-2.0, 1.0, 0.0], 0.5, 0.25),
        feature("predictive_entropy", ["robust"], [0.0, -1.0, 0.0], 0.5),
        feature("mutual_information", ["clean"], [-0.5, 0.0, 0.5], 0.25, 2.0),
        feature("energy", ["clean"], [-0.25, 0.125, 0.0], -3.0, 2.0),
        feature("max_probability", ["combined"], [0.0, 0.0, 2.0], 0.5),
    ],
}
GUARD = BLEND | {"base": "combined", "accuracy_loss": 0.01, "negative_flips": 0.01, "delta": 0.05}
BASES = ("robust", "combined", "mean", "min_entropy", "paper", "blend", "gate")


def manifest(heads: tuple[str, ...] = ("clean", "robust", "combined"), classes: int = 2, **router: Any) -> Manifest:
    return Manifest.model_validate(
        {
            "name": "m",
            "classes": [f"c{i}" for i in range(classes)],
            "heads": list(heads),
            "preprocessing": {"height": 1, "width": 1, "mean": (0, 0, 0), "std": (1, 1, 1)},
            "dropout": {"rate": 0.5, "passes": 2, "seed": 0},
            "router": {"default": heads[0]} | router,
            "files": [{"path": "model.onnx", "size": 0, "sha256": "0" * 64}],
        }
    )


def statistics(
    entropy: tuple[float, float, float] = (0.5, 0.6, 0.4),
    divergence: tuple[float, float] = (0.1, 0.1),
    information: float = 0.2,
    energy: float = -3.0,
) -> HeadStatistics:
    """One picture; divergence = (KL of clean from robust, KL of robust from clean)."""
    probabilities = np.array([[[0.75, 0.25], [0.25, 0.75], [0.375, 0.625]]], np.float32)
    kl = np.zeros((1, 3, 3), np.float32)
    kl[0, 0, 1], kl[0, 1, 0] = divergence
    return HeadStatistics(
        probabilities,
        np.array([entropy], np.float32),
        np.array([[information, 9, 9]], np.float32),
        kl,
        np.array([[energy, 9, 9]], np.float32),
    )


def answer(stats: HeadStatistics, m: Manifest, router: str | None = None) -> tuple[str, int, list[float]]:
    routed = route(stats, m, router)
    assert routed.probabilities.dtype == np.float32
    assert routed.class_id.dtype == np.int64
    return routed.head[0], int(routed.class_id[0]), routed.probabilities[0].tolist()


def test_a_head_answers_by_its_name_and_the_default_without_one() -> None:
    m = manifest()
    assert answer(statistics(), m, "robust") == ("robust", 1, [0.25, 0.75])
    assert answer(statistics(), m) == ("clean", 0, [0.75, 0.25])


def test_mean() -> None:
    head, class_id, probabilities = answer(statistics(), manifest(), "mean")
    assert (head, class_id) == ("mean", 1)
    assert probabilities == pytest.approx([1.375 / 3, 1.625 / 3], abs=1e-7)


def test_min_entropy_and_its_ties() -> None:
    m = manifest()
    assert answer(statistics((0.5, 0.6, 0.4)), m, "min_entropy")[0] == "combined"
    assert answer(statistics((0.6, 0.5, 0.5)), m, "min_entropy")[0] == "robust"
    assert answer(statistics((0.5, 0.5, 0.5)), m, "min_entropy")[0] == "clean"


def test_paper() -> None:
    m = manifest(paper=PAPER)
    # (0.125 + 0.375) / 2 = 0.25 is not above the threshold: the heads agree
    assert answer(statistics(divergence=(0.125, 0.375)), m, "paper")[0] == "combined"
    # 0.5 / 0.5 = 1 > 0.9 / 1
    assert answer(statistics((0.5, 0.9, 0.1), (0.5, 0.5)), m, "paper")[0] == "robust"
    # 0.5 / 0.5 = 1 < 1.5 / 1
    assert answer(statistics((0.5, 1.5, 0.1), (0.5, 0.5)), m, "paper")[0] == "clean"
    # a tie is the clean head's
    assert answer(statistics((0.5, 1.0, 0.1), (0.5, 0.5)), m, "paper")[0] == "clean"


def test_paper_by_mutual_information_and_among_three() -> None:
    apart = (0.5, 0.5)
    m = manifest(paper=PAPER | {"uncertainty": "mutual_information"})
    # 0.2 / 0.5 < 9 / 1, then 6 / 0.5 > 9 / 1
    assert answer(statistics((0.5, 0.1, 0.1), apart, 0.2), m, "paper")[0] == "clean"
    assert answer(statistics((0.5, 0.1, 0.1), apart, 6.0), m, "paper")[0] == "robust"
    three = {"among": ["clean", "robust", "combined"], "entropy_scale": {"clean": 0.5, "robust": 1.0, "combined": 2.0}}
    m = manifest(paper=PAPER | three)
    assert answer(statistics((0.5, 0.9, 1.5), apart), m, "paper")[0] == "combined"
    assert answer(statistics((0.5, 0.9, 1.9), apart), m, "paper")[0] == "robust"
    assert answer(statistics((0.25, 0.5, 1.0), apart), m, "paper")[0] == "clean"
    assert answer(statistics((0.5, 0.5, 1.0), apart), m, "paper")[0] == "robust"


def test_shift_features_and_probability() -> None:
    stats = statistics(divergence=(0.1, 0.3), information=0.05, energy=-1.0)
    assert symmetric_divergence(stats, 0, 1) == pytest.approx([0.2])
    expected = [math.log(FLOOR + 0.2), math.log(FLOOR + 0.05), -1.0]
    assert shift_features(stats, ["clean", "robust", "combined"])[0] == pytest.approx(expected)
    score = (
        2 * (math.log(FLOOR + 0.2) - math.log(FLOOR + 0.1))
        - (math.log(FLOOR + 0.05) - math.log(FLOOR + 0.2)) / 2
        + 0.5 * (-1.0 + 3.0) / 4
    )
    assert shift_probability(stats, DETECTOR, THREE_HEADS) == pytest.approx([1 / (1 + math.exp(-score))])


def test_shift_features_find_the_heads_by_name() -> None:
    stats = statistics(divergence=(0.1, 0.3))
    turned = HeadStatistics(*(values[:, ::-1] for values in stats))._replace(divergence=stats.divergence[:, ::-1, ::-1])
    np.testing.assert_array_equal(
        shift_features(stats, ["clean", "robust", "combined"]), shift_features(turned, ["combined", "robust", "clean"])
    )


def test_blend() -> None:
    m = manifest(blend=BLEND)
    assert answer(statistics(divergence=(0.4, 0.4)), m, "blend") == ("combined", 1, [0.375, 0.625])
    assert answer(statistics(divergence=(0.01, 0.01)), m, "blend") == ("clean+combined", 0, [0.5625, 0.4375])


def test_blend_at_its_threshold_counts_as_clean() -> None:
    weightless = BLEND | {"weights": {}, "center": {}, "scale": {}}
    assert answer(statistics(), manifest(blend=weightless), "blend")[0] == "clean+combined"
    assert answer(statistics(), manifest(blend=weightless | {"threshold": 0.49}), "blend")[0] == "combined"


@pytest.mark.parametrize("intercept", [-1e308, 1e308])
def test_blend_does_not_overflow(intercept: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        detector = DETECTOR.model_copy(update={"intercept": intercept})
        probability = shift_probability(statistics(), detector, THREE_HEADS)
    assert probability == [float(intercept > 0)]


def test_gate_features() -> None:
    stats = statistics((0.25, 0.36, 0.49), (0.1, 0.3), 0.04, -1.5)
    kinds = [feature["statistic"] for feature in GATE["features"]]
    m = manifest(gate=GATE)
    assert m.router.gate is not None
    scores = [(feature.statistic, feature.heads) for feature in m.router.gate.features]
    found = dict(zip(kinds, gate_features(stats, scores, m.heads)[0].tolist(), strict=True))
    assert found == pytest.approx(
        {"divergence": math.sqrt(0.2), "predictive_entropy": 0.6, "mutual_information": 0.2, "energy": -1.5,
         "max_probability": 0.625}
    )  # fmt: skip


def test_gate() -> None:
    m = manifest(gate=GATE)
    assert m.router.gate is not None
    # roots of .25 and .25, .5 and .25: only the last two features are off their centers
    stats = statistics((9, 0.25, 9), (0.1, 0.4), 0.0625, -5.0)
    assert gate_scores(stats, m.router.gate, m.heads)[0].tolist() == pytest.approx([0.75, -0.125, 0.5])
    assert answer(stats, m, "gate") == ("clean", 0, [0.75, 0.25])
    # (1 - .5) / .25 = 2 takes 4 from the clean head and gives 2 to the robust one
    stats = statistics((9, 0.25, 9), (1.0, 1.0), 0.0625, -5.0)
    assert gate_scores(stats, m.router.gate, m.heads)[0].tolist() == pytest.approx([-3.25, 1.875, 0.5])
    assert answer(stats, m, "gate") == ("robust", 1, [0.25, 0.75])


def test_gate_finds_heads_by_name_and_answers_by_those_with_an_intercept_alone() -> None:
    two = {"intercept": {"combined": 0.0, "clean": 0.0}, "features": [
        {"statistic": "energy", "heads": ["robust"], "center": 0.0, "scale": 1.0,
         "weights": {"clean": 1.0, "combined": -1.0}}]}  # fmt: skip
    m = manifest(gate=two)
    for energy, head in ((1.0, "clean"), (-1.0, "combined"), (0.0, "clean")):
        stats = statistics()
        stats.energy[0, 1] = energy
        assert answer(stats, m, "gate")[0] == head
    turned = manifest(("combined", "robust", "clean"), gate=two)
    assert turned.router.gate is not None
    assert gate_scores(statistics(), turned.router.gate, turned.heads).tolist() == [[-9.0, 9.0]]


def test_gate_with_scores_beyond_numbers() -> None:
    huge = {
        "intercept": {"clean": 0.0, "robust": 1e308, "combined": -1e308},
        "features": [
            feature("energy", ["clean"], [1e308, 1e308, -1e308]),
            feature("energy", ["robust"], [0.0, 1e308, 0.0]),
        ],
    }
    with np.errstate(all="raise", under="ignore"):
        assert answer(statistics(energy=10.0), manifest(gate=huge), "gate")[0] == "clean"
        assert answer(statistics(energy=0.0), manifest(gate=huge), "gate")[0] == "robust"
    # no head can be judged: the first answers, and says that it is no number where that is so
    stats = statistics()
    stats.predictive_entropy[0, 1] = stats.probabilities[0, 2, 0] = np.nan
    assert answer(stats, manifest(gate=GATE), "gate")[0] == "clean"
    stats.probabilities[0, 0, 1] = np.nan
    assert route(stats, manifest(gate=GATE), "gate").class_id.tolist() == [-1]


@pytest.mark.parametrize("base", BASES)
def test_guard_is_the_clean_head_until_a_shift_and_then_its_base(base: str) -> None:
    # below the guard's threshold and above it, the blend's is out of the way
    m = manifest(paper=PAPER, blend=BLEND | {"threshold": 0.0}, gate=GATE, guard=GUARD | {"base": base})
    calm, shifted = statistics(divergence=(0.01, 0.01)), statistics(divergence=(0.6, 0.6))
    assert answer(calm, m, "guard") == ("clean", 0, [0.75, 0.25])
    assert answer(shifted, m, "guard") == answer(shifted, m, base) != ("clean", 0, [0.75, 0.25])
    both = HeadStatistics(*(np.concatenate(pair) for pair in zip(calm, shifted, strict=True)))
    assert route(both, m, "guard").head == ["clean", route(shifted, m, base).head[0]]


def test_guard_at_its_threshold_stays_with_the_clean_head() -> None:
    weightless = GUARD | {"weights": {}, "center": {}, "scale": {}}
    assert answer(statistics(), manifest(guard=weightless), "guard")[0] == "clean"
    assert answer(statistics(), manifest(guard=weightless | {"threshold": 0.49}), "guard")[0] == "combined"


def test_guard_needs_another_router_for_a_base() -> None:
    for base in ("guard", "gate", "nothing"):
        with pytest.raises(ValidationError, match=f"router.guard.base '{base}' is no other router of this model"):
            manifest(guard=GUARD | {"base": base})
    assert "guard" not in routers(manifest(("original", "robust"), guard=GUARD | {"base": "robust"}))


def test_equal_classes_give_the_first() -> None:
    even = statistics()._replace(probabilities=np.full((1, 3, 2), 0.5, np.float32))
    assert answer(even, manifest(), "mean")[1] == 0


def test_what_is_not_a_number_has_no_class() -> None:
    stats = statistics()
    stats.probabilities[0, 1] = np.nan
    m = manifest()
    assert route(stats, m, "robust").class_id.tolist() == [-1]
    assert route(stats, m, "mean").class_id.tolist() == [-1]
    assert answer(stats, m, "clean") == ("clean", 0, [0.75, 0.25])


def test_unknown_routers_are_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"^unknown router 'best'; this model has: clean, robust, combined, mean"):
        route(statistics(), manifest(), "best")
    with pytest.raises(InvalidRequest, match="unknown router 'blend'"):
        route(statistics(), manifest(), "blend")
    with pytest.raises(InvalidRequest, match="unknown router ''"):
        route(statistics(), manifest(), "")


def test_every_rule_that_the_manifest_offers_exists() -> None:
    m = manifest(paper=PAPER, blend=BLEND, gate=GATE, guard=GUARD)
    assert routers(m) == [*m.heads, *RULES]
    assert routers(manifest(("original",))) == ["original"]
    assert routers(manifest(("clean", "other"), blend=BLEND)) == ["clean", "other", "mean", "min_entropy"]


@pytest.mark.parametrize(
    ("router", "base"),
    [(router, "combined") for router in ("clean", "combined", *RULES)] + [("guard", base) for base in BASES],
)
def test_an_answer_does_not_depend_on_the_batch(router: str, base: str) -> None:
    rng = np.random.default_rng(3)
    n, k, c = 257, 3, 37
    m = manifest(classes=c, paper=PAPER, blend=BLEND, gate=GATE, guard=GUARD | {"base": base})
    stats = HeadStatistics(
        rng.dirichlet(np.ones(c), (n, k)).astype(np.float32),
        rng.gamma(1, 0.5, (n, k)).astype(np.float32),
        rng.gamma(1, 0.2, (n, k)).astype(np.float32),
        rng.gamma(1, 0.25, (n, k, k)).astype(np.float32),
        rng.normal(-3, 4, (n, k)).astype(np.float32),
    )
    whole = route(stats, m, router)
    for start, stop in [(0, 1), (1, 2), (5, 13), (100, 131), (256, 257), (3, 257)]:
        part = route(HeadStatistics(*(values[start:stop] for values in stats)), m, router)
        np.testing.assert_array_equal(part.probabilities, whole.probabilities[start:stop])
        np.testing.assert_array_equal(part.class_id, whole.class_id[start:stop])
        assert part.head == whole.head[start:stop]
    if router not in m.heads:
        assert router == "mean" or len(set(whole.head)) > 1

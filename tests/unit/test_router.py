"""Routers against values worked out by hand, their ties, and their indifference to the rest of the batch."""

import math
from typing import Any

import numpy as np
import pytest

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import InvalidRequest
from trivium.runtime.router import (
    FLOOR,
    RULES,
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
PAPER = {"divergence_threshold": 0.25, "entropy_scale": {"clean": 0.5, "robust": 1.0}}


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
    assert shift_probability(stats, manifest(blend=BLEND)) == pytest.approx([1 / (1 + math.exp(-score))])


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
        probability = shift_probability(statistics(), manifest(blend=BLEND | {"intercept": intercept}))
    assert probability == [float(intercept > 0)]


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
    m = manifest(paper=PAPER, blend=BLEND)
    assert routers(m) == [*m.heads, *RULES]
    assert routers(manifest(("original",))) == ["original"]
    assert routers(manifest(("clean", "other"), blend=BLEND)) == ["clean", "other", "mean", "min_entropy"]


@pytest.mark.parametrize("router", ["clean", "combined", *RULES])
def test_an_answer_does_not_depend_on_the_batch(router: str) -> None:
    rng = np.random.default_rng(3)
    n, k, c = 257, 3, 37
    m = manifest(classes=c, paper=PAPER, blend=BLEND)
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

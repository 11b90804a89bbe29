"""Routers: which head answers a picture, decided from the heads' statistics by one of several rules.

A rule looks at one picture's row alone, so that an answer never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import exp, isnan, log, nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics

from .bundle import GateRule, GateStatistic, Manifest
from .errors import InvalidRequest
from .guarantees import ShiftDetector

Floats = NDArray[np.float64]

SHIFT_FEATURES = ("divergence", "mutual_information", "energy")
FLOOR = 1e-4
"""nats; below it a divergence or a mutual information counts as none when its logarithm is taken."""


class Routed(NamedTuple):
    """The answers to N pictures."""

    probabilities: NDArray[np.float32]
    """[N, C]."""
    class_id: NDArray[np.int64]
    """[N]: the most probable class, the first of equals; -1 where the model's answer is not a number."""
    head: list[str]
    """[N]: the head that answered, "mean", or "clean+combined"."""
    weights: Floats | None
    """[N, K] of the heads in the answer; None where the one that was named answers all."""


class Choice(NamedTuple):
    """What a rule decides: weights of the heads in the answer, and what to call it."""

    weights: Floats
    """[N, K], each row sums to 1."""
    label: list[str]


Rule = Callable[[HeadStatistics, Manifest], Choice]


def route(statistics: HeadStatistics, manifest: Manifest, router: str | None = None) -> Routed:
    """Answer N pictures by the rule named, or the bundle's default.

    Raises: InvalidRequest for a router that this bundle does not have, with those that it has.
    """
    name = manifest.router.default if router is None else router
    if name in manifest.heads:
        # float32 as it is
        probabilities = statistics.probabilities[:, manifest.heads.index(name)].astype(np.float32, copy=False)
        weights, labels = None, [name] * len(probabilities)
    elif router is None or name in routers(manifest):
        weights, labels = RULES[name](statistics, manifest)
        probabilities = _mix(statistics, weights)
    else:
        raise unknown_router(name, routers(manifest))
    class_id = probabilities.argmax(1)
    # argmax finds the first NaN where there is one; for the one picture of a request numpy would take longer
    for row, index in enumerate(class_id.tolist()):
        if isnan(probabilities[row, index]):
            class_id[row] = -1
    return Routed(probabilities, class_id, labels, weights)


def routers(manifest: Manifest) -> list[str]:
    """Names of the routers that the bundle can use: its heads, then the rules whose heads and numbers it has."""
    return manifest.routers()


def unknown_router(name: str, available: Sequence[str]) -> InvalidRequest:
    """What a request for a router that a model has not is answered."""
    return InvalidRequest(f"unknown router {name[:100]!r}; this model has: {', '.join(available)}")


def shift_features(statistics: HeadStatistics, heads: Sequence[str]) -> Floats:
    """Scores of whether a picture is unlike the clean training pictures, float64 [N, 3] in SHIFT_FEATURES' order.

    log(FLOOR + symmetrised KL between clean and robust), log(FLOOR + mutual information of the clean head), and the
    energy of the clean head as it is. `heads` names the statistics' heads; without a clean one the first stands for
    it, and without both the divergence is 0.
    """
    return np.array(list(_shift_rows(statistics, heads)), np.float64).reshape(-1, len(SHIFT_FEATURES))


def _shift_rows(statistics: HeadStatistics, heads: Sequence[str]) -> Iterator[tuple[float, float, float]]:
    """The scores of each picture; plain numbers, which for one picture cost a tenth of NumPy's calls."""
    clean = heads.index("clean") if "clean" in heads else 0
    robust = heads.index("robust") if "clean" in heads and "robust" in heads else None
    divergence, information, energy = statistics.divergence, statistics.mutual_information, statistics.energy
    for row in range(len(energy)):
        apart = 0.0
        if robust is not None:
            apart = 0.5 * (divergence.item(row, clean, robust) + divergence.item(row, robust, clean))
        yield _floored_log(apart), _floored_log(information.item(row, clean)), energy.item(row, clean)


def _floored_log(value: float) -> float:
    return log(FLOOR + value) if value > -FLOOR else nan


def symmetric_divergence(statistics: HeadStatistics, i: int, j: int) -> Floats:
    """(KL(p_i || p_j) + KL(p_j || p_i)) / 2 in nats, [N]."""
    divergence = statistics.divergence.astype(np.float64)
    return 0.5 * (divergence[:, i, j] + divergence[:, j, i])


def shift_probability(statistics: HeadStatistics, detector: ShiftDetector, heads: Sequence[str]) -> Floats:
    """The probability, [N], that a detector gives to a picture of being shifted.

    sigmoid(intercept + sum over features of weight * (feature - center) / scale). `heads` names the statistics' heads.
    """
    weights, center, scale = detector.weights, detector.center, detector.scale
    used = [(column, name) for column, name in enumerate(SHIFT_FEATURES) if name in weights]
    probabilities = []
    for features in _shift_rows(statistics, heads):
        score = detector.intercept
        for column, name in used:
            score += weights[name] * (features[column] - center[name]) / scale[name]
        probabilities.append(logistic(score))
    return np.array(probabilities, np.float64)


def logistic(score: float) -> float:
    """1 / (1 + exp(-score))."""
    # exp of a negative number alone, so that nothing overflows
    decay = exp(-abs(score))
    return 1 / (1 + decay) if score >= 0 else decay / (1 + decay)


def gate_scores(statistics: HeadStatistics, rule: GateRule, heads: Sequence[str]) -> Floats:
    """The score, [N, G], that GateRule gives to each head that may answer, in the order of `heads`.

    intercept + sum over features of weight * (feature - center) / scale, added in the manifest's order; what is not a
    number counts as infinite. `heads` names the statistics' heads.
    """
    answering = [head for head in heads if head in rule.intercept]
    center, scale = (np.array([getattr(feature, name) for feature in rule.features]) for name in ("center", "scale"))
    weights = np.array([[feature.weights[head] for head in answering] for feature in rule.features])
    # a manifest from elsewhere may hold numbers whose products overflow
    with np.errstate(over="ignore", invalid="ignore"):
        scores = [(feature.statistic, feature.heads) for feature in rule.features]
        standard = (gate_features(statistics, scores, heads) - center) / scale
        terms = np.empty((len(standard), len(weights) + 1, len(answering)))
        terms[:, 0] = [rule.intercept[head] for head in answering]
        np.multiply(standard[:, :, None], weights, out=terms[:, 1:])
        # a running sum has one order, whatever the number of pictures
        score = terms.cumsum(1)[:, -1]
    result: Floats = np.where(np.isnan(score), np.inf, score)
    return result


def gate_features(
    statistics: HeadStatistics, scores: Sequence[tuple[GateStatistic, Sequence[str]]], heads: Sequence[str]
) -> Floats:
    """Scores of N pictures for a gate, float64 [N, F], each given as (statistic, whose), as GateFeature describes them.

    Roots instead of logarithms: they are rounded alike wherever they are taken. `heads` names the statistics' heads.
    """
    entropy, information, divergence = (
        np.sqrt(values.astype(np.float64))
        for values in (
            statistics.predictive_entropy,
            statistics.mutual_information,
            0.5 * (statistics.divergence.astype(np.float64) + statistics.divergence.astype(np.float64).swapaxes(1, 2)),
        )
    )
    single = {
        "predictive_entropy": entropy,
        "mutual_information": information,
        "energy": statistics.energy.astype(np.float64),
        "max_probability": statistics.probabilities.max(2).astype(np.float64),
    }
    columns = [
        divergence[:, heads.index(of[0]), heads.index(of[1])]
        if name == "divergence"
        else single[name][:, heads.index(of[0])]
        for name, of in scores
    ]
    return np.stack(columns, axis=1)


def _mix(statistics: HeadStatistics, weights: Floats) -> NDArray[np.float32]:
    """Weighted sum of the heads' probabilities, [N, C]; head by head, so that its order cannot depend on N."""
    mixed: Floats = np.zeros(statistics.probabilities[:, 0].shape)
    for k in np.flatnonzero(weights.any(0)):
        weight = weights[:, k, None]
        # the NaN of a head without weight must not spread: 0 * NaN is NaN
        np.add(mixed, weight * statistics.probabilities[:, k], out=mixed, where=weight > 0)
    return mixed.astype(np.float32)


def _single(index: NDArray[np.intp], manifest: Manifest) -> Choice:
    return Choice(np.eye(len(manifest.heads))[index], [manifest.heads[i] for i in index.tolist()])


def _mean(statistics: HeadStatistics, manifest: Manifest) -> Choice:
    n, k = statistics.energy.shape
    return Choice(np.full((n, k), 1 / k), ["mean"] * n)


def _min_entropy(statistics: HeadStatistics, manifest: Manifest) -> Choice:
    """The head of least predictive entropy, the first of equals."""
    return _single(statistics.predictive_entropy.argmin(1), manifest)


def _paper(statistics: HeadStatistics, manifest: Manifest) -> Choice:
    """Heads that agree answer together, else the relatively surest of clean and robust answers.

    A reconstruction of the selection of "Efficiently Robustify Pre-trained Models" (ICCV 2023): symmetrised KL of
    clean and robust up to delta -> combined; else the least of uncertainty / its calibration mean, the first of equals.
    """
    rule = manifest.router.paper
    assert rule is not None
    clean, robust, combined = (manifest.heads.index(name) for name in ("clean", "robust", "combined"))
    agree = symmetric_divergence(statistics, clean, robust) <= rule.divergence_threshold
    uncertainty: Floats = getattr(statistics, rule.uncertainty).astype(np.float64)
    places = [manifest.heads.index(head) for head in rule.among]
    relative = [uncertainty[:, k] / rule.entropy_scale[head] for k, head in zip(places, rule.among, strict=True)]
    surest, least = np.full(len(uncertainty), places[0]), relative[0]
    for k, own in zip(places[1:], relative[1:], strict=True):
        surer = least <= own
        surest, least = np.where(surer, surest, k), np.where(surer, least, own)
    return _single(np.where(agree, combined, surest), manifest)


def _blend(statistics: HeadStatistics, manifest: Manifest) -> Choice:
    """Shifted -> the combined head; else the mean of clean and combined, which keeps the original's right answers."""
    rule = manifest.router.blend
    assert rule is not None
    clean, combined = manifest.heads.index("clean"), manifest.heads.index("combined")
    shifted = shift_probability(statistics, rule, manifest.heads) > rule.threshold
    weights = np.zeros(statistics.energy.shape)
    weights[:, clean] = np.where(shifted, 0.0, 0.5)
    weights[:, combined] = np.where(shifted, 1.0, 0.5)
    return Choice(weights, ["combined" if one else "clean+combined" for one in shifted.tolist()])


def _gate(statistics: HeadStatistics, manifest: Manifest) -> Choice:
    """The head of the highest score, the first of equals."""
    rule = manifest.router.gate
    assert rule is not None
    answering = np.array([k for k, head in enumerate(manifest.heads) if head in rule.intercept])
    return _single(answering[gate_scores(statistics, rule, manifest.heads).argmax(1)], manifest)


def _guard(statistics: HeadStatistics, manifest: Manifest) -> Choice:
    """Shifted -> the guarded router's answer; else the clean head."""
    rule = manifest.router.guard
    assert rule is not None
    shifted = shift_probability(statistics, rule, manifest.heads) > rule.threshold
    clean = manifest.heads.index("clean")
    if rule.base in manifest.heads:
        return _single(np.where(shifted, manifest.heads.index(rule.base), clean), manifest)
    weights, labels = RULES[rule.base](statistics, manifest)
    unmoved = np.eye(len(manifest.heads))[clean]
    return Choice(
        np.where(shifted[:, None], weights, unmoved),
        [label if one else "clean" for label, one in zip(labels, shifted.tolist(), strict=True)],
    )


RULES: dict[str, Rule] = {
    "mean": _mean,
    "min_entropy": _min_entropy,
    "paper": _paper,
    "blend": _blend,
    "gate": _gate,
    "guard": _guard,
}
"""Rules by name; a head's own name is a router too."""

"""Measures of answers: accuracy, flips, calibration, ranking, abstention, and intervals of differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

BINS = 15
"""Equal-width confidence bins of the expected calibration error (Guo et al. 2017, section 4)."""
RESAMPLES = 2000


class Reliability(NamedTuple):
    """A reliability diagram: one entry a bin of confidence; empty bins hold NaN in confidence and accuracy."""

    edges: NDArray[np.float64]
    """[bins + 1], from 0 to 1; a bin holds its upper edge."""
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    """Mean of the largest probability in the bin."""
    accuracy: NDArray[np.float64]


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


class RiskCoverage(NamedTuple):
    """What a classifier that answers only its surest pictures gets wrong (Geifman and El-Yaniv 2017)."""

    coverage: NDArray[np.float64]
    """[N]: share of pictures answered, 1/N to 1."""
    risk: NDArray[np.float64]
    """[N]: share of wrong answers among those answered."""


def accuracy(class_id: ArrayLike, labels: ArrayLike) -> float:
    """Share of pictures answered right, in [0, 1]; class_id and labels are [N]."""
    return float(np.mean(np.asarray(class_id) == np.asarray(labels)))


def negative_flips(original: ArrayLike, new: ArrayLike, labels: ArrayLike) -> float:
    """Share of all pictures that the original got right and the new classifier gets wrong (Yan et al. 2021, NFR).

    Args: class ids, [N] each. Returns: a share in [0, 1].
    """
    original, new, labels = np.asarray(original), np.asarray(new), np.asarray(labels)
    return float(np.mean((original == labels) & (new != labels)))


def positive_flips(original: ArrayLike, new: ArrayLike, labels: ArrayLike) -> float:
    """Share of all pictures that the original got wrong and the new classifier gets right; [N] each."""
    original, new, labels = np.asarray(original), np.asarray(new), np.asarray(labels)
    return float(np.mean((original != labels) & (new == labels)))


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> Reliability:
    """Accuracy against confidence in equal-width bins (Guo et al. 2017); confidence in [0, 1] and correct are [N]."""
    confidence = np.asarray(confidence, np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    filled = np.where(counts > 0, counts, np.nan)
    return Reliability(
        edges,
        counts,
        np.bincount(index, confidence, bins) / filled,
        np.bincount(index, np.asarray(correct, np.float64), bins) / filled,
    )


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over bins, weighted by their counts (Guo et al. 2017, eq. 3)."""
    p = np.asarray(probabilities)
    return calibration_error(reliability(p.max(1), p.argmax(1) == np.asarray(labels), bins))


def calibration_error(diagram: Reliability) -> float:
    """Expected calibration error of a reliability diagram, in [0, 1]."""
    filled = diagram.counts > 0
    gap = np.abs(diagram.accuracy - diagram.confidence)[filled]
    return float((diagram.counts[filled] * gap).sum() / diagram.counts.sum())


def squared_error(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """[N]: squared distance of the probabilities [N, C] from the one-hot label, in [0, 2]; its mean is Brier's score
    (Brier 1950)."""
    p = np.asarray(probabilities, np.float64)
    truth = p[np.arange(len(p)), np.asarray(labels)]
    return np.asarray((p * p).sum(1) - 2 * truth + 1)


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """[N]: -log p(label) in nats, probabilities [N, C] clamped from below at 1e-30; its mean is the NLL."""
    p = np.asarray(probabilities, np.float64)
    return np.asarray(-np.log(np.maximum(p[np.arange(len(p)), np.asarray(labels)], 1e-30)))


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Area under the ROC curve: chance that a positive scores above a negative, ties count half.

    Args: scores [N], higher meaning more likely positive; positive [N] bool.
    Returns: None where there are no positives or no negatives.
    """
    positive = np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return None
    return float(roc_auc_score(positive, np.asarray(scores, np.float64)))


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """Risk among the n surest answers for every n; equal confidences keep their order. confidence, correct: [N]."""
    order = np.argsort(-np.asarray(confidence, np.float64), kind="stable")
    wrong = ~np.asarray(correct, bool)[order]
    answered = np.arange(1, len(wrong) + 1)
    return RiskCoverage(answered / len(wrong), np.cumsum(wrong) / answered)


def accuracy_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float = 0.8) -> float:
    """Accuracy of the surest share of answers, that is 1 - risk at this coverage (rounded up to whole pictures)."""
    risk = risk_coverage(confidence, correct).risk
    return float(1.0 - risk[max(1, int(np.ceil(coverage * len(risk) - 1e-9))) - 1])


def mean_corruption_accuracy(accuracies: Mapping[tuple[str, int], float], leave_out: Sequence[str] = ()) -> float:
    """Mean over corruptions of the mean over their severities.

    This is 1 - the unnormalised mCE of Hendrycks and Dietterich (2019); AlexNet is no yardstick on small data.

    Args:
        accuracies: (corruption, severity) -> accuracy.
        leave_out: corruptions that do not count, say because training saw them.
    """
    by_name: dict[str, list[float]] = {}
    for (name, _), value in accuracies.items():
        if name not in leave_out:
            by_name.setdefault(name, []).append(value)
    return float(np.mean([np.mean(values) for values in by_name.values()])) if by_name else float("nan")


def paired_bootstrap(
    difference: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of paired differences (Efron and Tibshirani 1993, chapter 13).

    Args:
        difference: [N], one value an independent unit, say right(a) - right(b) of a picture; where a picture was seen
            in several versions, their weighted mean, since versions of one picture are not independent.
        level: confidence level.
        seed: the same seed resamples the same pictures.
    """
    d = np.asarray(difference, np.float64)
    generator = np.random.Generator(np.random.Philox(seed))
    rows = max(1, (1 << 22) // max(1, len(d)))
    means = [
        d[generator.integers(0, len(d), (min(rows, resamples - start), len(d)))].mean(1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(d.mean()), float(low), float(high))

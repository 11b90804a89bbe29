"""Measures of answers: accuracy, flips, calibration, ranking, abstention, and intervals of differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

BINS = 15
"""Equal-width confidence bins of the expected calibration error (Guo et al. 2017, section 4)."""
RESAMPLES = 2000


ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
"""Mean errors of AlexNet on ImageNet-C, the benchmark's yardstick (constants of the code of Hendrycks et al. 2020)."""


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
    # by Mann and Whitney's statistic: what scikit-learn would return, in a tenth of its time
    ranks, ups = rankdata(scores), int(positive.sum())
    return float((ranks[positive].sum() - ups * (ups + 1) / 2) / (ups * (len(positive) - ups)))


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


def mean_corruption_error(errors: Mapping[str, float], yardstick: Mapping[str, float]) -> float | None:
    """mCE of Hendrycks and Dietterich (2019, section 4): 100 times the mean over corruptions of the classifier's error
    divided by the yardstick's, each summed or averaged over the same severities.

    Args: corruption -> error; the yardstick's may name more corruptions.
    Returns: 100 for the yardstick itself, less for better; None where the yardstick makes no error to compare with.
    """
    if not errors or any(yardstick[name] <= 0 for name in errors):
        return None
    return float(100 * np.mean([error / yardstick[name] for name, error in errors.items()]))


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

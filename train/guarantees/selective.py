"""Abstention: which confidence ranks a router's answers, and from where on its answers may be given.

Selective risk by Learn-then-Test (Angelopoulos et al. 2021, "Learn then Test: Calibrating Predictive Algorithms to
Achieve Risk Control"): every threshold is a hypothesis "more than alpha of the answers given are wrong", rejected by an
exact binomial test; split fixed-sequence testing keeps the probability of any wrong rejection at delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from trivium.runtime.guarantees import Confidence

from ..evaluation.metrics import auroc

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

STEPS = 100
"""Thresholds tested: the confidences from which on 1 %, 2 %, ... 100 % of the tuning pictures are answered."""


def choose_confidence(candidates: Mapping[Confidence, Floats], errors: Flags) -> Confidence:
    """The confidence [M] of largest AUROC for errors [M]; of equals max_probability, then the first.

    Where all answers are right or all are wrong, every candidate is as good as another.
    """
    area = {name: auroc(-confidence, errors) or 0.0 for name, confidence in candidates.items()}
    return max(area, key=lambda name: (area[name], name == "max_probability"))


def certify(
    tuning_confidence: Floats,
    tuning_errors: Flags,
    confidence: Floats,
    errors: Flags,
    risks: Sequence[float],
    delta: float,
) -> list[float | None]:
    """For every risk the least confidence at which an answer may be given.

    With probability 1 - delta over the calibration pictures, and for each risk by itself, at most this share of the
    answers given is wrong. Thresholds and the place to start come from the tuning part alone: there where its own
    p-value is least, then towards answering more, up to the first threshold that fails on the calibration part.

    Args:
        tuning_confidence, tuning_errors: [M], of pictures on which choices may rest.
        confidence, errors: [N], of others, on which the promise rests; higher confidence is surer.
        risks: shares of wrong answers, each in (0, 1).

    Returns: one threshold a risk, None where none passes.
    """
    answered = np.arange(1, STEPS + 1) * len(tuning_confidence) / STEPS
    surest = np.sort(tuning_confidence)[::-1]
    thresholds = surest[np.unique(np.ceil(answered - 1e-9).astype(np.int64)[answered > 0]) - 1]
    thresholds = np.unique(thresholds)[::-1]
    if not thresholds.size:
        return [None] * len(risks)
    alpha = np.asarray(risks, np.float64)[:, None]
    learned = tail(*count(tuning_confidence, tuning_errors, thresholds), alpha)
    passed = tail(*count(confidence, errors, thresholds), alpha) <= delta
    found: list[float | None] = []
    for row, start in zip(passed, learned.argmin(1).tolist(), strict=True):
        failures = np.flatnonzero(~row[start:])
        last = start + (int(failures[0]) if failures.size else len(row) - start) - 1
        found.append(float(thresholds[last]) if last >= start else None)
    return found


def count(confidence: Floats, errors: Flags, thresholds: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(wrong answers [K], answers given [K]) where confidence [N] must reach each of the thresholds [K]."""
    order = np.argsort(-confidence, kind="stable")
    wrong = np.concatenate([[0], np.cumsum(errors[order])])
    answered = np.searchsorted(-confidence[order], -thresholds, side="right")
    return wrong[answered], answered


def tail(events: NDArray[np.int64], trials: NDArray[np.int64], rate: NDArray[np.float64] | float) -> Floats:
    """P(Binomial(trials, rate) <= events): the exact p-value of "the true rate is at least `rate`"."""
    p: Floats = bdtr(events.astype(np.float64), trials, rate)
    return p

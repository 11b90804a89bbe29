"""Split conformal prediction: the quantiles that make sets of classes hold the right one as often as promised.

Vovk et al. (2005); with the scores of Sadinle et al. (2019, LAC) and Angelopoulos et al. (2021, RAPS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SLACK = 1e-9
"""Less than any step between ranks: 100 * 0.99 must not count as more than 99."""


def rank(pictures: int, coverage: float) -> int:
    """The rank, from 1, of the calibration score that is the quantile: ceil((n + 1) * coverage)."""
    return math.ceil((pictures + 1) * coverage - SLACK)


def least_pictures(coverage: float) -> int:
    """The fewest calibration pictures for this coverage, below 1: with fewer the quantile is infinite."""
    return math.ceil(coverage / (1 - coverage) - SLACK)


def quantiles(scores: Floats, coverages: Sequence[float]) -> list[float]:
    """For each coverage the quantile of conformity scores [N] of the right classes, lower meaning more typical.

    For one more picture, exchangeable with these, the right class scores at most this with at least that probability.
    -inf, where the answer alone suffices, becomes 0, below which no other class scores.

    Raises: ValueError where there are fewer than least_pictures.
    """
    ordered = np.sort(scores)
    ranks = [rank(len(ordered), coverage) for coverage in coverages]
    if max(ranks) > len(ordered):
        raise ValueError(f"{len(ordered)} scores have no quantile for a coverage of {max(coverages):g}")
    return [max(float(ordered[place - 1]), 0.0) for place in ranks]


def covered(scores: Floats, labels: NDArray[np.int64], quantile: float) -> NDArray[np.bool_]:
    """[N]: whether the set of each picture holds its label; scores [N, C]."""
    return np.asarray(scores[np.arange(len(labels)), labels] <= quantile)


def set_sizes(scores: Floats, quantile: float) -> NDArray[np.int64]:
    """[N]: classes in each picture's set; scores [N, C], -inf for the answer."""
    return np.asarray((scores <= quantile).sum(1))

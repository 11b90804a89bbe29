"""Harm of a guarded router: how far it may leave the clean head before too many of its right answers are lost.

Learn-then-Test (Angelopoulos et al. 2021) with a fixed sequence of thresholds, and for the fall of accuracy the test by
betting of Waudby-Smith and Ramdas (2024, "Estimating means of bounded random variables by betting").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .selective import Flags, Floats, tail

STAKE = 0.75
"""Largest share of its capital that the bet may lose on one picture."""


class Harm(NamedTuple):
    """What a guarded router costs, measured."""

    accuracy_loss: float
    """Accuracy of the clean head on clean pictures less that of the guarded router; NaN without clean pictures."""
    negative_flips: float
    """Share of all pictures that the clean head gets right and the guarded router wrong."""


def certify_guard(
    shift: Floats,
    clean_right: Flags,
    base_right: Flags,
    is_clean: Flags,
    *,
    accuracy_loss: float,
    negative_flips: float,
    delta: float,
    thresholds: Sequence[float],
) -> float | None:
    """The last of the thresholds up to which both harms are certified, or None where not even the first is.

    A threshold passes where both tests reject at delta: negative flips by the exact binomial tail over all pictures,
    the fall of accuracy by betting over the clean ones. Requiring both needs no correction (intersection-union test),
    and neither does the sequence, which ends at the first failure: with probability 1 - delta over the calibration
    pictures both bounds hold at the threshold returned.

    Args:
        shift: [N], probability that a picture is shifted; above the threshold the base router answers, else the clean
            head. Rows in random order, on which the bets depend.
        clean_right, base_right: [N], whether the clean head and the base router are right.
        is_clean: [N], the pictures on which accuracy must not fall.
        accuracy_loss: in (0, 1).
        negative_flips: in (0, 1), of all pictures.
        thresholds: in the order of testing, usually from 1 (no harm at all) downwards; not chosen on these pictures.
    """
    worse, better = clean_right & ~base_right, ~clean_right & base_right
    difference = worse.astype(np.int8) - better
    last = None
    for threshold in thresholds:
        moved = shift > threshold
        flips = np.array((worse & moved).sum())
        if tail(flips, np.array(len(shift)), negative_flips) > delta:
            break
        if betting_p((difference * moved)[is_clean], accuracy_loss, delta) > delta:
            break
        last = float(threshold)
    return last


def measure_harm(shift: Floats, clean_right: Flags, base_right: Flags, is_clean: Flags, threshold: float) -> Harm:
    """Both harms of a guard at this threshold; arguments as in certify_guard."""
    guard_right = np.where(shift > threshold, base_right, clean_right)
    fall = clean_right[is_clean].astype(np.int8) - guard_right[is_clean]
    return Harm(float(fall.mean()) if fall.size else float("nan"), float((clean_right & ~guard_right).mean()))


def betting_p(differences: NDArray[np.int8] | Floats, bound: float, delta: float) -> float:
    """p-value of "the mean of the differences is at least `bound`", for values in [-1, 1] in exchangeable order.

    One over the largest capital of a gambler who bets against it, picture by picture, with stakes that know only the
    pictures before (Waudby-Smith and Ramdas 2024; the stakes are the predictable plug-in for a
    known number of pictures, tuned to tests at level delta). By Ville's inequality it is below delta with probability
    at most delta where the hypothesis holds. 1 without any difference.
    """
    n = len(differences)
    if n == 0:
        return 1.0
    x, mean = (np.asarray(differences, np.float64) + 1) / 2, (bound + 1) / 2
    seen = np.arange(1, n + 1)
    center = (0.5 + np.cumsum(x)) / (seen + 1)
    variance = (0.25 + np.cumsum((x - center) ** 2)) / (seen + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    stake = np.minimum(np.sqrt(2 * np.log(1 / delta) / (n * before)), STAKE / (1 - mean))
    capital = np.cumsum(np.log1p(stake * (mean - x)))
    return float(np.exp(-max(capital.max(), 0.0)))

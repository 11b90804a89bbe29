"""Exact confidence intervals of a share, without scipy, which servers do not have."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, lgamma, log, log1p


def clopper_pearson(hits: int, count: int, confidence: float) -> tuple[float, float]:
    """The interval that holds the true share of `hits` among `count` with at least this probability (Clopper and
    Pearson 1934); all of [0, 1] where nothing was counted."""
    tail = (1 - confidence) / 2
    low, high = 0.0, 1.0
    if hits > 0:
        low = _crossing(lambda p: regularised_beta(p, hits, count - hits + 1) > tail)
    if hits < count:
        high = _crossing(lambda p: regularised_beta(p, hits + 1, count - hits) > 1 - tail)
    return low, high


def regularised_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), the probability that of a + b - 1 trials of probability x at least a hit; a and b above 0.

    The continued fraction of DLMF 8.17.22, from its odd and even terms by Lentz' method.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - regularised_beta(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    result, m = d, 1
    while True:
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1 / _away(1 + even * d, tiny), _away(1 + even / c, tiny)
        result *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1 / _away(1 + odd * d, tiny), _away(1 + odd / c, tiny)
        result *= d * c
        if abs(d * c - 1) < 1e-14 or m > 100_000:
            return front * result
        m += 1


def _away(value: float, least: float) -> float:
    return value if abs(value) > least else least


def _crossing(above: Callable[[float], bool]) -> float:
    """Where in [0, 1] a condition begins to hold, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high

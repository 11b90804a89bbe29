"""The interval against scipy's quantiles of the beta distribution."""

import pytest

from trivium.runtime.binomial import clopper_pearson, regularised_beta

stats = pytest.importorskip("scipy.stats", reason="needs pip install 'trivium[eval]'")
SHARES = [(0, 1), (1, 1), (0, 30), (30, 30), (1, 30), (17, 30), (950, 1000), (3, 100_000), (600_000, 1_000_000)]


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
@pytest.mark.parametrize(("hits", "count"), SHARES)
def test_it_is_the_exact_interval(hits: int, count: int, confidence: float) -> None:
    exact = stats.binomtest(hits, count).proportion_ci(confidence, method="exact")
    assert clopper_pearson(hits, count, confidence) == pytest.approx((exact.low, exact.high), rel=1e-7, abs=1e-15)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 5), (50, 3), (1, 5000), (400, 600)])
@pytest.mark.parametrize("x", [0, 1e-4, 0.04, 0.4, 0.93, 1])
def test_the_beta_function_is_the_binomial_tail(a: int, b: int, x: float) -> None:
    assert regularised_beta(x, a, b) == pytest.approx(stats.binom.sf(a - 1, a + b - 1, x), rel=1e-9, abs=1e-300)


def test_of_nothing_nothing_is_known() -> None:
    assert clopper_pearson(0, 0, 0.95) == (0, 1)

"""Random inputs of MCHeads and the tolerances that float32 arithmetic allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics, dropout_masks

PROBABILITY_TOLERANCE = 1e-6
STATISTIC_TOLERANCE = 1e-5
"""Relative, with 1e-6 nats beside it where a statistic is nearly 0."""
BFLOAT16_ROUNDING = 2.0**-9
"""Largest relative change of a weight."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of mc_heads in its order."""

    features: NDArray[np.float32]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    temperature: NDArray[np.float32]
    masks: NDArray[np.uint8]
    keep: float

    def arguments(
        self,
    ) -> tuple[
        NDArray[np.float32],
        NDArray[np.float32],
        NDArray[np.float32],
        NDArray[np.float32],
        NDArray[np.uint8],
        float,
    ]:
        return self.features, self.weights, self.bias, self.temperature, self.masks, self.keep

    def logit_bound(self) -> float:
        """Largest sum of |terms| behind any logit of any pass."""
        h = self.features if self.features.ndim == 3 else self.features[:, None, :]
        h = np.where(np.isfinite(h), np.abs(h), 0).astype(np.float64)
        if h.shape[1] == 1:
            h = np.broadcast_to(h, (h.shape[0], self.weights.shape[0], h.shape[2]))
        terms = np.einsum("bkd,kcd->bkc", h, np.abs(self.weights).astype(np.float64), optimize=True)
        terms = (terms / self.keep + np.abs(self.bias)) / self.temperature[:, None]
        return float(terms.max(initial=0.0))


def make_inputs(
    batch: int,
    heads: int,
    classes: int,
    units: int,
    passes: int,
    *,
    keep: float = 0.5,
    own_features: bool = False,
    logits: float = 2.0,
    seed: int = 0,
) -> Inputs:
    """Inputs whose logits have a standard deviation near `logits` / sqrt(keep), and none far beyond that."""
    rng = np.random.default_rng([seed, batch, heads, classes, units, passes])
    shape = (batch, heads, units) if own_features else (batch, units)
    return Inputs(
        rng.uniform(-1, 1, shape).astype(np.float32),
        (rng.uniform(-3, 3, (heads, classes, units)) * logits / np.sqrt(units)).astype(np.float32),
        rng.uniform(-1, 1, (heads, classes)).astype(np.float32),
        rng.uniform(0.7, 1.5, heads).astype(np.float32),
        dropout_masks(passes, units, keep, seed),
        keep,
    )


def assert_close(actual: HeadStatistics, expected: HeadStatistics, logit_error: float = 0.0) -> None:
    """Probabilities to 1e-6 and statistics to 1e-5; `logit_error` is what the logits may be off beyond that."""
    for name, a, e in zip(HeadStatistics._fields, actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert a.dtype == np.float32, name
        if name == "probabilities":
            np.testing.assert_allclose(a, e, rtol=0, atol=PROBABILITY_TOLERANCE + logit_error, err_msg=name)
        else:
            # An entropy moves by at most |log p| times what the probabilities move by: 70 nats at the floor of p.
            atol = 1e-6 + 70 * logit_error
            np.testing.assert_allclose(a, e, rtol=STATISTIC_TOLERANCE, atol=atol, err_msg=name)

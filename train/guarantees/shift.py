"""The shift detector: how probable it is that a picture is unlike the clean calibration pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from trivium.kernels import HeadStatistics
from trivium.runtime.guarantees import ShiftDetector
from trivium.runtime.router import SHIFT_FEATURES, shift_features


def fit_detector(statistics: HeadStatistics, shifted: NDArray[np.bool_], heads: Sequence[str]) -> ShiftDetector:
    """Logistic regression on the router's standardised shift features; clean and shifted views weigh the same.

    Args:
        statistics: of N views.
        shifted: [N], both kinds among them.
        heads: of the statistics.
    """
    features = shift_features(statistics, heads)
    center, scale = features.mean(0), np.maximum(features.std(0), 1e-9)
    model = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-8, max_iter=1000)
    model.fit((features - center) / scale, shifted)
    named = {
        "weights": dict(zip(SHIFT_FEATURES, model.coef_[0].tolist(), strict=True)),
        "center": dict(zip(SHIFT_FEATURES, center.tolist(), strict=True)),
        "scale": dict(zip(SHIFT_FEATURES, scale.tolist(), strict=True)),
    }
    return ShiftDetector.model_validate(named | {"intercept": float(model.intercept_[0])})

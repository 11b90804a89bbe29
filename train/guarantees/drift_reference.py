"""Histograms of what a bundle says of calibration pictures, which a server compares its own with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.drift import drift_values
from trivium.runtime.guarantees import DriftReference, DriftStatistic
from trivium.runtime.router import route

BINS = 100
PICTURES_A_BIN = 10
"""With fewer pictures there are fewer bins."""


def drift_reference(tuning: HeadStatistics, calibration: HeadStatistics, manifest: Manifest) -> DriftReference:
    """Histograms over calibration pictures: of the clean head, or else the first, and of what the default router
    answers.

    The bins of a statistic are cut at the tuning pictures' quantiles, so that each holds about as many pictures, and
    that which bin a picture falls into does not depend on the pictures it is compared with.
    """
    head = "clean" if "clean" in manifest.heads else manifest.heads[0]
    edges: dict[DriftStatistic, list[float]] = {
        name: edges_of(column) for name, column in watched(tuning, manifest, head).items() if name != "class_id"
    }
    values = watched(calibration, manifest, head)
    counts: dict[DriftStatistic, list[int]] = {name: histogram(values[name], own) for name, own in edges.items()}
    answers = values["class_id"].astype(np.int64)
    counts["class_id"] = np.bincount(answers, minlength=len(manifest.classes)).tolist()
    return DriftReference(pictures=len(answers), edges=edges, counts=counts, head=head)


def watched(statistics: HeadStatistics, manifest: Manifest, head: str) -> dict[DriftStatistic, NDArray[np.float64]]:
    """What a server would watch of N pictures, [N] each."""
    return drift_values(statistics, route(statistics, manifest).class_id, manifest.heads, head)


def edges_of(values: NDArray[np.float64]) -> list[float]:
    """Inner edges, ascending: quantiles of the values [N], each a value itself, without equal ones and the largest."""
    bins = max(2, min(BINS, len(values) // PICTURES_A_BIN))
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
    return [float(edge) for edge in edges if edge < values.max()]


def histogram(values: NDArray[np.float64], edges: list[float]) -> list[int]:
    """Values in each of the len(edges) + 1 bins; one equal to an edge counts below it."""
    counted: list[int] = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1).tolist()
    return counted

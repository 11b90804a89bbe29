"""Histograms of what a bundle says of calibration pictures, which a server compares its own with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.guarantees import DriftReference, DriftStatistic
from trivium.runtime.router import route, symmetric_divergence

BINS = 100
PICTURES_A_BIN = 10
"""With fewer pictures there are fewer bins."""


def drift_reference(statistics: HeadStatistics, manifest: Manifest) -> DriftReference:
    """Histograms over N pictures: of the clean head, or else the first, and of what the default router answers.

    The bins of a statistic are cut at its quantiles, so that each holds nearly as many pictures; no bin is empty, but
    for a class that no picture was taken for.
    """
    heads = manifest.heads
    head = "clean" if "clean" in heads else heads[0]
    k = heads.index(head)
    values: dict[DriftStatistic, NDArray[np.float64]] = {
        "predictive_entropy": statistics.predictive_entropy[:, k].astype(np.float64),
        "mutual_information": statistics.mutual_information[:, k].astype(np.float64),
        "energy": statistics.energy[:, k].astype(np.float64),
    }
    if {"clean", "robust"} <= set(heads):
        values["divergence"] = symmetric_divergence(statistics, heads.index("clean"), heads.index("robust"))
    edges = {name: edges_of(column) for name, column in values.items()}
    counts = {name: histogram(column, edges[name]) for name, column in values.items()}
    answers = route(statistics, manifest).class_id
    counts["class_id"] = np.bincount(answers, minlength=len(manifest.classes)).tolist()
    return DriftReference(pictures=len(answers), edges=edges, counts=counts, head=head)


def edges_of(values: NDArray[np.float64]) -> list[float]:
    """Inner edges, ascending: quantiles of the values [N], each a value itself, without equal ones and the largest."""
    bins = max(2, min(BINS, len(values) // PICTURES_A_BIN))
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
    return [float(edge) for edge in edges if edge < values.max()]


def histogram(values: NDArray[np.float64], edges: list[float]) -> list[int]:
    """Values in each of the len(edges) + 1 bins; one equal to an edge counts below it."""
    counted: list[int] = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1).tolist()
    return counted

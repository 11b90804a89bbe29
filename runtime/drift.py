"""Drift: are the pictures that a server is asked about still like the calibration pictures?

Two answers, from the same five statistics of each picture. The population stability index says by how much a window of
the last pictures differs, without a claim. The sequential test says whether all since the start differ by more than
chance, with a bound on false alarms that holds however long it watches and however few the calibration pictures are:

- each picture's statistic becomes a conformal p-value among the calibration pictures and all pictures before it, which
  is independent of those before it and uniform as long as the stream is exchangeable with them (Vovk, Gammerman and
  Shafer 2005, theorem 8.2);
- betting against uniformity at fixed odds makes a martingale of each statistic and each bet (Vovk, Nouretdinov and
  Gammerman 2003), and so does their weighted mean;
- one such martingale starts with each block of pictures, so that a change after a long quiet time is found as fast as
  one at the start. Their sum is an e-detector of Shiryaev-Roberts form (Shin, Ramdas and Rinaldo 2024, definition 2.2):
  alarm where it reaches c, and the mean time to a false alarm is at least c blocks (theorem 2.4). By the same
  argument, optional stopping of sum - blocks, an alarm within n blocks has probability at most n / c.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from math import log
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from trivium.kernels import HeadStatistics

from .bundle import Manifest
from .guarantees import DriftReference, DriftStatistic
from .logs import about
from .predictor import Prediction
from .router import symmetric_divergence

BLOCK = 500
"""Pictures that are worked off together. With each block a martingale starts, and at its end the sum is looked at."""
STEP = 25
"""Of these, a divisor."""
FINE, COARSE = 100, 10
"""Most bins of a statistic in the test, and in the population stability index."""
HALF = 0.5
"""Added to each bin's count before its share is taken, so that an empty bin has a logarithm."""
HOLD = 10_000
"""Pictures without another alarm after which one is over."""
EARLIER = np.tri(STEP, k=-1, dtype=np.bool_)
COUNTING = np.arange(1, BLOCK + 1)
CELLS = 100
"""Of [0, 1], in each of which a bet pays the same."""
ROW = Struct("6d")
MODEL = ("model", "version")
_log = logging.getLogger(__name__)


def drift_values(
    statistics: HeadStatistics, class_id: NDArray[np.integer[Any]], heads: Sequence[str], head: str
) -> dict[DriftStatistic, NDArray[np.float64]]:
    """What is watched of N pictures, float64 [N] each.

    Entropy, mutual information and energy are of the head `head`, divergence is what clean and robust differ by, where
    `heads`, the statistics' own, have both; class_id, [N], is what was answered.
    """
    k = heads.index(head)
    values: dict[DriftStatistic, NDArray[np.float64]] = {
        "predictive_entropy": statistics.predictive_entropy[:, k].astype(np.float64),
        "mutual_information": statistics.mutual_information[:, k].astype(np.float64),
        "energy": statistics.energy[:, k].astype(np.float64),
        "class_id": class_id.astype(np.float64),
    }
    if {"clean", "robust"} <= set(heads):
        values["divergence"] = symmetric_divergence(statistics, heads.index("clean"), heads.index("robust"))
    return values


class Drift:
    """One model's watch, of one thread. `add` takes half a microsecond, and a fifth of a millisecond with each block.

    Args:
        window: pictures that the population stability index is of, at least 1.
        run_length: pictures, at least BLOCK; the mean number until a false alarm is no less, and an alarm within n
            pictures of a stream that is exchangeable with the calibration pictures has probability at most
            n / run_length.
    """

    def __init__(self, manifest: Manifest, reference: DriftReference, window: int, run_length: int) -> None:
        self._told = about(model=manifest.name, version=manifest.version)
        self._head = manifest.heads.index(reference.head)
        both = {"clean", "robust"} <= set(manifest.heads)
        self._pair = (manifest.heads.index("clean"), manifest.heads.index("robust")) if both else (0, 0)
        self.statistics: tuple[DriftStatistic, ...] = tuple(reference.counts)
        fine = [merged(counts, FINE) for counts in reference.counts.values()]
        counts = np.stack(
            [np.bincount(into, own, FINE) for into, own in zip(fine, reference.counts.values(), strict=True)]
        ).astype(np.int64)
        self._test = Martingales(counts)
        # a value's place among the edges -> its bin in the test -> its bin in the index
        self._edges = [np.array(reference.edges.get(name, [])) for name in self.statistics]
        self._fine = fine
        self._coarse = [merged(own, COARSE) for own in counts]
        self._expected = [np.bincount(into, own) for into, own in zip(self._coarse, counts, strict=True)]
        self._window = np.empty((len(self.statistics), 0), np.uint8)
        self.window = window
        self._rows = bytearray(ROW.size * BLOCK)
        self._filled = 0
        self.limit = log(run_length / BLOCK)
        self.alarms = 0
        self._quiet = HOLD
        """Pictures since the last alarm."""

    def add(self, prediction: Prediction) -> None:
        """Take in one answered picture; every BLOCK-th works them off."""
        k, (clean, robust) = self._head, self._pair
        ROW.pack_into(
            self._rows,
            ROW.size * self._filled,
            prediction.predictive_entropy.item(k),
            prediction.mutual_information.item(k),
            prediction.divergence.item(clean, robust),
            prediction.divergence.item(robust, clean),
            prediction.energy.item(k),
            prediction.class_id,
        )
        self._filled += 1
        if self._filled == BLOCK:
            self._filled = 0
            entropy, information, one, other, energy, class_id = np.frombuffer(self._rows).reshape(BLOCK, 6).T
            self.work(
                {
                    "predictive_entropy": entropy,
                    "mutual_information": information,
                    "divergence": 0.5 * (one + other),
                    "energy": energy,
                    "class_id": class_id,
                }
            )

    def work(self, values: dict[DriftStatistic, NDArray[np.float64]]) -> None:
        """Take in one block: BLOCK values, as of drift_values, of each statistic that the reference has."""
        bins = np.stack(
            [
                into[values[name].astype(np.intp) if name == "class_id" else edges.searchsorted(values[name])]
                for name, into, edges in zip(self.statistics, self._fine, self._edges, strict=True)
            ]
        )
        self._window = np.concatenate([self._window, bins.astype(np.uint8)], axis=1)[:, -self.window :]
        self._test.bet(bins)
        self._quiet += BLOCK
        if self._test.evidence >= self.limit:
            if not self.alarm:
                by = self.statistics[self._test.strongest]
                _log.warning("drift: pictures are unlike the calibration pictures, most by %s", by, extra=self._told)
            self.alarms += 1
            self._quiet = 0
            # from the calibration pictures alone: what has been unlike them must not become what is compared with
            self._test.restart()

    @property
    def alarm(self) -> bool:
        """From an alarm on until HOLD pictures came without another."""
        return self._quiet < HOLD

    @property
    def evidence(self) -> float:
        """Natural logarithm of the e-detector, at the last block's end; the alarm is raised at `limit`."""
        return self._test.evidence

    @property
    def pictures(self) -> int:
        """In the window now."""
        return self._window.shape[1]

    def stability(self) -> dict[DriftStatistic, float]:
        """Population stability index of each statistic, in nats; none before the window is full.

        Sum over bins of (q - p) * log(q / p), the symmetrised Kullback-Leibler divergence: p is the bin's share of the
        calibration pictures, q of the window's, each with HALF added to every count. Above 0.1 is commonly called a
        moderate and above 0.25 a large change (Siddiqi 2006); without any, about 9 (1 / pictures + 1 / window).
        """
        if self.pictures < self.window:
            return {}
        result = {}
        for name, into, own, expected in zip(self.statistics, self._coarse, self._window, self._expected, strict=True):
            counts = np.bincount(into[own], minlength=len(expected))
            p, q = ((one + HALF) / (one + HALF).sum() for one in (expected, counts))
            result[name] = float(((q - p) * np.log(q / p)).sum())
        return result


class Martingales:
    """The sequential test: one e-detector, the weighted sum of one for each statistic and bet.

    Args:
        counts: calibration pictures in each bin of each statistic, [S, B].
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self._reference = counts
        rows, width = counts.shape
        self._offset = (width * np.arange(rows * BLOCK // STEP).repeat(STEP)).reshape(rows, BLOCK)
        # counter-based, and of a fixed key: the same stream gives the same alarms
        self._ties = np.random.Generator(np.random.Philox(key=0))
        self._log_weight = LOG_WEIGHTS - log(len(counts))
        self.restart()

    def restart(self) -> None:
        """Forget the stream."""
        self._counts = self._reference.copy()
        self._log_sum = np.full((len(self._reference), len(LOG_BETS)), -np.inf)

    def p_values(self, bins: NDArray[np.intp]) -> NDArray[np.float64]:
        """Of a block, [S, BLOCK], from its pictures' bins, [S, BLOCK]; those to come are compared with them too.

        (pictures in higher bins + theta * pictures in the same bin) / pictures, among those before and this one; theta
        is uniform in [0, 1), so that ties, and bins for that matter, leave p uniform. It is each picture's own, and all
        its statistics': each has martingales of its own, whose sum asks for no independence.
        """
        rows, width = self._counts.shape
        count = BLOCK // STEP
        # what comes before a step of some pictures is counted in bins; within it each is compared with each
        place = (self._offset + bins).ravel()
        steps = np.bincount(place, minlength=rows * count * width).reshape(rows, count, width)
        after = self._counts[:, None] + steps.cumsum(1)
        before = after - steps
        beyond = before[:, :, ::-1].cumsum(2)[:, :, ::-1] - before
        self._counts = after[:, -1]
        small = bins.astype(np.uint8).reshape(rows, count, STEP)
        this, other = small[:, :, :, None], small[:, :, None, :]
        # einsum sums short rows of bytes three times as fast as sum
        higher = beyond.ravel()[place].reshape(small.shape)
        higher += np.einsum("abcd->abc", ((other > this) & EARLIER).view(np.uint8))
        equal = before.ravel()[place].reshape(small.shape) + 1
        equal += np.einsum("abcd->abc", ((other == this) & EARLIER).view(np.uint8))
        total = before[0, 0].sum() + COUNTING
        p: NDArray[np.float64] = (higher + self._ties.random((count, STEP)) * equal).reshape(bins.shape) / total
        return p

    def bet(self, bins: NDArray[np.intp]) -> None:
        """Start martingales, and bet them and those before on a block."""
        cells = (self.p_values(bins) * CELLS).astype(np.intp)
        rows = len(cells)
        cells += CELLS * np.arange(rows)[:, None]
        histogram = np.bincount(cells.ravel(), minlength=rows * CELLS).reshape(rows, CELLS)
        self._log_sum = np.logaddexp(self._log_sum, 0) + histogram @ LOG_BETS.T

    @property
    def evidence(self) -> float:
        """Natural logarithm of the weighted sum; -inf at the start."""
        return float(np.logaddexp.reduce(self._log_sum + self._log_weight, axis=None))

    @property
    def strongest(self) -> int:
        """The statistic whose bets won most."""
        return int(np.logaddexp.reduce(self._log_sum + self._log_weight, axis=1).argmax())


def merged(counts: Sequence[int], bins: int) -> NDArray[np.intp]:
    """For each bin, into which of at most `bins` neighbouring ones of about equal counts it goes; [B], ascending."""
    upper = np.cumsum(counts, dtype=np.float64)
    middle = (upper - np.asarray(counts) / 2) / max(upper[-1], 1.0)
    return np.unique(np.minimum(np.floor(bins * middle), bins - 1), return_inverse=True)[1].astype(np.intp)


def _bets() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithms of what F bets pay in each cell, [F, CELLS], each with mean payment 1, and of their weights, [F].

    Half of the weight bets on one tail, as where a share e of the pictures has higher (or lower) values: p of density
    1 - e + e * a * p^(a - 1), the mixture of no change and a power martingale's bet. The other half bets on a tenth
    of [0, 1]: a bin, or a class, that comes more often.
    """
    edges = np.linspace(0, 1, CELLS + 1)
    tails = [1 - e + e * CELLS * np.diff(edges**a) for a in (0.1, 0.4) for e in (0.03, 0.1, 0.3, 0.8)]
    tails += [bet[::-1] for bet in tails]
    tenths = [
        1 - e + e * COARSE * (np.arange(CELLS) * COARSE // CELLS == tenth)
        for tenth in range(COARSE)
        for e in (0.05, 0.3)
    ]
    weights = [0.5 / len(tails)] * len(tails) + [0.5 / len(tenths)] * len(tenths)
    return np.log(tails + tenths), np.log(weights)


LOG_BETS, LOG_WEIGHTS = _bets()


def watch(manifest: Manifest, window: int, run_length: int) -> Drift | None:
    """A model's watch, as Drift; None where `window` is 0, or the bundle has nothing to compare with."""
    if not window or manifest.guarantees is None:
        return None
    return Drift(manifest, manifest.guarantees.drift, window, run_length)


def drift_families(watched: Iterable[tuple[tuple[str, str], Drift]]) -> Iterator[Metric]:
    """What Prometheus is shown of models, by name and version; no families where none is watched."""
    found = list(watched)
    if not found:
        return
    index = GaugeMetricFamily(
        "trivium_drift_psi",
        "Population stability index of the window's pictures against the calibration pictures.",
        labels=(*MODEL, "statistic"),
    )
    size = GaugeMetricFamily("trivium_drift_window_pictures", "Pictures in the window.", labels=MODEL)
    evidence = GaugeMetricFamily(
        "trivium_drift_evidence",
        "log10 of the evidence that pictures are unlike the calibration pictures; 0 or more.",
        labels=MODEL,
    )
    limit = GaugeMetricFamily("trivium_drift_evidence_limit", "log10 of the evidence of an alarm.", labels=MODEL)
    alarm = GaugeMetricFamily(
        "trivium_drift_alarm", f"1 from an alarm on until {HOLD} pictures came without another.", labels=MODEL
    )
    alarms = CounterMetricFamily("trivium_drift_alarms", "Alarms raised.", labels=MODEL)
    for labels, drift in found:
        for name, value in drift.stability().items():
            index.add_metric((*labels, name), value)
        size.add_metric(labels, drift.pictures)
        evidence.add_metric(labels, max(0.0, drift.evidence / log(10)))
        limit.add_metric(labels, drift.limit / log(10))
        alarm.add_metric(labels, drift.alarm)
        alarms.add_metric(labels, drift.alarms)
    yield from (index, size, evidence, limit, alarm, alarms)

"""What a lower precision changes in the answers, measured on real pictures that its calibration never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import ServerError
from trivium.runtime.router import route

from .pack import run


class DriftError(ServerError):
    """A lower precision costs more right answers than --max-drop allows; nothing is written."""

    exit_code = 3


@dataclass(frozen=True)
class Drift:
    """Differences of the routed answers; shares of the pictures, entropies and divergences in nats."""

    pictures: int
    kl_mean: float
    """Of the lower precision's answers from float32's."""
    kl_p95: float
    entropy_change: float
    """Mean of the answers' predictive entropy, lower precision minus float32."""
    entropy_difference: float
    """Mean absolute change, over heads."""
    mutual_information_difference: float
    label_flips: float
    head_flips: float
    accuracy_float32: float | None
    """Where the labels are known."""
    accuracy: float | None

    @property
    def drop(self) -> float:
        """Percentage points of top-1 accuracy lost, or where no labels are known, percent of labels that changed."""
        if self.accuracy is None or self.accuracy_float32 is None:
            return 100 * self.label_flips
        return 100 * (self.accuracy_float32 - self.accuracy)

    def document(self) -> dict[str, float]:
        """For the manifest: what was measured, by name."""
        return {name: float(f"{value:.6g}") for name, value in vars(self).items() if value is not None}

    def table(self, precision: str, source: str) -> Table:
        """For the terminal."""
        title = f"{precision} beside float32 on {self.pictures} held-out {source}"
        result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False)
        result.add_column("measure")
        result.add_column("value", justify="right")
        if self.accuracy is not None and self.accuracy_float32 is not None:
            result.add_row("accuracy, float32", f"{self.accuracy_float32:.2%}")
            result.add_row(f"accuracy, {precision}", f"{self.accuracy:.2%}")
        result.add_row("labels that changed", f"{self.label_flips:.2%}")
        result.add_row("heads that changed", f"{self.head_flips:.2%}")
        result.add_row("KL of the answers, mean / 95th percentile, nats", f"{self.kl_mean:.4f} / {self.kl_p95:.4f}")
        result.add_row("change of the answers' entropy, mean, nats", f"{self.entropy_change:+.4f}")
        result.add_row("|change| of the heads' entropy, mean, nats", f"{self.entropy_difference:.4f}")
        result.add_row("|change| of the heads' mutual information, nats", f"{self.mutual_information_difference:.4f}")
        return result


def measure(
    model: onnx.ModelProto,
    reduced: onnx.ModelProto,
    manifest: Manifest,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
) -> Drift:
    """Compare a model of lower precision with the float32 one, both with heads and routed by the manifest's default.

    Args:
        images: uint8 [N, H, W, 3].
        labels: [N], where they are known.
    """
    return compare(run(model, images), run(reduced, images), manifest, labels)


def compare(
    before: HeadStatistics, after: HeadStatistics, manifest: Manifest, labels: NDArray[np.int64] | None
) -> Drift:
    """As measure, of statistics that are known."""
    old, new = route(before, manifest), route(after, manifest)
    p, q = old.probabilities.astype(np.float64), new.probabilities.astype(np.float64)
    log_p, log_q = (np.log(np.maximum(values, 1e-30)) for values in (p, q))
    kl = np.maximum((p * (log_p - log_q)).sum(1), 0)
    entropy = (p * log_p - q * log_q).sum(1)
    right = None if labels is None else [float((routed.class_id == labels).mean()) for routed in (old, new)]
    return Drift(
        pictures=len(p),
        kl_mean=float(kl.mean()),
        kl_p95=float(np.quantile(kl, 0.95)),
        entropy_change=float(entropy.mean()),
        entropy_difference=float(np.abs(after.predictive_entropy - before.predictive_entropy).mean()),
        mutual_information_difference=float(np.abs(after.mutual_information - before.mutual_information).mean()),
        label_flips=float((old.class_id != new.class_id).mean()),
        head_flips=float(np.mean([a != b for a, b in zip(old.head, new.head, strict=True)])),
        accuracy_float32=right[0] if right else None,
        accuracy=right[1] if right else None,
    )


def check(drift: Drift, most: float) -> None:
    """Raise DriftError where more is lost than `most`, in percentage points; written so that a NaN is refused."""
    if not drift.drop <= most:
        what = "top-1 accuracy drops by" if drift.accuracy is not None else "labels that change:"
        unit = "points" if drift.accuracy is not None else "%"
        raise DriftError(
            f"{what} {drift.drop:.2f} {unit} on {drift.pictures} held-out pictures, more than --max-drop {most:g}"
        )

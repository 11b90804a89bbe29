"""Do all ways to compute a bundle's answers agree? Measured at export, on real pictures where there are some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike, NDArray
from onnx import helper
from rich.box import SIMPLE_HEAD
from rich.table import Table

from trivium.kernels import HeadStatistics, mc_heads_ref
from trivium.runtime.bundle import Bundle, Dropout, Manifest, Preprocessing
from trivium.runtime.engine import Engine
from trivium.runtime.errors import ServerError
from trivium.runtime.promises import abstentions, prediction_sets, terms
from trivium.runtime.router import route
from trivium.train.models.mc import Heads, predict

from .graph import IMAGE, OUTPUTS
from .onnx import FEATURES, masks_of
from .pack import session
from .router_graph import PROMISED, ROUTED, folded, outputs

BATCH = 8
"""Pictures that torch is asked about at once."""
Limits = dict[str, float]
REFERENCE_LIMITS: Limits = {name: 1e-5 if name == "probabilities" else 1e-4 for name in OUTPUTS}
"""Float32 passes of the heads against float64 ones on the same features: rounding, more of it with larger logits."""
TORCH_LIMITS: Limits = {name: 1e-3 if name == "probabilities" else 1e-2 for name in OUTPUTS}
"""The whole model in ONNX Runtime against torch: another order of sums in every layer of a deep backbone."""
FUSED_LIMITS: Limits = {name: 1e-5 if name == "probabilities" else 1e-4 for name in OUTPUTS}
"""The fused kernel against the function: another order of sums in the heads alone."""
ROUNDING_LIMITS: Limits = {name: 2e-2 if name == "probabilities" else 1e-1 for name in OUTPUTS}
"""Heads rounded to bfloat16, 8 bits of precision, against the weights as they were, in float64 on the same features."""

ROUTER_LIMITS: Limits = {"routed_probabilities": 1e-6} | dict.fromkeys(("class_id", "head", *PROMISED), 0.0)
"""The folded router chooses as runtime.router does, or is refused."""


class ParityError(ServerError):
    """Two implementations of one model disagree by more than their limit; no bundle is written."""

    exit_code = 3


class Difference(NamedTuple):
    """The largest |a - b| / max(1, |b|) over the pictures, for one output of two implementations."""

    implementations: str
    output: str
    value: float
    limit: float

    @property
    def within(self) -> bool:
        """Written so that a NaN is not."""
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.implementations}: {self.output} {self.value:.1e} of {self.limit:g}"


def measure(
    model: onnx.ModelProto,
    bundle: Bundle,
    classifier: Heads,
    images: NDArray[np.uint8],
    temperature: ArrayLike,
    unrounded: NDArray[np.float32] | None = None,
) -> list[Difference]:
    """Compare function, float64 definition, torch and (where its library is installed) the fused kernel.

    Args:
        model: with its heads; the same as in the bundle.
        images: uint8 [N, H, W, 3].
        temperature: [K], as in the model.
        unrounded: [K, C, D], the heads' weights before they were rounded, to show what that changed.
    """
    manifest = bundle.manifest
    features, function = with_features(model, images)
    weights, bias = (value.detach().cpu().numpy() for value in classifier.head_weights())
    masks = masks_of(manifest.dropout, weights.shape[2])
    reference = mc_heads_ref(features, weights, bias, temperature, masks, 1 - manifest.dropout.rate)
    rows = differences("function - float64", function, reference, REFERENCE_LIMITS)
    spoken = in_torch(classifier, manifest.preprocessing, manifest.dropout, images, temperature)
    rows += differences("function - torch", function, spoken, TORCH_LIMITS)
    engine = Engine(bundle)
    if engine.kernels == "fused":
        rows += differences("fused kernel - function", engine.run(images), function, FUSED_LIMITS)
    if unrounded is not None:
        whole = mc_heads_ref(features, unrounded, bias, temperature, masks, 1 - manifest.dropout.rate)
        rows += differences("bfloat16 - float32 heads", reference, whole, ROUNDING_LIMITS)
    return rows


def fused(model: onnx.ModelProto, bundle: Bundle, images: NDArray[np.uint8], precision: str) -> list[Difference]:
    """The fused kernel against the function behind a backbone of lower precision; nothing where it is not installed."""
    engine = Engine(bundle)
    if engine.kernels != "fused":
        return []
    function = with_features(model, images)[1]
    return differences(f"fused - function, {precision}", engine.run(images), function, FUSED_LIMITS)


def routed(model: onnx.ModelProto, manifest: Manifest, images: NDArray[np.uint8]) -> list[Difference]:
    """The folded router against runtime.router on the same statistics: shares of other heads, classes, members of sets
    and abstentions, and the largest difference of a probability.

    Args:
        model: with the folded router.
    """
    compiled = session(model)
    record = folded(manifest)
    names = [*OUTPUTS, *outputs(record)]
    answers = [compiled.run(names, {IMAGE: images[i : i + 1]}) for i in range(len(images))]
    columns = dict(zip(names, (np.concatenate(column) for column in zip(*answers, strict=True)), strict=True))
    statistics = HeadStatistics(*(columns.pop(name) for name in OUTPUTS))
    probabilities, class_id, head = (columns.pop(name) for name in ROUTED)
    expected, asked = route(statistics, manifest), terms(manifest)
    found = {
        "routed_probabilities": float(np.max(np.abs(probabilities - expected.probabilities))),
        "class_id": float((class_id != expected.class_id).mean()),
        "head": float(np.mean([record.heads[i] != name for i, name in zip(head, expected.head, strict=True)])),
    }
    if (guarantees := manifest.guarantees) is not None and asked is not None:
        promised = {
            "prediction_set": prediction_sets(expected, guarantees, asked.quantile),
            "abstain": abstentions(expected, statistics, manifest, asked),
        }
        found |= {name: float((column != promised[name]).mean()) for name, column in columns.items()}
    return [Difference("folded router - NumPy", name, value, ROUTER_LIMITS[name]) for name, value in found.items()]


def with_features(model: onnx.ModelProto, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], HeadStatistics]:
    """The features that enter the heads and the function's answers, from one run of ONNX Runtime a picture."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.append(helper.make_empty_tensor_value_info(FEATURES))
    compiled = session(opened)
    answers = [compiled.run([FEATURES, *OUTPUTS], {IMAGE: images[i : i + 1]}) for i in range(len(images))]
    features, *outputs = (np.concatenate(column) for column in zip(*answers, strict=True))
    return features, HeadStatistics(*outputs)


def in_torch(
    classifier: Heads,
    preprocessing: Preprocessing,
    dropout: Dropout,
    images: NDArray[np.uint8],
    temperature: ArrayLike,
) -> HeadStatistics:
    """The same answers from torch: training's normalisation, the module's own features, training's passes."""
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
    return predict(classifier, iter(pictures.split(BATCH)), preprocessing, dropout, temperature)[0]


def differences(
    implementations: str, found: HeadStatistics, expected: HeadStatistics, limits: Limits
) -> list[Difference]:
    """One row an output."""
    return [
        Difference(implementations, name, float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)))), limits[name])
        for name, a, b in zip(OUTPUTS, found, expected, strict=True)
    ]


def worst(rows: Sequence[Difference]) -> Difference:
    """The row that comes nearest to its limit, or is farthest beyond it."""
    return max(rows, key=lambda row: (not row.within, row.value / row.limit if row.limit else 0.0))


def check(rows: Sequence[Difference]) -> None:
    """Raise ParityError, naming the worst row, where one is beyond its limit."""
    row = worst(rows)
    if not row.within:
        raise ParityError(f"{row.implementations}: {row.output} differs by {row.value:.2g}, more than {row.limit:g}")


def tolerances(rows: Sequence[Difference]) -> dict[str, float]:
    """What the manifest keeps, say {"function - torch: energy": 2e-7}; two digits, so that it reads well."""
    return {f"{row.implementations}: {row.output}": float(f"{row.value:.1e}") for row in rows}


def table(rows: Sequence[Difference], pictures: str) -> Table:
    """For the terminal."""
    result = Table(title=f"parity on {pictures}: largest |a - b| / max(1, |b|)", title_justify="left", box=SIMPLE_HEAD)
    for column in ("implementations", "output", "difference", "limit"):
        result.add_column(column, justify="left" if column in ("implementations", "output") else "right")
    for row in rows:
        style = None if row.within else "bold red"
        result.add_row(row.implementations, row.output, f"{row.value:.1e}", f"{row.limit:g}", style=style)
    return result

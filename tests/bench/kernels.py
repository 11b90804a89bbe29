"""What 32 Monte-Carlo passes cost: heads in every form, each run right behind its backbone, in thread CPU time.

A head's weights are cold when its turn comes, as in a server: the backbone has run in between. All variants take
turns within one round, so that a noisy neighbour meets them all, and medians over the rounds are compared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from trivium.kernels import custom_ops_library, dropout_masks, mc_heads_ref
from trivium.kernels.onnx_op import MODE_ENTRY, WEIGHTS_ENTRY

from . import models

PLAIN = "plain heads"
BODY = "onnx body"
SETTINGS = {
    "fused float32": {WEIGHTS_ENTRY: "float32"},
    "fused bfloat16": {WEIGHTS_ENTRY: "bfloat16"},
    "hybrid bfloat16": {WEIGHTS_ENTRY: "bfloat16", MODE_ENTRY: "hybrid"},
}
"""Session configuration entries of each form of the fused operator."""
VARIANTS = (BODY, *SETTINGS)


@dataclass(frozen=True)
class Row:
    """One line of the table; times are medians of thread CPU time."""

    model: str
    classes: int
    batch: int
    passes: int
    variant: str
    cpu_ms: float
    """Of the heads alone."""
    backbone_ms: float
    ratio_to_backbone: float
    """(backbone + this variant) / backbone."""
    ratio_to_plain_heads: float
    """(backbone + this variant) / (backbone + three plain heads)."""
    speedup_over_body: float
    """Heads alone: pure ONNX body over this variant; 0 for the plain heads, which do another job."""


def session(model: str | bytes, entries: dict[str, str] | None = None) -> onnxruntime.InferenceSession:
    """A session of one thread, with the fused operator where `entries` are given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if entries is not None:
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        options.register_custom_ops_library(str(custom_ops_library()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def head_sessions(
    heads: models.Task, passes: Iterable[int], variants: Iterable[str]
) -> dict[tuple[str, int], onnxruntime.InferenceSession]:
    """A session for each (variant, passes), and one for the plain heads as (PLAIN, 1)."""
    sessions = {(PLAIN, 1): session(models.plain_heads(heads))}
    for t in passes:
        graph = models.mc_heads(heads, t)
        sessions |= {(variant, t): session(graph, SETTINGS.get(variant)) for variant in variants}
    return sessions


def measure(
    title: str,
    classes: int,
    batch: int,
    passes: Iterable[int],
    rounds: int,
    folder: Path,
    variants: Iterable[str] = VARIANTS,
) -> list[Row]:
    """Time all variants of one model and batch size."""
    units = models.BACKBONES[title][1]
    body = session(str(models.backbone(title, folder)))
    image = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    heads = models.task(units, classes, batch)
    inputs = {"features": heads.features}
    sessions = head_sessions(heads, passes, variants)
    for t in passes:
        check(heads, t, {variant: sessions[variant, t].run(None, inputs) for variant in variants})
    backbone_times: list[float] = []
    times: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
    for _ in range(rounds):
        for key, head in sessions.items():
            backbone_times.append(cpu_ms(partial(body.run, None, {"image": image})))
            times[key].append(cpu_ms(partial(head.run, None, inputs)))
    medians = {key: statistics.median(values) for key, values in times.items()}
    return rows(title, classes, batch, statistics.median(backbone_times), medians)


def rows(title: str, classes: int, batch: int, backbone: float, medians: dict[tuple[str, int], float]) -> list[Row]:
    """The table's lines from medians in ms."""
    plain = medians[PLAIN, 1]
    return [
        Row(
            title,
            classes,
            batch,
            passes,
            variant,
            ms,
            backbone,
            (backbone + ms) / backbone,
            (backbone + ms) / (backbone + plain),
            medians.get((BODY, passes), 0.0) / ms,
        )
        for (variant, passes), ms in medians.items()
    ]


def cpu_ms(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def check(heads: models.Task, passes: int, outputs: dict[str, list[NDArray[np.float32]]]) -> None:
    """Nothing wrong is timed: exact forms agree with the definition, the hybrid comes near it.

    Raises: RuntimeError where one does not.
    """
    masks = dropout_masks(passes, heads.weights.shape[2], models.KEEP, seed=0)
    ones = np.ones(models.HEADS, np.float32)
    expected = mc_heads_ref(heads.features, heads.weights, heads.bias, ones, masks, models.KEEP)
    for variant, out in outputs.items():
        error = float(np.abs(out[0] - expected.probabilities).max())
        if error > (0.05 if variant.startswith("hybrid") else 2e-6):
            raise RuntimeError(f"{variant}, T {passes}: a probability is off by {error:.1e}")


def table(lines: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    head = (
        "| model | C | B | T | heads | CPU ms | backbone ms | (backbone + heads) / backbone "
        "| against plain heads | faster than ONNX body |"
    )
    text = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for r in lines:
        speedup = f"{r.speedup_over_body:.2f}" if r.variant not in (PLAIN, BODY) and r.speedup_over_body else ""
        text.append(
            f"| {r.model} | {r.classes} | {r.batch} | {r.passes} | {r.variant} | {r.cpu_ms:.3f} | {r.backbone_ms:.2f} "
            f"| {r.ratio_to_backbone:.3f} | {r.ratio_to_plain_heads:.4f} | {speedup} |"
        )
    return "\n".join(text)


def summary(lines: Iterable[Row]) -> str:
    """What batch 1 with 32 passes and 1000 classes costs beside plain heads, a line a form of the heads."""
    text = ["(backbone + heads) / (backbone + three plain heads), B 1, T 32, C 1000:"]
    for r in lines:
        if (r.batch, r.passes, r.classes) == (1, 32, 1000):
            faster = f", {r.speedup_over_body:.1f} times faster than the ONNX body" if r.variant in SETTINGS else ""
            text.append(f"  {r.model:20} {r.variant:16} {r.ratio_to_plain_heads:.3f}{faster}")
    return "\n".join(text)


def write(lines: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": [asdict(row) for row in lines]}, indent=1) + "\n", encoding="utf-8")

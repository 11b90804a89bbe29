"""One architecture through the export, compared with torch; what came of it is kept in build/zoo."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trivium.export.graph import IMAGE, OUTPUTS
from trivium.export.onnx import FEATURES, add_heads, export_backbone, masks_of
from trivium.export.operators import UnsupportedOperator
from trivium.export.pack import golden_pictures, session
from trivium.export.parity import TORCH_LIMITS, differences
from trivium.export.source import Source, package_versions, timm_source
from trivium.export.tensorrt import prepare
from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Dropout, Preprocessing
from trivium.runtime.errors import TriviumError
from trivium.train.models.backbone import create, preprocessing_of
from trivium.train.models.mc import mc_statistics, normalise

from .architectures import Architecture

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "zoo"
BATCHES = (1, 3)
"""Torch traces the model with two pictures."""
SEED = 0
"""Of weights and pictures; the running statistics are those of the pictures that are compared, which others of their
kind exceed in a net of random weights by orders of magnitude."""
DROPOUT = Dropout(rate=0.5, passes=8, seed=SEED)
FEATURE_LIMIT = 1e-3
"""Of |a - b| beside the largest feature: the order of sums in every layer of a deep net of random weights."""
LOGIT_DEVIATION = 3.0
"""Of the drawn heads: answers that are neither all alike nor certain."""
DECIDING = (
    *(
        f"export/{name}"
        for name in ("graph.py", "onnx.py", "operators.py", "source.py", "tensorrt.py", "tensorrt_operators.yaml")
    ),
    *(f"train/models/{name}.py" for name in ("backbone", "mc", "stages")),
    "tests/zoo/trial.py",
)
"""The files that a kept outcome depends on, beside the packages."""


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture; the numbers are None where it did not come so far."""

    name: str
    key: str
    """Of sources and packages."""
    parameters: int | None = None
    nodes: int | None = None
    """Of the whole graph, MCHeads being one."""
    tensorrt: str = ""
    """Which operator TensorRT would not take of this graph, by its list; empty where it takes them all."""
    cpu_seconds: float | None = None
    """Of reading the weights, finding stages and head, exporting and checking."""
    difference: dict[str, float] | None = None
    """By batch: the largest over features, beside the largest of them, and answers, beside max(1, |b|)."""
    reason: str = ""
    """Why it does not pass; empty where it does."""


@cache
def key() -> str:
    """Changes with whatever an outcome depends on; that of the moment when this process began."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in DECIDING)
    return hashlib.sha256((text + json.dumps(package_versions(), sort_keys=True)).encode()).hexdigest()[:16]


def kept(name: str) -> Outcome | None:
    """The outcome of an earlier trial of the same sources with the same packages."""
    try:
        found = Outcome(**json.loads((OUT / f"{name}.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # of an older form
        return None
    return found if found.key == key() else None


def outcome(architecture: Architecture, wait: bool = True) -> Outcome | None:
    """What came of an architecture, from an earlier trial or a new one.

    Args:
        wait: for another process that tries it at this moment; else the answer is None then.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / f"{architecture.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        found = kept(architecture.name)
        if found is None:
            found = attempt(architecture.name)
            draft = OUT / f"{architecture.name}.json.new"
            draft.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
            os.replace(draft, OUT / f"{architecture.name}.json")
    gc.collect()
    return found


def attempt(name: str) -> Outcome:
    """Export an architecture at random weights and compare it with torch."""
    current = key()
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        weights = Path(folder) / "random.safetensors"
        draw_weights(name, weights)
        start = time.process_time()
        try:
            source = timm_source(
                name, weights=weights, labels=None, dropout=DROPOUT, preprocessing={}, say=lambda text: None
            )
            model = add_heads(
                export_backbone(source.classifier, source.preprocessing), source.classifier, DROPOUT, [1.0]
            )
        except TriviumError as error:
            return Outcome(name, current, reason=str(error))
        seconds = time.process_time() - start
    try:
        prepare(model)
        tensorrt = ""
    except UnsupportedOperator as error:
        tensorrt = str(error)
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.append(helper.make_empty_tensor_value_info(FEATURES))
    compiled = session(opened)
    images = golden_pictures(source.preprocessing, SEED)
    difference, reason = {}, ""
    for batch in BATCHES:
        features, *answers = compiled.run([FEATURES, *OUTPUTS], {IMAGE: images[:batch]})
        largest, beyond = compare(source, images[:batch], features, HeadStatistics(*answers))
        difference[str(batch)] = largest
        reason = reason or (beyond and f"B={batch}: {beyond}")
    return Outcome(
        name,
        current,
        parameters=sum(p.numel() for p in source.classifier.parameters()),  # type: ignore[attr-defined]
        nodes=len(model.graph.node),
        tensorrt=tensorrt,
        cpu_seconds=round(seconds, 1),
        difference=difference,
        reason=reason,
    )


@torch.no_grad()
def compare(
    source: Source, images: NDArray[np.uint8], features: NDArray[np.float32], answers: HeadStatistics
) -> tuple[float, str]:
    """The largest difference to torch, and what is beyond its limit, if anything is."""
    x = normalise(torch.from_numpy(images).permute(0, 3, 1, 2), source.preprocessing)
    spoken = source.classifier.features(x)
    weights, bias = source.classifier.head_weights()
    masks = masks_of(DROPOUT, weights.shape[2])
    expected = mc_statistics(spoken, weights, bias, [1.0], masks, 1 - DROPOUT.rate)
    truth = spoken.numpy()
    of_features = float(np.max(np.abs(features - truth)) / np.max(np.abs(truth)))
    rows = differences("function - torch", answers, expected, TORCH_LIMITS)
    beyond = [str(row) for row in rows if not row.within]
    if not of_features <= FEATURE_LIMIT:
        beyond.insert(0, f"features {of_features:.1e} of {FEATURE_LIMIT:g}")
    if len(images) > 1 and not np.ptp(truth, axis=0).max() > 1e-2 * np.abs(truth).max():
        beyond.append("the pictures' features hardly differ, so that their comparison says little")
    return max(of_features, *(row.value for row in rows)), "; ".join(beyond)


@torch.no_grad()
def draw_weights(name: str, path: Path) -> None:
    """Weights under which every layer matters, written as safetensors.

    As they are initialised, many nets hide their depth: branches scaled by 1e-6 or 0, heads of zeros, running
    statistics that fit no picture.
    """
    torch.manual_seed(SEED)
    model = create(name, None).eval()
    settings = preprocessing_of(model)
    for module in model.modules():
        norm = isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))
        for label, parameter in module.named_parameters(recurse=False):
            if norm and label == "weight":
                parameter.uniform_(0.5, 1.5)
            elif parameter.min() == parameter.max():
                value = float(parameter.flatten()[0])
                parameter.uniform_(value - 0.1, value + 0.1) if value in (0, 1) else parameter.uniform_(0.1, 0.3)
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    pictures = _pictures(settings)
    model(pictures)
    model.eval()
    logits, head = model(pictures), model.get_classifier()  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        head.weight.mul_(LOGIT_DEVIATION / logits.std())
    save_file({key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}, path)


def _pictures(settings: Preprocessing) -> torch.Tensor:
    return normalise(torch.from_numpy(golden_pictures(settings, SEED)).permute(0, 3, 1, 2), settings)

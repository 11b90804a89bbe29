"""What is exported: a trained student, or an existing timm classifier as it is, with all that a manifest says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trivium.runtime.bundle import Dropout, Preprocessing, digest
from trivium.runtime.errors import ConfigError
from trivium.train.checkpoint import load_student
from trivium.train.data.pictures import Pictures, load_described
from trivium.train.models.backbone import wrap_timm
from trivium.train.models.mc import Heads
from trivium.train.sections import CalibrationSpec

from .labels import imagenet_labels, read_labels

PACKAGES = ("trivium", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")
"""Whose versions decide a bundle's bytes."""


@dataclass(frozen=True)
class Source:
    """A classifier and what is known of it."""

    name: str
    """What the model is called unless the user says otherwise."""
    classifier: Heads
    classes: Sequence[str]
    preprocessing: Preprocessing
    dropout: Dropout
    provenance: dict[str, Any]
    """Where it comes from: no times, no paths, so that the same input gives the same bundle anywhere."""
    training: dict[str, Any] = field(default_factory=dict)
    pictures: Pictures | None = None
    """The checkpoint's calibration split; None where nothing is to be calibrated."""
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    """The recipe's."""
    unrounded: NDArray[np.float32] | None = None
    """[K, C, D]: the heads' weights before they were rounded to bfloat16; None where they were not."""


def checkpoint_source(
    path: Path, *, dropout: dict[str, Any], data: Path | None, calibrate: bool, bfloat16: bool = True
) -> Source:
    """A trained student with its calibration pictures.

    Args:
        dropout: fields of Dropout that differ from the checkpoint's.
        data: where the pictures lie now, if they moved since training.
        calibrate: open the calibration split.
        bfloat16: round the heads' weights.

    Raises: CheckpointError; ConfigError where the pictures are gone or are not those of the training.
    """
    student, meta = load_student(path)
    pictures = load_described(meta.data, "calibration", meta.preprocessing, root=data) if calibrate else None
    provenance = {
        "source": "checkpoint",
        "weights_sha256": meta.weights_sha256,
        "recipe": without_directories(meta.recipe),
        "data": without_directories({key: value for key, value in meta.data.items() if key != "classes"}),
        "packages": meta.packages | package_versions(),
    }
    unrounded = round_heads(student, student.heads) if bfloat16 else None
    training = {"costs": {stage: cost.model_dump() for stage, cost in meta.costs.items()}, "results": meta.results}
    return Source(
        name=meta.name,
        classifier=student,
        classes=meta.classes,
        preprocessing=meta.preprocessing,
        dropout=meta.dropout.model_copy(update=dropout),
        provenance=provenance,
        training=training,
        pictures=pictures,
        calibration=CalibrationSpec.model_validate(meta.recipe.get("calibration", {})),
        unrounded=unrounded,
    )


def timm_source(
    name: str,
    *,
    weights: Path | None,
    labels: Path | None,
    dropout: Dropout,
    preprocessing: dict[str, Any],
    say: Callable[[str], None],
    bfloat16: bool = True,
) -> Source:
    """A timm classifier with its one head, "original"; weights None takes those of the hub's cache.

    bfloat16: round the head's weights.

    Raises: ConfigError in one line for an unknown name, weights that do not fit, and classes without names.
    """
    names = read_labels(labels) if labels else None
    classifier, settings = wrap_timm(
        name, weights or "hub", preprocessing=preprocessing, dropout_rate=dropout.rate, say=say
    )
    count = classifier.head.out_features
    if names is None:
        names = imagenet_labels(count)
        if names is None:
            raise ConfigError(f"{name} has {count} classes; give their names, one a line, with --labels FILE")
        say(f"class names: ImageNet-1k's, which {name} answers in unless its weights say otherwise (--labels)")
    if len(names) != count:
        raise ConfigError(f"--labels {labels}: {len(names)} names, but {name} has {count} classes")
    provenance = {
        "source": "timm",
        "model": name,
        "weights": weights.name if weights else "hub",
        "weights_sha256": digest(weights) if weights else None,
        "packages": package_versions(),
    }
    unrounded = round_heads(classifier, [classifier.head]) if bfloat16 else None
    return Source(name, classifier, names, settings, dropout, provenance, unrounded=unrounded)


def round_heads(classifier: Heads, heads: Iterable[nn.Module]) -> NDArray[np.float32]:
    """Round the weights of the linear heads to the nearest bfloat16, in place; returns what they were, [K, C, D].

    Every implementation then computes with the same numbers, and the fused kernel, which is bound by the memory that
    it reads, holds them in half the bytes without losing anything more.
    """
    before = classifier.head_weights()[0].detach().cpu().numpy().copy()
    for head in heads:
        if isinstance(head, nn.Linear):
            head.weight.data = head.weight.data.to(torch.bfloat16).float()
    return before


def package_versions() -> dict[str, str]:
    """Installed versions of PACKAGES."""
    return {name: version(name) for name in PACKAGES if find_spec(name)}


def without_directories(value: Any) -> Any:
    """A JSON document in which every absolute path is only its last part: a bundle tells nobody's directories."""
    if isinstance(value, dict):
        return {key: without_directories(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_directories(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

"""The checkpoint: a directory with checkpoint.json and student.safetensors, from which export and evaluation start."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trivium.runtime.bundle import Dropout, Preprocessing, digest
from trivium.runtime.errors import ClientError, TriviumError
from trivium.runtime.values import Name

from .models.backbone import create, split
from .models.stages import Classifier
from .models.student import Student, Tail

SCHEMA_VERSION = 1
CHECKPOINT = "checkpoint.json"
WEIGHTS = "student.safetensors"
PACKAGES = ("trivium", "torch", "timm", "numpy", "safetensors")


class CheckpointError(ClientError):
    """A checkpoint that is absent, damaged, or of a schema that this release does not read."""


class Cost(BaseModel):
    """What a stage took, all its resumed parts together; the part of an epoch lost to a kill is not in it."""

    model_config = ConfigDict(extra="forbid")

    cpu_seconds: float = 0.0
    """Of all threads of the process."""
    wall_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Wall seconds times graphics cards; 0 of what ran on none."""
    pictures: int = 0
    """Pictures learned from, counted each time."""
    epochs: int = 0
    parameters: int = 0
    """Parameters that were tuned."""
    resumed: int = 0
    """Times the stage went on from an epoch on disk."""


class Architecture(BaseModel):
    """How to build the student before its weights are loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """timm's name."""
    kwargs: dict[str, Any] = {}
    depth: int
    tail: Tail
    freeze_norm: bool = False


class CheckpointMeta(BaseModel):
    """checkpoint.json, schema version 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["trivium-checkpoint"] = "trivium-checkpoint"
    schema_version: Literal[1] = 1
    name: Name
    classes: list[str] = Field(min_length=1)
    heads: list[Name] = Field(min_length=1)
    preprocessing: Preprocessing
    dropout: Dropout
    architecture: Architecture
    data: dict[str, Any]
    """Pictures.describe() of the data; train.data.load_described opens the same splits again."""
    recipe: dict[str, Any]
    costs: dict[str, Cost]
    """By stage."""
    results: dict[str, Any] = {}
    """Accuracies on the calibration split at the end of each stage, and the teacher's check."""
    packages: dict[str, str]
    weights_sha256: str


def save_checkpoint(directory: Path, student: Student, meta: CheckpointMeta) -> Path:
    """Write student.safetensors and, last, checkpoint.json; a kill in between leaves none that looks whole.

    `weights_sha256` of meta is replaced. Returns the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CHECKPOINT).unlink(missing_ok=True)
    save_tensors(directory / WEIGHTS, student.state_dict())
    meta = meta.model_copy(update={"weights_sha256": digest(directory / WEIGHTS)})
    write_json(directory / CHECKPOINT, meta.model_dump(mode="json"))
    return directory


def load_student(path: str | os.PathLike[str]) -> tuple[Student, CheckpointMeta]:
    """The student of a checkpoint directory, in eval mode on the CPU, and what is known of it.

    Raises: CheckpointError with one line.
    """
    root = Path(path)
    meta = read_meta(root)
    target = root / WEIGHTS
    if not target.is_file():
        raise CheckpointError(f"{target}: missing")
    if digest(target) != meta.weights_sha256:
        raise CheckpointError(
            f"{target}: SHA-256 is not the one in {CHECKPOINT}; the file is damaged or of another run"
        )
    plan, size = meta.architecture, meta.preprocessing
    try:
        model = create(plan.model, len(meta.classes), plan.kwargs)
        original = split(model, size.height, size.width)
        student = Student(original, meta.heads, plan.depth, plan.tail, meta.dropout.rate, plan.freeze_norm)
        student.load_state_dict(load_file(target))
    except TriviumError as error:
        raise CheckpointError(f"{root}: its model cannot be built here: {error}") from None
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{target}: weights do not fit {plan.model} ({reason})") from None
    return student.eval(), meta


def load_classifier(path: str) -> tuple[Classifier, CheckpointMeta]:
    """One head of a run as a classifier of its own, from RUN where it has one head, or RUN#HEAD.

    Raises: CheckpointError with one line.
    """
    run, _, name = path.partition("#")
    student, meta = load_student(run)
    if not name and len(meta.heads) > 1:
        raise CheckpointError(f"{run}: it has the heads {', '.join(meta.heads)}: name one, as {run}#{meta.heads[0]}")
    if name and name not in meta.heads:
        raise CheckpointError(f"{run}: no head {name!r}; it has: {', '.join(meta.heads)}")
    return student.classifier(name or meta.heads[0]).eval(), meta


def is_run(weights: str) -> bool:
    """Whether a recipe's `weights` name a run's directory, as RUN or RUN#HEAD."""
    return weights not in ("train", "hub") and Path(weights.partition("#")[0]).is_dir()


def read_meta(root: Path) -> CheckpointMeta:
    """checkpoint.json alone.

    Raises: CheckpointError.
    """
    target = root / CHECKPOINT
    try:
        document = json.loads(target.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{root}: no {CHECKPOINT} in it, so this is no finished training run") from None
    except OSError as error:
        raise CheckpointError(f"{target}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{target}: no valid JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != "trivium-checkpoint":
        raise CheckpointError(f"{target}: not a trivium checkpoint")
    if document.get("schema_version") != SCHEMA_VERSION:
        found = str(document.get("schema_version"))[:40]
        raise CheckpointError(f"{target}: schema version {found}, this release reads {SCHEMA_VERSION}")
    try:
        return CheckpointMeta.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{target}: {where}: {first['msg']}") from None


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape the weights."""
    return {name: version(name) for name in PACKAGES}


def save_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file so that it is there whole or not at all. Tensors are copied to the CPU, none shared."""
    plain = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    scratch = target.with_name(f".{target.name}.part")
    save_file(plain, scratch)
    _sync(scratch)
    os.replace(scratch, target)


def write_json(target: Path, document: Any) -> None:
    """Write JSON so that it is there whole or not at all."""
    scratch = target.with_name(f".{target.name}.part")
    scratch.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(scratch)
    os.replace(scratch, target)


def replace_directory(scratch: Path, target: Path) -> None:
    """Move a finished directory to its name, in place of one that may be there."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(scratch, target)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

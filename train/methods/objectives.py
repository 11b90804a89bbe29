"""What each stage minimises: a batch of pictures and their indices -> a loss, for the loop."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..feed import Feed
from ..loop import Loss
from ..models.stages import Classifier
from ..models.student import Student
from ..recipe import Distillation, Model, Teacher
from .losses import clean_loss, combined_loss, robust_loss, uncertainty_weight
from .teacher import teacher_loss, teacher_passes


def original_objective(feed: Feed, model: nn.Module, settings: Model) -> Loss:
    """Cross-entropy on clean views."""
    smoothing = settings.schedule.label_smoothing if settings.schedule else 0.0

    def loss(
        pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        x = feed.normalise(feed.clean(pictures, generator))
        with feed.machine.autocast():
            logits = model(x)
        return F.cross_entropy(logits.float(), feed.labels(indices), label_smoothing=smoothing), {}

    return loss


def teacher_objective(feed: Feed, model: nn.Module, settings: Teacher) -> Loss:
    """The teacher's loss on shifted views (train/methods/teacher.py)."""
    smoothing = settings.schedule.label_smoothing if settings.schedule else 0.0

    def loss(
        pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        x = feed.clean(pictures, generator)
        with feed.machine.autocast():
            return teacher_loss(
                model, x, feed.labels(indices), generator, feed.teacher_shifts, feed.normalise, settings.loss,
                settings.jsd_weight, settings.clean_share, smoothing,
            )  # fmt: skip

    return loss


def student_objective(feed: Feed, student: Student, teacher: Classifier | None, settings: Distillation) -> Loss:
    """L = L_c + L_u + L_m over the heads that the student has (train/methods/losses.py)."""

    def loss(
        pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        labels = feed.labels(indices)
        clean = feed.clean(pictures, generator)
        shifted = feed.normalise(feed.shifts(clean, generator))
        with feed.machine.autocast():
            with torch.no_grad():
                z, z_shifted = student.trunk(torch.cat([feed.normalise(clean), shifted])).chunk(2)
                original = student.original_from_trunk(z).float()
            taught, weight = _taught(teacher, shifted, settings, student.dropout_rate)
            losses = {}
            for index, name in enumerate(student.head_names):
                if name == "clean":
                    logits = student.logits(index, student.branch(index, z))
                    losses[name] = clean_loss(logits, labels, original, settings.tau, settings.alpha)
                elif name == "robust":
                    logits = student.logits(index, student.branch(index, z_shifted))
                    losses[name] = robust_loss(logits, labels, taught, weight, settings.tau, settings.beta)
                else:
                    both = student.logits(index, student.branch(index, torch.cat([z, z_shifted])))
                    on_clean, on_shifted = both.chunk(2)
                    losses[name] = combined_loss(
                        on_clean, on_shifted, labels, original, taught, weight, settings.tau, settings.gamma
                    )
        return torch.stack(list(losses.values())).sum(), {name: each.item() for name, each in losses.items()}

    return loss


def _taught(
    teacher: Classifier | None, shifted: Tensor, settings: Distillation, dropout: float
) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's logits [B, C] on shifted views (of its mean answer, where it has several) and their weights [B]."""
    if teacher is None:
        return None, None
    wanted = settings.teacher_passes if settings.uncertainty == "mutual_information" else 1
    passes = teacher_passes(teacher, shifted, wanted, dropout)
    logits = passes[0] if wanted == 1 else passes.log_softmax(-1).logsumexp(0)
    return logits, uncertainty_weight(passes, settings.uncertainty)

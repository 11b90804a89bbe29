"""Three heads after "Efficiently Robustify Pre-trained Models": what the student minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..loop import Loss
from ..models.stages import Classifier
from ..models.student import Student
from ..sections import Count, NonNegative, Rate, Schedule, Section
from .losses import Uncertainty, clean_loss, combined_loss, robust_loss, uncertainty_weight
from .teacher import teacher_passes

if TYPE_CHECKING:
    from ..feed import Feed
    from ..pipeline import Run


class Distillation(Section):
    """The student's losses L_c, L_u and L_m (methods/losses.py)."""

    schedule: Schedule
    tau: Rate = 2.0
    alpha: NonNegative = 1.0
    beta: NonNegative = 1.0
    gamma: NonNegative = 1.0
    uncertainty: Uncertainty = "entropy"
    """Weight of the teacher's answer; none is the ablation w = 1."""
    teacher_passes: Count = 16
    """Dropout passes of the teacher, for mutual_information."""
    detach_clean: bool = False
    """L_c reaches the clean head's final layer alone, not the stages that all heads share."""
    tail_lr: Rate = 1.0
    """Learning rate of the tuned stages as a multiple of the heads'."""


def run(run: Run, student: Student, teacher: Classifier | None, upstream: str) -> None:
    """Train the student's heads in place."""
    settings = run.recipe.student
    assert settings is not None, "the recipe's method"
    run.stage(
        "student",
        student,
        settings.schedule,
        lambda: student_objective(run.feed, student, teacher, settings),
        (settings.model_dump(), run.recipe.shifts.model_dump(), upstream),
        kept=Student.is_tuned,
        lr_scale=lambda name: settings.tail_lr if name.startswith("branches.") else 1.0,
        check=lambda: run.feed.glance_heads(student),
    )


def student_objective(feed: Feed, student: Student, teacher: Classifier | None, settings: Distillation) -> Loss:
    """L = L_c + L_u + L_m over the heads that are trained (methods/losses.py).

    Heads of one role share a batch of pictures; each of them but the first draws shifted views of its own.
    """
    keeps = settings.alpha > 0 or settings.gamma > 0

    def loss(
        pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        labels = feed.labels(indices)
        clean = feed.clean(pictures, generator)

        def look(x: Tensor) -> Tensor:
            with torch.no_grad():
                return student.trunk(x)  # type: ignore[no-any-return]

        shifted = feed.normalise(feed.shifts(clean, generator))
        with feed.machine.autocast():
            z, z_shifted = look(torch.cat([feed.normalise(clean), shifted])).chunk(2)
            with torch.no_grad():
                original = student.original_from_trunk(z).float() if keeps else None
            taught, weight = _taught(teacher, shifted, settings, student.dropout_rate)
            losses: dict[str, Tensor] = {}
            met = set[str]()
            for index, name in enumerate(student.head_names):
                if name in student.fixed:
                    continue
                role = student.role(index)
                if role in met and role != "clean":
                    shifted = feed.normalise(feed.shifts(clean, generator))
                    z_shifted = look(shifted)
                    taught, weight = _taught(teacher, shifted, settings, student.dropout_rate)
                met.add(role)
                if role == "clean":
                    features = student.branch(index, z)
                    logits = student.logits(index, features.detach() if settings.detach_clean else features)
                    losses[name] = clean_loss(logits, labels, original, settings.tau, settings.alpha)
                elif role == "robust":
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

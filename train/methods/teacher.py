"""The small robust teacher: its training loss, its Monte-Carlo-dropout answers, and the check that it can teach."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from trivium.runtime.errors import ClientError

from ..loop import Loss
from ..models.stages import Classifier
from ..sections import Input, Model, NonNegative
from ..shifts.views import ShiftSpec
from .losses import jensen_shannon

if TYPE_CHECKING:
    from ..feed import Feed

Shift = Callable[[Tensor, torch.Generator], Tensor]
Normalise = Callable[[Tensor], Tensor]


class Teacher(Model):
    """The small robust teacher."""

    loss: Literal["ce", "jsd"] = "ce"
    """ce: cross-entropy of shifted views; jsd: of clean pictures, and the Jensen-Shannon term of two views (AugMix)."""
    jsd_weight: NonNegative = 12.0
    clean_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of clean pictures among those of loss ce."""
    shifts: ShiftSpec | None = None
    """None: those of the student."""
    input: Input = Input()
    """Its own mean, deviation, height and width. What is None is, of weights from elsewhere, the run's or timm's for
    the model; of a teacher trained here from scratch, and the size, the data's."""


class TeacherRefused(ClientError):
    """A teacher that is no better than the original on shifted pictures."""


class Preflight(BaseModel):
    """Accuracy on held-out pictures, clean and shifted by augmentations drawn anew from a mixing set of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: int
    original_clean: float
    original_shifted: float
    teacher_clean: float
    teacher_shifted: float

    @property
    def passed(self) -> bool:
        return self.teacher_shifted > self.original_shifted


def teacher_loss(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    shift: Shift,
    normalise: Normalise,
    loss: Literal["ce", "jsd"],
    jsd_weight: float,
    clean_share: float,
    label_smoothing: float,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch of pictures [B, 3, H, W] in [0, 1].

    ce: cross-entropy of shifted views, a share of the pictures left clean (PixMix's form). jsd: CE(clean) +
    jsd_weight JSD(clean, view, another view) (AugMix's form; jsd_weight is 12 there and the mean over three KLs is
    inside the divergence).
    """
    if loss == "ce":
        views = shift(x, generator)
        if clean_share > 0:
            clean = (torch.rand(len(x), generator=generator) < clean_share).to(x.device)
            views = torch.where(clean[:, None, None, None], x, views)
        logits = model(normalise(views)).float()
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing), {}
    views = torch.cat([x, shift(x, generator), shift(x, generator)])
    parts = model(normalise(views)).float().chunk(3)
    cross_entropy = F.cross_entropy(parts[0], labels, label_smoothing=label_smoothing)
    divergence = jensen_shannon(parts)
    return cross_entropy + jsd_weight * divergence, {
        "cross_entropy": cross_entropy.item(),
        "jensen_shannon": divergence.item(),
    }


def teacher_objective(feed: Feed, model: nn.Module, settings: Teacher) -> Loss:
    """The teacher's loss on shifted views."""
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


@torch.no_grad()
def teacher_passes(teacher: Classifier, x: Tensor, passes: int, dropout: float) -> Tensor:
    """Normalised pictures -> the teacher's logits [T, B, C], float32: its plain answer where passes is 1, else under
    dropout before its last layer."""
    features = teacher.features(x)
    if passes == 1:
        plain: Tensor = teacher.head(features)
        return plain[None].float()
    dropped = F.dropout(features.expand(passes, *features.shape), dropout, training=True)
    logits: Tensor = teacher.head(dropped)
    return logits.float()


def judge(result: Preflight, policy: Literal["refuse", "warn"], say: Callable[[str], None]) -> None:
    """Refuse, or warn of, a teacher that is not better than the original on shifted pictures.

    Raises: TeacherRefused.
    """
    line = (
        f"on {result.pictures} held-out shifted pictures the teacher is right on {result.teacher_shifted:.1%}, "
        f"the original on {result.original_shifted:.1%}"
    )
    if result.passed:
        say(f"preflight: {line}")
        return
    advice = "train the teacher longer or with stronger shifts, or set teacher: null"
    if policy == "refuse":
        raise TeacherRefused(f"preflight: {line}: it has nothing to teach; {advice} (preflight: warn goes on)")
    say(f"WARNING: preflight: {line}: it has little to teach; {advice}")

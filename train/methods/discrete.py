"""Discrete adversarial samples (DAD, Zhou et al. 2023): pictures through a discretiser, moved by a teacher's gradient.

The step is so small that most of a sample is Q's reconstruction and some flipped codes, so how many codes flip is
recorded. A test whether the step changed the teacher's answer, which never takes effect in the published code, is left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..attacks.ball import per_picture, project, steepest
from ..attacks.losses import Logits, cross_entropy, look, never
from ..models.vq import VQGAN
from ..sections import Rate, Section

Sample = Literal["q_only", "random_start", "student_gradient", "dad"]
"""q_only: Q(x). random_start: Q of a random point near Q(x). student_gradient and dad: one step of gradient ascent from
there, of the original's loss (DAT's gradient, though of a student that has not learned yet) or of the teacher's."""


class Perturbation(Section):
    """The ball and the step in it, in L2 norm over a whole picture in [0, 1]."""

    eps: Rate = 0.1
    step: Rate = 0.01
    """Published: a tenth of eps, so that most of the displacement is the random start's."""
    random_start: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of pictures that start at distance eps from Q(x); the others start at Q(x). Drawn a picture, where the
    published code draws a batch."""


@torch.no_grad()
def discrete_samples(
    x: Tensor,
    labels: Tensor,
    vq: VQGAN,
    settings: Perturbation | None,
    generators: Sequence[torch.Generator] = (),
    answer: Logits | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """x' = Q(x_1), x_1 = clip(project(x_0 + step g / |g|)), g the gradient of CE(answer(x_0), y); the ball lies around
    Q(x), not x, and no gradient passes Q.

    Args:
        x: pictures [B, 3, H, W] in [0, 1], without augmentation; labels: [B].
        settings: None gives Q(x) itself.
        generators: one a picture, so that its draws do not depend on the batch it is in.
        answer: whose gradient; None takes no step.

    Returns: samples [B, 3, H, W] in [0, 1], and means over the pictures: `flips`, the share of codes in which x_1
        differs from Q(x); `requantised`, the same of Q(x) from x, which no perturbation causes; `displacement`,
        |x_1 - Q(x)|; `moved`, |x' - x|, both in L2; `loss_before` and `loss_after` the step, in nats.
    """
    codes = vq.codes(x)
    center = vq.decode(codes)
    if settings is None:
        return center, {"moved": _length(center - x)}
    noise = torch.stack([torch.randn(x.shape[1:], generator=each) for each in generators]).to(x)
    starts = torch.tensor([float(torch.rand((), generator=each)) < settings.random_start for each in generators])
    length = per_picture(starts.to(x) * settings.eps, x)
    point = (center + length * steepest(noise, "l2")).clamp(0, 1)
    figures = {}
    if answer is not None:
        before, _, gradient = look(answer, cross_entropy, never, point, labels, True)
        point = project(point + settings.step * steepest(gradient, "l2"), center, "l2", settings.eps)
        after, _, _ = look(answer, cross_entropy, never, point, labels, False)
        figures = {"loss_before": before.mean().item(), "loss_after": after.mean().item()}
    again, flipped = vq.codes(center), vq.codes(point)
    samples = vq.decode(flipped)
    return samples, figures | {
        "flips": (flipped != again).float().mean().item(),
        "requantised": (again != codes).float().mean().item(),
        "displacement": _length(point - center),
        "moved": _length(samples - x),
    }


def _length(delta: Tensor) -> float:
    return torch.linalg.vector_norm(delta.flatten(1), dim=1).mean().item()

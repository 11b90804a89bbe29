"""Projected gradient descent (Madry et al. 2018, equation 2.2) in Linf and L2, for training and for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from .ball import Norm, Radius, per_picture, project, random_point, steepest
from .losses import Logits, Loss, Wrong, cross_entropy, look, never, wrong_answer


def pgd(
    logits: Logits,
    x: Tensor,
    labels: Tensor,
    norm: Norm,
    eps: Radius,
    step: Radius,
    steps: int,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    keep_best: bool = True,
    stop_early: bool = False,
    wrong: Wrong = wrong_answer,
) -> Tensor:
    """Ascend the loss along its steepest direction, projected onto the ball and the pixels' range after each step.

    Whether the model is in training mode is the caller's affair, and so is autocast; the iterates keep x's dtype.
    Parameters get no gradient.

    Args:
        logits: of pictures in [0, 1].
        x: pictures [B, 3, H, W] in [0, 1].
        labels: [B], as the loss wants them.
        eps, step: radius of the ball and length of a step, in its norm: a number, or [B].
        random_start: from a uniform draw out of the ball, otherwise from x.
        generator: of that draw.
        keep_best: return the iterate of the highest loss, which costs one forward pass more than `steps`; otherwise
            the last one, as adversarial training does.
        stop_early: leave a picture alone once it is answered wrongly, and return it so; the logits and the loss then
            see fewer and fewer pictures, so a loss must not hold something of the whole batch.
        wrong: what counts as a wrong answer there.

    Returns: pictures like x, without gradient.

    Raises: ValueError where eps, step or steps is negative.
    """
    if steps < 0 or bool((torch.as_tensor(eps) < 0).any()) or bool((torch.as_tensor(step) < 0).any()):
        raise ValueError(f"eps {eps}, step {step} and steps {steps} must not be negative")
    x = x.detach()
    point = random_point(x, norm, eps, generator) if random_start else x.clone()
    found, highest = point.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    radius, stride = (per_picture(value, x).expand(len(x), *[1] * (x.ndim - 1)) for value in (eps, step))
    rows = torch.arange(len(x), device=x.device)  # of the pictures still attacked
    judged = keep_best or stop_early
    for i in range(steps + judged):
        if len(rows) == 0:
            break
        last = i == steps
        value, fooled, gradient = look(logits, loss, wrong if stop_early else never, point, labels[rows], not last)
        better = value > highest[rows] if keep_best else torch.ones_like(fooled)
        if stop_early:
            better |= fooled
        found[rows[better]], highest[rows[better]] = point[better], value[better]
        if last:
            break
        if stop_early:
            rows, point, gradient = rows[~fooled], point[~fooled], gradient[~fooled]
        point = project(point + stride[rows] * steepest(gradient, norm), x[rows], norm, radius[rows].flatten())
    return found if judged else point

"""Auto-PGD: gradient ascent with momentum that finds its own step size (Croce and Hein 2020, algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .ball import Norm, Radius, per_picture, project, random_point, steepest
from .losses import Logits, Loss, Wrong, cross_entropy, look, wrong_answer

MOMENTUM = 0.75
"""alpha: the share of the new step; the rest goes on in the direction of the last."""
PROGRESS = 0.75
"""rho: the step is halved where a smaller share of the steps since the last checkpoint raised the loss."""


def apgd(
    logits: Logits,
    x: Tensor,
    labels: Tensor,
    norm: Norm,
    eps: Radius,
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    stop_early: bool = False,
    wrong: Wrong = wrong_answer,
) -> Tensor:
    """The highest point that APGD finds from each of `restarts` random starts; with the cross-entropy, APGD-CE.

    Each picture has a step size of its own: 2 eps first, halved at a checkpoint where the loss rose too seldom, or
    where neither it nor the best loss changed since the last checkpoint; the picture then goes on from its best point.

    Args: as `pgd`. A pass more than `steps` is made from each start, to judge the last point.

    Returns: pictures like x, without gradient. Over all starts the highest loss counts; with `stop_early`, the first
    wrong answer does.

    Raises: ValueError where eps or steps is negative, or there is no start.
    """
    if steps < 0 or restarts < 1 or bool((torch.as_tensor(eps) < 0).any()):
        raise ValueError(f"eps {eps} and steps {steps} must not be negative, restarts {restarts} not below 1")
    x = x.detach()
    radius = per_picture(eps, x).expand(len(x), *[1] * (x.ndim - 1))
    found, highest = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    rows = torch.arange(len(x), device=x.device)  # of the pictures still attacked
    for _ in range(restarts):
        if len(rows) == 0:
            break
        start = random_point(x[rows], norm, radius[rows].flatten(), generator)
        point, value, fooled = ascend(
            logits, x[rows], labels[rows], start, norm, radius[rows], steps, loss, stop_early, wrong
        )
        better = value > highest[rows]
        if stop_early:
            better |= fooled
        found[rows[better]], highest[rows[better]] = point[better], value[better]
        if stop_early:
            rows = rows[~fooled]
    return found


@dataclass
class Run:
    """Where N pictures stand; `take` keeps some of them."""

    rows: Tensor
    """Their places in the batch."""
    x: Tensor
    labels: Tensor
    radius: Tensor
    stride: Tensor
    """The step size."""
    last: Tensor
    point: Tensor
    value: Tensor
    slope: Tensor
    best: Tensor
    best_value: Tensor
    best_slope: Tensor
    rises: Tensor
    """Steps since the checkpoint that raised the loss."""
    halved: Tensor
    """Whether the last checkpoint halved the step size."""
    best_before: Tensor
    """The best loss at the last checkpoint."""

    def take(self, mask: Tensor) -> Run:
        return Run(*(getattr(self, each.name)[mask] for each in fields(self)))


def ascend(
    logits: Logits,
    x: Tensor,
    labels: Tensor,
    start: Tensor,
    norm: Norm,
    radius: Tensor,
    steps: int,
    loss: Loss,
    stop_early: bool,
    wrong: Wrong,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run from a start: (points like x, their loss [B], whether they are answered wrongly [B])."""
    judged_at = checkpoints(steps)
    value, fooled, slope = look(logits, loss, wrong, start, labels, gradient=steps > 0)
    rows, none = torch.arange(len(x), device=x.device), torch.zeros_like(value)
    run = Run(
        rows, x, labels, radius, 2 * radius, start, start, value, slope, start, value, slope, none, none.bool(), value
    )
    found, found_value, found_fooled = start.clone(), value.clone(), fooled.clone()
    for k in range(steps):
        if stop_early:
            run = run.take(~fooled)
        if len(run.rows) == 0:
            break
        eps = run.radius.flatten()
        new = project(run.point + run.stride * steepest(run.slope, norm), run.x, norm, eps)
        if k > 0:
            moved = run.point + MOMENTUM * (new - run.point) + (1 - MOMENTUM) * (run.point - run.last)
            new = project(moved, run.x, norm, eps)
        value, fooled, slope = look(logits, loss, wrong, new, run.labels, gradient=k + 1 < steps)
        run.rises = run.rises + (value > run.value)
        run.last, run.point, run.value, run.slope = run.point, new, value, slope
        better = value > run.best_value
        run.best, run.best_slope = pick(better, new, run.best), pick(better, slope, run.best_slope)
        run.best_value = torch.where(better, value, run.best_value)
        kept = better | fooled if stop_early else better
        at = run.rows[kept]
        found[at], found_value[at], found_fooled[at] = new[kept], value[kept], fooled[kept]
        if k + 1 in judged_at:
            length = k + 1 - judged_at[judged_at.index(k + 1) - 1]
            stuck = ~run.halved & (run.best_value == run.best_before)
            run.halved = (run.rises < PROGRESS * length) | stuck
            run.stride = pick(run.halved, run.stride / 2, run.stride)
            run.point, run.slope = pick(run.halved, run.best, run.point), pick(run.halved, run.best_slope, run.slope)
            run.value = torch.where(run.halved, run.best_value, run.value)
            run.rises, run.best_before = torch.zeros_like(run.rises), run.best_value
    return found, found_value, found_fooled


def checkpoints(steps: int) -> list[int]:
    """The steps w_0 = 0 < w_1 < ... <= `steps` after which step sizes are judged: ceil(p_j steps), where p_0 = 0,
    p_1 = 0.22 and p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
    # in hundredths, so that sums are exact
    shares = [0, 22]
    while shares[-1] < 100:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 3, 6))
    return sorted({math.ceil(share * steps / 100) for share in shares if share <= 100})


def pick(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """[B, ...]: one where rows [B], else other."""
    return torch.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)

"""What attacks maximise, and how they look at a model: logits, loss, gradient, and whether the answer is wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] in [0, 1] -> logits [B, C]; normalisation lies inside."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, C], labels [B]) -> what the attack maximises, [B]."""
Wrong = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, C], labels [B]) -> whether the answer is wrong, bool [B]."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In nats, one for each picture [B]."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The highest wrong logit less the right one, [B]: positive where the answer is wrong."""
    right = logits.gather(1, labels[:, None])
    wrong = logits.scatter(1, labels[:, None], -torch.inf)
    return wrong.amax(1) - right[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, equation 6), [B]: the margin in units of the gap between the
    highest logit and the third, so that scaling logits hides nothing; the plain margin with fewer than 3 classes."""
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, 1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp(min=1e-12)


def wrong_answer(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest logit, the first of equals, is not the label's: bool [B]."""
    return logits.argmax(1) != labels


def never(logits: Tensor, labels: Tensor) -> Tensor:
    """No answer counts as wrong: bool [B]."""
    return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)


def look(
    logits: Logits, loss: Loss, wrong: Wrong, point: Tensor, labels: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], whether the answer is wrong [B], the loss's gradient like point, or zeros where not asked for)."""
    with torch.set_grad_enabled(gradient):
        leaf = point.detach().requires_grad_(gradient)
        z = logits(leaf).to(point.dtype)
        value = loss(z, labels)
        slope = torch.autograd.grad(value.sum(), leaf)[0] if gradient else torch.zeros_like(point)
    return value.detach(), wrong(z.detach(), labels), slope

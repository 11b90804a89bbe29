"""Losses of the three heads (METHODS of "Efficiently Robustify Pre-trained Models"), of AugMix and of adversarial
training, as plain functions.

Logits are [B, C], labels int64 [B], weights [B]; every loss is a scalar, in nats. tau is the distillation temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Uncertainty = Literal["entropy", "mutual_information", "none"]


def distillation(target: Tensor, logits: Tensor, tau: float) -> Tensor:
    """tau^2 KL(softmax(target / tau) || softmax(logits / tau)) per picture [B] (Hinton et al. 2015); no gradient
    reaches the target."""
    log_p = F.log_softmax(target.detach() / tau, -1)
    log_q = F.log_softmax(logits / tau, -1)
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def uncertainty_weight(passes: Tensor, kind: Uncertainty) -> Tensor:
    """How far the teacher's answer is trusted, [B] in [0, 1], without gradient, from its logits passes [T, B, C].

    entropy: 1 - H(mean_t p_t) / log C; mutual_information: exp(-MI); none: 1 (the ablation). The paper names an
    uncertainty-aware distillation and its formula could not be read: both weights are reconstructions.
    """
    log_p = F.log_softmax(passes.detach().float(), -1)
    mean = log_p.exp().mean(0)
    if kind == "none":
        return torch.ones_like(mean[:, 0])
    entropy = -torch.xlogy(mean, mean).sum(-1)
    if kind == "entropy":
        return (1 - entropy / math.log(mean.shape[-1])).clamp(0, 1)
    expected = -(log_p.exp() * log_p).sum(-1).mean(0)
    return torch.exp(-(entropy - expected).clamp(min=0))


def clean_loss(logits: Tensor, labels: Tensor, original: Tensor | None, tau: float, alpha: float) -> Tensor:
    """L_c = CE(p_c(x), y) + alpha tau^2 KL(p_0(x) || p_c(x)): the clean head on clean pictures keeps the original.

    original None leaves the distillation out.
    """
    loss = F.cross_entropy(logits, labels)
    return loss if original is None else loss + alpha * distillation(original, logits, tau).mean()


def robust_loss(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, weight: Tensor | None, tau: float, beta: float
) -> Tensor:
    """L_u = mean_i [CE(p_u(x~_i), y_i) + beta w_i tau^2 KL(p_T(x~_i) || p_u(x~_i))]: the robust head on shifted views.

    teacher None leaves the distillation out.
    """
    loss = F.cross_entropy(logits, labels)
    if teacher is None or weight is None:
        return loss
    return loss + beta * (weight * distillation(teacher, logits, tau)).mean()


def combined_loss(
    clean: Tensor,
    shifted: Tensor,
    labels: Tensor,
    original: Tensor | None,
    teacher: Tensor | None,
    weight: Tensor | None,
    tau: float,
    gamma: float,
) -> Tensor:
    """L_m = 1/2 [CE(p_m(x), y) + CE(p_m(x~), y)] + gamma/2 tau^2 [KL(p_0(x) || p_m(x)) + w KL(p_T(x~) || p_m(x~))].

    clean and shifted: the combined head's logits of the clean pictures and of their shifted views. original or teacher
    None leaves its term out.
    """
    loss = (F.cross_entropy(clean, labels) + F.cross_entropy(shifted, labels)) / 2
    if original is not None:
        loss = loss + gamma / 2 * distillation(original, clean, tau).mean()
    if teacher is not None and weight is not None:
        loss = loss + gamma / 2 * (weight * distillation(teacher, shifted, tau)).mean()
    return loss


def jensen_shannon(logits: Sequence[Tensor]) -> Tensor:
    """Mean KL of each view's softmax from their mixture, batch mean (AugMix, Hendrycks et al. 2020, equation 2).

    The mixture is clamped to [1e-7, 1] before its logarithm.
    """
    log_p = torch.stack([F.log_softmax(each, -1) for each in logits])
    p = log_p.exp()
    log_mixture = p.mean(0).clamp(1e-7, 1).log()
    return (p * (log_p - log_mixture)).sum(-1).mean()


def at_loss(attacked: Tensor, labels: Tensor, first: int = 0, weight: float = 1.0) -> Tensor:
    """CE(f(x'), y), or over two wings weight CE(f_F(x'_1), y_1) + CE(f_A(x'_2), y_2), each a mean over its pictures.

    attacked: logits [B, C], of which the first wing's are the first `first`; labels [B].
    """
    return torch.stack(
        [share * F.cross_entropy(attacked[wing], labels[wing]) for wing, share in _wings(first, weight)]
    ).sum()


def trades_loss(
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    beta: float,
    first: int = 0,
    weight: float = 1.0,
    divergence_mean: Literal["batch", "wing"] = "batch",
) -> Tensor:
    """CE(f(x), y) + beta KL(f(x) || f(x')), or over two wings, weighted and split as in at_loss, the sum of both.

    clean, attacked: logits [B, C]. The gradient reaches both. divergence_mean: each wing's divergences are divided by
    B, as TWINS' authors do, or by the wing's number of pictures.
    """
    terms = []
    for wing, share in _wings(first, weight):
        log_p, log_q = F.log_softmax(clean[wing], -1), F.log_softmax(attacked[wing], -1)
        divergence = (log_p.exp() * (log_p - log_q)).sum() / len(clean if divergence_mean == "batch" else log_p)
        terms.append(share * (F.cross_entropy(clean[wing], labels[wing]) + beta * divergence))
    return torch.stack(terms).sum()


def _wings(first: int, weight: float) -> list[tuple[slice, float]]:
    second = (slice(first, None), 1.0)
    return [(slice(first), weight), second] if first else [second]

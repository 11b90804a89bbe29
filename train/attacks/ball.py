"""The threat model: balls around pictures in Linf or L2, cut to the pixels' range [0, 1]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Radius = float | Tensor
"""One for all pictures, or [B], one for each."""


def project(x: Tensor, center: Tensor, norm: Norm, eps: Radius) -> Tensor:
    """The nearest point of the ball, then of the pixels' range: [B, ...] around centers [B, ...] in [0, 1]."""
    delta = x - center
    radius = per_picture(eps, center)
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -radius), radius)
    else:
        delta = delta * (radius / length(delta)).clamp(max=1)
    return (center + delta).clamp(0, 1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of length 1 in the norm along which a linear loss grows fastest, [B, ...]; 0 where it is flat."""
    return gradient.sign() if norm == "linf" else gradient / length(gradient)


def random_point(center: Tensor, norm: Norm, eps: Radius, generator: torch.Generator | None = None) -> Tensor:
    """Drawn uniformly from the ball around each center [B, ...], then cut to the pixels' range.

    The draw happens on the generator's device, so that a seed means the same start on every machine.
    """
    device = generator.device if generator is not None else center.device
    if norm == "linf":
        unit = torch.rand(center.shape, generator=generator, device=device, dtype=center.dtype) * 2 - 1
    else:
        direction = torch.randn(center.shape, generator=generator, device=device, dtype=center.dtype)
        share = torch.rand(len(center), generator=generator, device=device, dtype=center.dtype)
        dimensions = max(1, center[0].numel()) if len(center) else 1
        unit = steepest(direction, "l2") * per_picture(share ** (1 / dimensions), center)
    return project(center + unit.to(center.device) * per_picture(eps, center), center, norm, eps)


def length(delta: Tensor) -> Tensor:
    """L2 norm of each picture [B, ...] -> [B, 1, ...]; never 0, so that one can divide by it."""
    return per_picture(torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp(min=1e-30), delta)


def per_picture(value: Radius, like: Tensor) -> Tensor:
    """A number or [B] -> what broadcasts against pictures [B, ...]."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1))

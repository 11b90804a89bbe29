"""Monte-Carlo-dropout statistics in torch: what the exported graph computes, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from trivium.kernels import HeadStatistics, check_shapes, dropout_masks
from trivium.runtime.bundle import Dropout, Preprocessing

ORIGINAL = "original"
"""What the original classifier is called, beside the names of heads and routers."""
CHUNK = 1 << 24
"""Floats that one chunk of masked features or logits may hold."""


class Heads(Protocol):
    """What a Student and a wrapped Classifier have in common."""

    head_names: tuple[str, ...]

    def features(self, x: Tensor) -> Tensor: ...
    def head_weights(self) -> tuple[Tensor, Tensor]: ...
    def original_logits(self, x: Tensor) -> Tensor: ...


@torch.no_grad()
def mc_statistics(
    features: Tensor, weights: Tensor, bias: Tensor, temperature: ArrayLike, masks: ArrayLike, keep: float
) -> HeadStatistics:
    """kernels.mc_heads_ref in float32 on the features' device, a few pictures at a time; same arguments and meaning.

    features [B, D] or [B, K, D], weights [K, C, D], bias [K, C], temperature [K], masks [T, D]. Returns NumPy arrays.

    Raises: ValueError where shapes do not fit together.
    """
    tau, mask = (torch.as_tensor(np.asarray(a, np.float32), device=features.device) for a in (temperature, masks))
    check_shapes(
        tuple(features.shape), tuple(weights.shape), tuple(bias.shape), tuple(tau.shape), tuple(mask.shape), keep
    )
    (k, c, d), t = weights.shape, len(mask)
    size = max(1, CHUNK // (t * max(d, c) * k))
    parts = [tensor_statistics(h, weights, bias, tau, mask, keep) for h in torch.split(features, size)]
    if not parts:
        empty = ((0, k, c), (0, k), (0, k), (0, k, k), (0, k))
        return HeadStatistics(*(np.zeros(shape, np.float32) for shape in empty))
    return HeadStatistics(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


class TensorStatistics(NamedTuple):
    """kernels.HeadStatistics as tensors."""

    probabilities: Tensor
    predictive_entropy: Tensor
    mutual_information: Tensor
    divergence: Tensor
    energy: Tensor


def tensor_statistics(
    features: Tensor, weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float
) -> TensorStatistics:
    """What `mc_statistics` gives, of all pictures at once and differentiable; all tensors on one device."""
    h = features.float()
    k = len(weights)
    scaled = (weights.float() / keep / temperature[:, None, None]).transpose(1, 2)  # [K, D, C]
    offset = bias.float() / temperature[:, None]
    if h.ndim == 2:
        masked = h[None, :, None, :] * masks  # [1, B, T, D]: one for all heads
    else:
        masked = h.transpose(0, 1)[:, :, None, :] * masks  # [K, B, T, D]
    b, t = masked.shape[1], masked.shape[2]
    z = torch.matmul(masked.reshape(len(masked), b * t, -1), scaled) + offset[:, None, :]
    z = z.reshape(k, b, t, -1)
    lse = torch.logsumexp(z, -1)
    log_p = z - lse[..., None]
    p = log_p.exp()
    expected = -(p * log_p).sum(-1).mean(-1)
    mean = p.mean(2)
    log_mean = mean.clamp(min=1e-30).log()
    entropy = -(mean * log_mean).sum(-1)
    cross = torch.einsum("ibc,jbc->bij", mean, log_mean)
    divergence = (-entropy.t()[:, :, None] - cross).clamp(min=0)
    # rounding aside, a head does not differ from itself; NaN stays NaN
    divergence = divergence * (1 - torch.eye(k, device=h.device))
    bad = ~h.reshape(b, -1).isfinite().all(-1)
    out = (mean.transpose(0, 1), entropy.t(), (entropy - expected).clamp(min=0).t(), divergence, -lse.mean(-1).t())
    return TensorStatistics(*(torch.where(bad.reshape(b, *[1] * (a.ndim - 1)), torch.nan, a) for a in out))


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pictures [B, 3, H, W], uint8 or float in [0, 1], as the model wants them: float32, mean and std applied."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    mean = x.new_tensor(preprocessing.mean).reshape(1, 3, 1, 1)
    std = x.new_tensor(preprocessing.std).reshape(1, 3, 1, 1)
    return (x - mean) / std


@torch.no_grad()
def predict(
    model: Heads,
    batches: Iterator[Tensor],
    preprocessing: Preprocessing,
    dropout: Dropout,
    temperature: ArrayLike | None = None,
) -> tuple[HeadStatistics, np.ndarray]:
    """Statistics of all heads, and the original classifier's probabilities [N, C], for batches of uint8 [B, 3, H, W].

    The model must be in eval mode; float32, no autocast: as the exported graph.
    """
    weights, bias = model.head_weights()
    masks = dropout_masks(dropout.passes, weights.shape[2], 1 - dropout.rate, dropout.seed)
    tau = np.ones(len(weights), np.float32) if temperature is None else temperature
    columns: list[HeadStatistics] = []
    originals: list[np.ndarray] = []
    for images in batches:
        x = normalise(images.to(weights.device), preprocessing)
        columns.append(mc_statistics(model.features(x), weights, bias, tau, masks, 1 - dropout.rate))
        originals.append(F.softmax(model.original_logits(x), -1).cpu().numpy())
    return HeadStatistics(*(np.concatenate(parts) for parts in zip(*columns, strict=True))), np.concatenate(originals)

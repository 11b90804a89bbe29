"""The definition of MCHeads in NumPy float64; every other implementation is tested against this one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating]


class HeadStatistics(NamedTuple):
    """What Monte-Carlo dropout says about B pictures under K heads and C classes. Entropies and divergences in nats."""

    probabilities: Array
    """[B, K, C]: mean over the T passes of the softmax."""
    predictive_entropy: Array
    """[B, K]: H(mean_t p_t), the total uncertainty."""
    mutual_information: Array
    """[B, K]: H(mean_t p_t) - mean_t H(p_t), the epistemic part (BALD); 0 <= MI <= H <= log C."""
    divergence: Array
    """[B, K, K]: KL(p_i || p_j) of the heads' mean probabilities, row head i from column head j; 0 on the diagonal."""
    energy: Array
    """[B, K]: -mean_t logsumexp(z_t), the free energy of the tempered logits; low on familiar pictures."""


def mc_heads_ref(
    features: ArrayLike,
    weights: ArrayLike,
    bias: ArrayLike,
    temperature: ArrayLike,
    masks: ArrayLike,
    keep: float,
) -> HeadStatistics:
    """Run T dropout passes of K linear heads and reduce them, in float64.

    Args:
        features: [B, D], shared by all heads, or [B, K, D] where each head owns its features.
        weights: [K, C, D].
        bias: [K, C].
        temperature: [K], positive; divides the logits of its head.
        masks: [T, D], 1 keeps a unit and 0 drops it; the same masks for every picture and every head.
        keep: probability that a unit is kept, in (0, 1]; kept units are scaled by 1 / keep.

    Equations, for pass t:
        z_t = (W (m_t * h) / keep + b) / temperature
        p_t = softmax(z_t),  p = mean_t p_t
        predictive entropy  H(p) = -sum_c p_c log p_c                      (Gal and Ghahramani 2016)
        mutual information  H(p) - mean_t H(p_t)                           (Houlsby et al. 2011)
        divergence          KL(p_i || p_j) = sum_c p_ic (log p_ic - log p_jc)
        energy              -mean_t log sum_c exp z_tc                     (Liu et al. 2020)
    A term with p_c = 0 counts as 0; log p is taken of max(p, 1e-30). A picture whose features hold a NaN or an
    infinity gives NaN in all its outputs, and in no other picture's.

    Returns: HeadStatistics, float64.
    Raises: ValueError where shapes do not fit together.
    """
    h, w, b, tau, m = (np.asarray(a, np.float64) for a in (features, weights, bias, temperature, masks))
    check_shapes(h.shape, w.shape, b.shape, tau.shape, m.shape, keep)
    if h.ndim == 2:
        h = np.broadcast_to(h[:, None, :], (h.shape[0], w.shape[0], h.shape[1]))
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(h).all(axis=(1, 2)))
    h = np.where(finite[:, None, None], h, 0.0)

    # [B, K, T, C]
    z = np.einsum("btkd,kcd->bktc", m[None, :, None, :] * h[:, None] / keep, w, optimize=True)
    z = (z + b[None, :, None, :]) / tau[None, :, None, None]
    top = z.max(-1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    log_p = z - lse
    p = np.exp(log_p)
    expected_entropy = -(p * log_p).sum(-1).mean(-1)

    mean = p.mean(2)
    log_mean = np.log(np.maximum(mean, 1e-30))
    entropy = -(mean * log_mean).sum(-1)
    cross = np.einsum("bic,bjc->bij", mean, log_mean)
    divergence = np.maximum(-entropy[:, :, None] - cross, 0.0)
    out = HeadStatistics(mean, entropy, np.maximum(entropy - expected_entropy, 0.0), divergence, -lse[..., 0].mean(-1))
    for a in out:
        a[~finite] = np.nan
    return out


def check_shapes(
    features: tuple[int, ...],
    weights: tuple[int, ...],
    bias: tuple[int, ...],
    temperature: tuple[int, ...],
    masks: tuple[int, ...],
    keep: float,
) -> None:
    """Raise ValueError with one line where the shapes of MCHeads' inputs do not fit together."""
    if len(weights) != 3 or min(weights) < 1:
        raise ValueError(f"weights must be [K, C, D] with no empty axis, got {list(weights)}")
    k, c, d = weights
    if features[1:] not in ((d,), (k, d)):
        raise ValueError(f"features must be [B, {d}] or [B, {k}, {d}], got {list(features)}")
    if bias != (k, c):
        raise ValueError(f"bias must be [{k}, {c}], got {list(bias)}")
    if temperature != (k,):
        raise ValueError(f"temperature must be [{k}], got {list(temperature)}")
    if len(masks) != 2 or masks[0] < 1 or masks[1] != d:
        raise ValueError(f"masks must be [T, {d}] with T >= 1, got {list(masks)}")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")

"""torch.ops.trivium.mc_heads: MCHeads as one node for torch.compile and torch.export; import it to register it.

On a CPU it runs the fused kernel; on a CUDA card the CUDA kernels, where libtrivium was built with them; elsewhere the
same equations in torch. It has no gradient.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .cuda_tensors import CudaHeads
from .heads import MCHeads
from .native import library_path
from .reference import check_shapes

PACKED_MODELS = 4
"""Packed models that are kept: a loop over batches packs its heads once."""

_packed: OrderedDict[tuple[object, ...], tuple[MCHeads, tuple[Tensor, ...]]] = OrderedDict()


@torch.library.custom_op("trivium::mc_heads", mutates_args=())
def mc_heads(
    features: Tensor, weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The semantics of kernels.mc_heads_ref in float32: its arguments, and the five tensors of HeadStatistics.

    Raises: ValueError where shapes do not fit.
    """
    _check(features, weights, bias, temperature, masks, keep)
    return _composite(features, weights, bias, temperature, masks, keep)


def _composite(
    features: Tensor, weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    h, w, b, tau = (t.float() for t in (features, weights, bias, temperature))
    h = h if h.dim() == 3 else h[:, None]
    finite = h.isfinite().all(-1).all(-1)
    h = torch.where(finite[:, None, None], h, 0.0)
    batch, (heads, classes, _) = h.shape[0], w.shape
    mean = h.new_zeros(batch, heads, classes)
    expected_entropy, log_sum_exp = (h.new_zeros(batch, heads) for _ in range(2))
    for mask in masks.to(h.dtype):
        z = (torch.einsum("bkd,kcd->bkc", (h * mask / keep).expand(-1, heads, -1), w) + b) / tau[:, None]
        lse = z.logsumexp(-1)
        log_p = z - lse[..., None]
        p = log_p.exp()
        mean += p
        expected_entropy -= (p * log_p).sum(-1)
        log_sum_exp += lse
    passes = masks.shape[0]
    mean /= passes
    log_mean = mean.clamp_min(1e-30).log()
    entropy = -(mean * log_mean).sum(-1)
    divergence = (mean[:, :, None] * (log_mean[:, :, None] - log_mean[:, None])).sum(-1).clamp_min(0)
    out = (
        mean,
        entropy,
        (entropy - expected_entropy / passes).clamp_min(0),
        divergence,
        -log_sum_exp / passes,
    )
    for t in out:
        t[~finite] = torch.nan
    return out


@mc_heads.register_kernel("cpu")
def _(
    features: Tensor, weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(features, weights, bias, temperature, masks, keep)
    heads = _packed_model(weights, bias, temperature, masks, keep)
    out = heads(features.detach().float().contiguous().numpy(), threads=min(torch.get_num_threads(), 256))
    probabilities, entropy, information, divergence, energy = (torch.from_numpy(np.asarray(a)) for a in out)
    return probabilities, entropy, information, divergence, energy


@mc_heads.register_kernel("cuda")
def _(
    features: Tensor, weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(features, weights, bias, temperature, masks, keep)
    heads = _cuda_heads()
    if heads is None:
        return _composite(features, weights, bias, temperature, masks, keep)
    h = features if features.dtype in (torch.float32, torch.float16, torch.bfloat16) else features.float()
    w, b, tau = (t.detach().float().contiguous() for t in (weights, bias, temperature))
    with torch.cuda.device(features.device):
        stream = torch.cuda.current_stream().cuda_stream
        return heads(h.detach().contiguous(), w, b, tau, masks.to(torch.uint8).contiguous(), keep, stream=stream)


@cache
def _cuda_heads() -> CudaHeads | None:
    """The CUDA kernels, where libtrivium holds them and the card is new enough."""
    try:
        heads = CudaHeads(library_path())
    except (OSError, AttributeError):
        return None
    return heads if heads.library.devices() > 0 else None


@mc_heads.register_fake
def _(
    features: Tensor, weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, (heads, classes, _) = features.shape[0], weights.shape
    per_head = [torch.empty(batch, heads, device=features.device, dtype=torch.float32) for _ in range(3)]
    return (
        per_head[0].new_empty(batch, heads, classes),
        per_head[0],
        per_head[1],
        per_head[0].new_empty(batch, heads, heads),
        per_head[2],
    )


def _check(features: Tensor, weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float) -> None:
    check_shapes(
        tuple(features.shape),
        tuple(weights.shape),
        tuple(bias.shape),
        tuple(temperature.shape),
        tuple(masks.shape),
        keep,
    )


def _packed_model(weights: Tensor, bias: Tensor, temperature: Tensor, masks: Tensor, keep: float) -> MCHeads:
    """Pack the heads, or find them packed: the same memory that was not written to since."""
    tensors = (weights, bias, temperature, masks)
    # Tensors made in inference mode do not tell when they are written to.
    key = None if any(t.is_inference() for t in tensors) else (keep, *(_identity(t) for t in tensors))
    if key is not None and key in _packed:
        _packed.move_to_end(key)
        return _packed[key][0]
    w, b, tau = (t.detach().float().contiguous().numpy() for t in tensors[:3])
    heads = MCHeads(w, b, tau, masks.detach().to(torch.uint8).contiguous().numpy(), keep, weight_type="auto")
    if key is not None:
        # Holding the tensors keeps their memory from being given to others.
        _packed[key] = heads, tensors
        if len(_packed) > PACKED_MODELS:
            _packed.popitem(last=False)
    return heads


def _identity(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t._version, t.dtype, tuple(t.shape), t.stride()

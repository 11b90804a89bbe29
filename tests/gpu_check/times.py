"""Time of the CUDA kernels against their floors, against torch, and within a whole ViT-B/16."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from trivium.kernels.cuda import BFLOAT16, EXPAND, FLOAT32, PRODUCT, STATISTICS, CudaLibrary

from .card import Heads, median_us
from .parity import Case, draw

HEADS = 3


class Row(NamedTuple):
    """Microseconds, medians."""

    batch: int
    units: int
    classes: int
    passes: int
    expand: float
    product: float
    statistics: float
    whole: float
    whole_float32: float
    statistics_floor: float
    product_floor: float
    eager: float
    compiled: float


class BackboneRow(NamedTuple):
    batch: int
    plain_us: float
    passes_us: float


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per microsecond, read plus written, of a copy much larger than the cache."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / median_us(lambda: target.copy_(source), device)


class Tensors(NamedTuple):
    """Features [B, D], weights [K C, D] in bfloat16, bias [K, C], temperature [K], masks / keep [T, D]."""

    h: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    tau: torch.Tensor
    m: torch.Tensor


def composite(t: Tensors) -> tuple[torch.Tensor, ...]:
    """MCHeads as one writes it in torch."""
    x = (t.h[:, None] * t.m).to(t.w.dtype)
    z = ((x @ t.w.T).float().unflatten(-1, t.b.shape) + t.b) / t.tau[:, None]
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(1)
    log_mean = mean.clamp_min(1e-30).log()
    entropy = -(mean * log_mean).sum(-1)
    expected = -(p * log_p).sum(-1).mean(1)
    divergence = -entropy[:, :, None] - torch.einsum("bic,bjc->bij", mean, log_mean)
    return mean, entropy, (entropy - expected).clamp_min(0), divergence.clamp_min(0), -z.logsumexp(-1).mean(1)


def measure(
    library: CudaLibrary, device: torch.device, shapes: Iterable[tuple[int, int, int, int]], with_compile: bool
) -> Iterator[Row]:
    """One row for each (B, D, C, T)."""
    bandwidth = copy_bandwidth(device, 1 << 30 if device.type == "cuda" else 1 << 10)
    for shape in shapes:
        yield measure_shape(library, device, bandwidth, shape, with_compile)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # each captured graph had a pool of its own


def measure_shape(
    library: CudaLibrary,
    device: torch.device,
    bandwidth: float,
    shape: tuple[int, int, int, int],
    with_compile: bool,
) -> Row:
    batch, units, classes, passes = shape
    features, arrays = draw(Case(batch, HEADS, classes, units, passes), seed=3)
    h = features.to(device)
    with Heads(library, h, *arrays, BFLOAT16) as heads:
        heads.run()
        expand, product, statistics = (median_us(partial(heads.run, s), device) for s in (EXPAND, PRODUCT, STATISTICS))
        whole = median_us(heads.run, device)
    with Heads(library, h, *arrays, FLOAT32) as wide:
        whole_float32 = median_us(wide.run, device)

    rows = batch * (passes // 2 + 1)  # of the antithetic product
    moved = 4 * (rows + batch) * HEADS * classes  # the logits in, the means out
    w, b, tau, m = (torch.from_numpy(a).to(device) for a in arrays[:4])
    tensors = Tensors(h, w.flatten(0, 1).bfloat16(), b, tau, m / arrays.keep)
    x = torch.randn(rows, units, device=device).bfloat16()
    out = torch.empty(rows, len(tensors.w), device=device, dtype=torch.bfloat16)
    compiled_us = float("nan")
    if with_compile:
        torch._dynamo.reset()
        compiled_us = median_us(partial(torch.compile(composite, dynamic=False), tensors), device)
    return Row(
        batch,
        units,
        classes,
        passes,
        expand,
        product,
        statistics,
        whole,
        whole_float32,
        moved / bandwidth,
        median_us(lambda: torch.mm(x, tensors.w.T, out=out), device),
        median_us(partial(composite, tensors), device),
        compiled_us,
    )


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2021) up to the class token's features, random weights."""

    def __init__(self, size: int = 224, patch: int = 16, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.norm(self.blocks(x))[:, 0]


@torch.inference_mode()
def measure_backbone(
    library: CudaLibrary,
    device: torch.device,
    batches: Iterable[int],
    passes: int = 32,
    classes: int = 1000,
    model: VisionTransformer | None = None,
) -> Iterator[BackboneRow]:
    """The whole network in bfloat16: with three plain linear heads and their softmax, and with MCHeads."""
    backbone = (model or VisionTransformer()).to(device).bfloat16().eval()
    size = 224 if model is None else 32
    for batch in batches:
        images = torch.randn(batch, 3, size, size, device=device).bfloat16()
        features = backbone(images)
        _, arrays = draw(Case(1, HEADS, classes, features.shape[1], passes), seed=4)
        w, b = (torch.from_numpy(a).to(device).flatten(0, 1).bfloat16() for a in arrays[:2])

        def plain(images: torch.Tensor = images, w: torch.Tensor = w, b: torch.Tensor = b) -> torch.Tensor:
            return nn.functional.linear(backbone(images), w, b).unflatten(-1, (HEADS, classes)).float().softmax(-1)

        with Heads(library, features.clone(), *arrays, BFLOAT16) as heads:

            def with_passes(images: torch.Tensor = images, heads: Heads = heads) -> None:
                heads.features.copy_(backbone(images))
                heads.run()

            yield BackboneRow(batch, median_us(plain, device, 400.0), median_us(with_passes, device, 400.0))

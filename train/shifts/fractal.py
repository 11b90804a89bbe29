"""Procedural pictures for PixMix to mix in: Julia sets, iterated function systems and plasma noise."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def fractals(n: int, size: int, seed: int) -> Tensor:
    """A mixing set, uint8 [n, 3, size, size]: Julia sets, iterated function systems and plasma noise in turn, each in
    colours of its own. Made at twice the size and averaged."""
    draw = np.random.default_rng(seed)
    makers = (_julia, _function_system, _plasma)
    pictures = [_coloured(makers[i % 3](draw, 2 * size), draw) for i in range(n)]
    if not pictures:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    fine = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (F.avg_pool2d(fine, 2) * 255).round().to(torch.uint8)


def _julia(draw: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Escape time of z^2 + c, c near the boundary of the Mandelbrot set's main cardioid, [size, size] in [0, 1]."""
    angle = draw.uniform(0, 2 * math.pi)
    c = np.complex64((np.exp(1j * angle) / 2 - np.exp(2j * angle) / 4) * draw.uniform(1.02, 1.12))
    zoom, turn = draw.uniform(0.6, 1.5), np.exp(1j * draw.uniform(0, 2 * math.pi))
    axis = np.linspace(-zoom, zoom, size, dtype=np.float32)
    z = ((axis[None, :] + 1j * axis[:, None]) * turn).astype(np.complex64)
    time = np.zeros((size, size), np.float32)
    for _ in range(32):
        z = z * z + c
        inside = np.abs(z) < 4
        time += inside
        z = np.where(inside, z, np.complex64(4))
    return np.asarray(time / 32, np.float32)


def _function_system(draw: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Log density of the attractor of two to five random affine contractions (chaos game), [size, size] in [0, 1]."""
    count = int(draw.integers(2, 6))
    singular = np.sort(draw.uniform(0.3, 1, (count, 2)), 1)[:, ::-1]
    # Areas that sum to about one: the attractor is neither dust nor a blot.
    singular *= np.sqrt(draw.uniform(0.8, 1.1) / singular.prod(1).sum())
    angles = draw.uniform(0, 2 * math.pi, (2, count))
    left, right = _rotations(angles[0]), _rotations(angles[1])
    maps = np.empty((count, 2, 3))
    maps[:, :, :2] = left @ (np.minimum(singular, 0.95)[:, :, None] * right)
    maps[:, :, 2] = draw.uniform(-1, 1, (count, 2))
    points = draw.uniform(-1, 1, (max(size * size // 12, 512), 2))
    density = np.zeros((size, size), np.float64)
    low = high = points[0]
    for step in range(28):
        chosen = maps[draw.integers(0, count, len(points))]
        points = np.einsum("nij,nj->ni", chosen[:, :, :2], points) + chosen[:, :, 2]
        if step < 12:
            low, high = np.quantile(points, [0.01, 0.99], axis=0)
            continue
        cell = ((points - low) / np.maximum(high - low, 1e-6) * size).astype(np.int64)
        inside = ((cell >= 0) & (cell < size)).all(1)
        density += np.bincount(cell[inside, 1] * size + cell[inside, 0], minlength=size * size).reshape(size, size)
    density = np.log1p(density)
    return np.asarray(density / max(density.max(), 1e-6), np.float32)


def _rotations(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)


def _plasma(draw: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Noise with the spectrum 1 / f^a, a from 1 to 2.2, [size, size] in [0, 1]."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(draw.standard_normal((size, size))) / frequency ** draw.uniform(1, 2.2)
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return np.asarray((noise - noise.min()) / (noise.max() - noise.min()), np.float32)


def _coloured(value: NDArray[np.float32], draw: np.random.Generator) -> NDArray[np.float32]:
    """[H, W] in [0, 1] -> [H, W, 3] through cosine palettes of random frequency and phase."""
    frequency, phase = draw.uniform(0.5, 2.5, 3), draw.uniform(0, 1, 3)
    return np.asarray(0.5 - 0.5 * np.cos(2 * math.pi * (value[:, :, None] * frequency + phase)), np.float32)

"""Style shifts of small data: the same pictures as a line drawing, inverted, as patches of texture, or low-passed.

They stand in for ImageNet-Sketch and Stylized ImageNet where no such set exists.
For the test alone. Training's structural views hold edges and inversion too, by other means: `seen_styles` tells which
styles a recipe has met.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .filters import Stack, gaussian, plasma

CYCLES = 4.0
"""Waves a side that a low-passed picture keeps (Geirhos et al. 2018 blur with Gaussians instead)."""
CONTRAST = 0.22
"""Of a texture about the mean of the patch that it fills, in [0, 1]."""
CHUNK = 1 << 22
"""Values worked on at once."""


def restyle(images: NDArray[np.uint8], name: str, seed: int, first: int = 0) -> NDArray[np.uint8]:
    """Pictures uint8 [B, H, W, 3] -> the same in one of STYLES.

    Picture i of the stack draws from (seed, name, first + i) alone, as in `corrupt`. Grey pictures stay grey.

    Raises: ValueError for an unknown name, another shape or dtype.
    """
    if name not in STYLES:
        raise ValueError(f"unknown style {name!r}; there are {', '.join(STYLES)}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"pictures must be uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
    out = np.empty_like(images)
    key = zlib.crc32(name.encode())
    size = max(CHUNK // max(images[:1].size, 1), 1)
    for start in range(0, len(images), size):
        part = images[start : start + size].astype(np.float32) / np.float32(255)
        draws = [np.random.default_rng((seed, key, first + start + i)) for i in range(len(part))]
        styled = _FUNCTIONS[name](part, draws)
        out[start : start + size] = np.rint(np.clip(styled, 0, 1) * np.float32(255)).astype(np.uint8)
    return out


def seen_styles(recipe: Any) -> list[str]:
    """The styles that training under a recipe has met: those that structural views hold, where any part of the recipe
    (a nest of mappings, as a checkpoint records it) draws such views."""
    if not isinstance(recipe, dict):
        return []
    share = recipe.get("structural")
    if isinstance(share, int | float) and share > 0:
        return ["sketch", "inversion"]
    return max((seen_styles(part) for part in recipe.values()), key=len, default=[])


Draws = list[np.random.Generator]


def _sketch(x: Stack, draws: Draws) -> Stack:
    """Dark lines on white: the dark side of the luma's edges by a difference of Gaussians (Winnemöller et al. 2012),
    inked alike in faint and strong pictures."""
    luma = _luma(x)
    sigma = max(0.7, min(x.shape[1:3]) / 150)
    difference = gaussian(luma, 1.6 * sigma) - gaussian(luma, sigma)
    dark = np.maximum(difference, 0)
    strongest = np.quantile(dark, 0.98, axis=(1, 2, 3), keepdims=True).astype(np.float32)
    ink = np.tanh(np.float32(2) * dark / np.maximum(strongest, np.float32(0.01)))
    return np.broadcast_to(1 - ink, x.shape)


def _inversion(x: Stack, draws: Draws) -> Stack:
    return 1 - x


def _texture(x: Stack, draws: Draws) -> Stack:
    """The picture's dark and bright patches (Otsu's threshold on the smoothed luma), each filled with a texture of its
    own about the patch's mean colour, so that outlines stay and everything within them is gone."""
    height, width = x.shape[1:3]
    smooth = gaussian(_luma(x), max(0.8, min(height, width) / 60))
    out = np.empty_like(x)
    for i, draw in enumerate(draws):
        bright = smooth[i, :, :, 0] > _otsu(smooth[i])
        for patch in (bright, ~bright):
            if patch.any():
                pattern = _pattern(draw, height, width)[patch][:, None]
                out[i][patch] = x[i][patch].mean(0) + np.float32(CONTRAST) * pattern
    return out


def _low_pass(x: Stack, draws: Draws) -> Stack:
    """Nothing above CYCLES waves a side, cut off sharply; the edges are mirrored first."""
    out = np.empty_like(x)
    height, width = x.shape[1:3]
    fy, fx = np.fft.fftfreq(2 * height) * height, np.fft.rfftfreq(2 * width) * width
    kept = (np.hypot(fy[:, None], fx[None, :]) <= CYCLES)[:, :, None]
    # one picture at a time: a transform of the whole stack may round otherwise beside other pictures
    for i, picture in enumerate(x):
        mirrored = np.pad(picture, ((0, height), (0, width), (0, 0)), mode="symmetric")
        waves = np.fft.rfft2(mirrored, axes=(0, 1)) * kept
        out[i] = np.fft.irfft2(waves, s=(2 * height, 2 * width), axes=(0, 1))[:height, :width]
    return out


def _luma(x: Stack) -> Stack:
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    result: Stack = (x * weights).sum(3, keepdims=True)
    return result


def _otsu(luma: Stack) -> float:
    """The threshold that parts the luma's 64-bin histogram with the largest variance between (Otsu 1979)."""
    counts, edges = np.histogram(luma, 64, (0.0, 1.0))
    middle = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    mass, whole = np.cumsum(counts * middle), (counts * middle).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (whole * below / total - mass) ** 2 / (below * (total - below))
    return float(edges[1 + int(np.nanargmax(between))]) if np.isfinite(between).any() else float(middle[0])


def _pattern(draw: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """[H, W] in [-1, 1]: stripes, checks or a cloud, of a direction and width of its own."""
    kind = draw.integers(0, 3)
    period = draw.uniform(0.1, 0.22) * min(height, width)
    angle, phase = draw.uniform(0, np.pi), draw.uniform(0, 2 * np.pi, 2)
    if kind == 2:
        side = 1 << max(max(height, width) - 1, 1).bit_length()
        cloud = plasma(draw.uniform(-1, 1, (1, side, side)).astype(np.float32), 1.3)[0, :height, :width]
        low, high = float(cloud.min()), float(cloud.max())
        cloudy: NDArray[np.float32] = (2 * (cloud - low) / max(high - low, 1e-6) - 1).astype(np.float32)
        return cloudy
    rows, columns = np.mgrid[:height, :width]
    across = np.sin(2 * np.pi * (columns * np.cos(angle) + rows * np.sin(angle)) / period + phase[0])
    along = np.sin(2 * np.pi * (rows * np.cos(angle) - columns * np.sin(angle)) / period + phase[1])
    striped: NDArray[np.float32] = np.sign(across if kind == 0 else across * along).astype(np.float32)
    return striped


_FUNCTIONS: dict[str, Callable[[Stack, Draws], Stack]] = {
    "sketch": _sketch,
    "inversion": _inversion,
    "texture": _texture,
    "low_pass": _low_pass,
}
STYLES = tuple(_FUNCTIONS)

"""Filters and textures under the corruptions, on float32 stacks [N, H, W, C].

Only sums of shifted slices and gathers: no matrix product or FFT touches a picture, so that its result does not depend
on the pictures beside it, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Stack = NDArray[np.float32]


def correlate(x: Stack, kernel: NDArray[np.float64], pad: Literal["edge", "reflect", "symmetric"]) -> Stack:
    """Correlation with a kernel of odd sides, as large as wanted."""
    high, wide = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(x, ((0, 0), (high, high), (wide, wide), (0, 0)), mode=pad)
    out = np.zeros_like(x)
    term = np.empty_like(x)
    for dy, dx in np.argwhere(kernel != 0):
        np.multiply(padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]], np.float32(kernel[dy, dx]), out=term)
        out += term
    return out


def gaussian(
    x: Stack, sigma: float, pad: Literal["edge", "reflect", "symmetric"] = "edge", truncate: float = 4.0
) -> Stack:
    """Gaussian blur with a standard deviation in pixels, cut at truncate of them."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    line /= line.sum()
    return correlate(correlate(x, line[:, None], pad), line[None, :], pad)


def disc(radius: float, alias_sigma: float) -> NDArray[np.float64]:
    """A disc-shaped kernel with its edge softened by a small Gaussian (3 x 3 up to radius 8, else 5 x 5)."""
    soft = 1 if radius <= 8 else 2
    reach = int(radius) + soft
    axis = np.arange(-reach, reach + 1)
    kernel = (axis[:, None] ** 2 + axis[None, :] ** 2 <= radius**2).astype(np.float64)
    line = np.exp(-0.5 * (np.arange(-soft, soft + 1) / max(alias_sigma, 1e-3)) ** 2)
    blurred = np.zeros_like(kernel)
    for i, weight_y in enumerate(line):
        for j, weight_x in enumerate(line):
            blurred += weight_y * weight_x * np.roll(kernel, (i - soft, j - soft), (0, 1))
    result: NDArray[np.float64] = blurred / blurred.sum()
    return result


def motion(x: Stack, radius: int, sigma: float, degrees: Sequence[float]) -> Stack:
    """One-sided Gaussian blur along a direction of each picture's own, 2 radius + 1 pixels long."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights = weights[weights > 1e-4] / weights[weights > 1e-4].sum()
    reach = len(weights)
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    out = np.zeros_like(x)
    height, width = x.shape[1:3]
    term = np.empty_like(x[0])
    for i, angle in enumerate(np.deg2rad(degrees)):
        for step, weight in enumerate(weights.astype(np.float32)):
            dy, dx = reach + round(step * math.sin(angle)), reach + round(step * math.cos(angle))
            np.multiply(padded[i, dy : dy + height, dx : dx + width], weight, out=term)
            out[i] += term
    return out


def zoom(x: Stack, factor: float) -> Stack:
    """Enlarge about the centre by factor >= 1, bilinearly, keeping the size."""
    return _stretch(_stretch(x, factor, 1), factor, 2)


def _stretch(x: Stack, factor: float, axis: int) -> Stack:
    size = x.shape[axis]
    centre = (size - 1) / 2
    place = (np.arange(size) - centre) / factor + centre
    low = np.floor(place).astype(np.int64).clip(0, max(size - 2, 0))
    shape = [1, 1, 1, 1]
    shape[axis] = size
    share = (place - low).astype(np.float32).reshape(shape)
    first, second = x.take(low, axis), x.take(np.minimum(low + 1, size - 1), axis)
    result: Stack = first + share * (second - first)
    return result


def sample(x: Stack, rows: NDArray[np.float32], columns: NDArray[np.float32]) -> Stack:
    """Bilinear samples at pixel positions [N, H, W], mirrored about the outermost pixels."""
    count, height, width = x.shape[:3]
    rows, columns = _mirrored(rows, height), _mirrored(columns, width)
    top, left = rows.astype(np.int64).clip(0, max(height - 2, 0)), columns.astype(np.int64).clip(0, max(width - 2, 0))
    down, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    fy, fx = (rows - top)[..., None], (columns - left)[..., None]
    n = np.arange(count)[:, None, None]
    upper = x[n, top, left] * (1 - fx) + x[n, top, right] * fx
    lower = x[n, down, left] * (1 - fx) + x[n, down, right] * fx
    result: Stack = upper * (1 - fy) + lower * fy
    return result


def _mirrored(place: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    period = np.float32(max(2 * (size - 1), 1))
    place = np.mod(place, period)
    result: Stack = np.minimum(place, period - place)
    return result


def shuffle(x: Stack, reach: int, offsets: NDArray[np.int8]) -> Stack:
    """Swap each pixel with a neighbour at most reach pixels away: offsets [N, H, W, 2] (rows, columns).

    The swaps run over sub-lattices so coarse that no two of one of them touch the same pixel.
    """
    count, height, width = x.shape[:3]
    flat = x.reshape(count, height * width, -1).copy()
    n = np.arange(count)[:, None]
    pitch = 2 * reach + 1
    for phase in range(pitch * pitch):
        row = np.arange(reach + phase // pitch, height - reach, pitch)
        column = np.arange(reach + phase % pitch, width - reach, pitch)
        if not (row.size and column.size):
            continue
        here = (row[:, None] * width + column[None, :]).ravel()
        jump = offsets[:, row[:, None], column[None, :]].reshape(count, -1, 2).astype(np.int64)
        there = here[None, :] + jump[..., 0] * width + jump[..., 1]
        mine, other = flat[:, here], flat[n, there]
        flat[:, here] = other
        flat[n, there] = mine
    return flat.reshape(x.shape)


def plasma(noise: NDArray[np.float32], decay: float) -> Stack:
    """Diamond-square fractals [N, S, S] in [0, 1], S a power of two, periodic; noise uniform in [-1, 1], [N, S, S];
    its weight falls by decay with each halving of the step."""
    size = noise.shape[1]
    out = np.zeros_like(noise)
    step, weight = size, np.float32(1)
    while step >= 2:
        half = step // 2
        corners = out[:, ::step, ::step]
        right, below = np.roll(corners, -1, 2), np.roll(corners, -1, 1)
        across = np.roll(right, -1, 1)
        centre = (corners + right + below + across) / 4 + weight * noise[:, half::step, half::step]
        out[:, half::step, half::step] = centre
        top = (corners + right + centre + np.roll(centre, 1, 1)) / 4
        out[:, ::step, half::step] = top + weight * noise[:, ::step, half::step]
        side = (corners + below + centre + np.roll(centre, 1, 2)) / 4
        out[:, half::step, ::step] = side + weight * noise[:, half::step, ::step]
        step, weight = half, weight / np.float32(decay)
    out -= out.min((1, 2), keepdims=True)
    result: Stack = out / np.maximum(out.max((1, 2), keepdims=True), np.float32(1e-6))
    return result


@lru_cache(maxsize=4)
def frost_textures(side: int) -> NDArray[np.float32]:
    """Five procedural window frosts [5, T, T, 3] in [0, 1], T = 2 side, periodic: ridges of directed noise for the
    crystals' needles, laid where a cloud is dense, bluish white."""
    size = 2 * side
    draw = np.random.default_rng(20)
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    radius = np.hypot(fy, fx) * size
    radius[0, 0] = np.inf

    def noise(envelope: NDArray[np.float64]) -> NDArray[np.float64]:
        field = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((size, size))) * envelope, s=(size, size))
        result: NDArray[np.float64] = field / field.std()
        return result

    textures = []
    for _ in range(5):
        cloud = 1 / (1 + np.exp(-1.2 * noise(radius**-1.8)))
        needles = np.zeros((size, size))
        for turn in draw.uniform(0, math.pi) + np.arange(3) * math.pi / 3:
            along = np.abs(np.cos(np.arctan2(fy, fx) - turn))
            directed = noise(np.exp(-((along / 0.25) ** 2)) * radius**-0.9)
            patch = 1 / (1 + np.exp(-3 * noise(radius**-1.8)))
            needles = np.maximum(needles, np.exp(-((directed / 0.35) ** 2)) * patch)
        grain = noise(radius**-0.4)
        value = 0.2 + 0.35 * cloud + 0.55 * needles * (0.35 + 0.65 * cloud) + 0.03 * grain
        textures.append(value[:, :, None] * np.array([0.88, 0.97, 1.04]))
    result: Stack = np.clip(np.stack(textures), 0, 1).astype(np.float32)
    return result

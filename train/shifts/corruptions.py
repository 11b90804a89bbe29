"""The corruptions of ImageNet-C in five severities, batched, for pictures from 28 x 28 grey to 224 x 224 colour.

Names, formulas and strengths follow Hendrycks and Dietterich (2019): their ImageNet-C at 224 pixels and their
CIFAR-10-C at 32. Between these sides every strength is interpolated linearly in the side; smaller pictures get the
strengths of 32, on larger ones lengths (radii, displacements) grow with the side and the rest stays. What differs,
because it had to be batched or its files cannot be shipped:

- a grey picture (three equal channels) gets grey noise and stays grey; saturate alone tints it, in every severity;
- frost is laid from procedural textures, not from photographs of frost;
- glass_blur swaps pixels lattice by lattice, not in raster order;
- spatter's water is lit by a plain relief instead of an edge and distance transform;
- a few strengths are graded anew (strengths.py says which), so that every severity damages more than the one before.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .filters import Stack, correlate, disc, frost_textures, gaussian, motion, plasma, sample, shuffle, zoom
from .strengths import SEVERITIES as SEVERITIES
from .strengths import STRENGTHS, strengths

TEST_CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The fifteen of the benchmark: for the test alone, never seen in training or calibration."""
CALIBRATION_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The benchmark's four validation corruptions: for calibration alone, never in a headline."""

CHUNK = 1 << 18
"""Values worked on at once: their float32 stays in a core's cache."""


def corrupt(images: NDArray[np.uint8], name: str, severity: int, seed: int, first: int = 0) -> NDArray[np.uint8]:
    """Corrupt pictures uint8 [B, H, W, 3] -> the same; severity 1 to 5.

    Picture i of the stack draws from (seed, name, first + i) alone: give `first` to corrupt a long set in pieces. The
    draws do not depend on the severity, so that a picture only gets worse with it.

    Raises: ValueError for an unknown name, a severity outside 1 to 5, another shape or dtype, or a negative seed.
    """
    if name not in STRENGTHS:
        raise ValueError(f"unknown corruption {name!r}; there are {', '.join(STRENGTHS)}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"pictures must be uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
    if seed < 0 or first < 0:
        raise ValueError(f"seed and first must not be negative, got {seed} and {first}")
    strength = strengths(name, severity, min(images.shape[1:3]))
    out = np.empty_like(images)
    grey = (images == images[..., :1]).all((1, 2, 3)) & (name != "saturate")
    for channels, chosen in ((1, np.flatnonzero(grey)), (3, np.flatnonzero(~grey))):
        size = max(CHUNK // (images.shape[1] * images.shape[2] * channels), 1)
        for start in range(0, len(chosen), size):
            rows = chosen[start : start + size]
            key = zlib.crc32(name.encode())
            draws = [np.random.default_rng((seed, key, first + int(row))) for row in rows]
            x = images[rows][..., :channels].astype(np.float32) / np.float32(255)
            result = _FUNCTIONS[name](x, strength, draws)
            out[rows] = np.rint(np.clip(result, 0, 1) * np.float32(255)).astype(np.uint8)
    return out


Draws = list[np.random.Generator]


def _normal(draws: Draws, x: Stack, channels: int | None = None) -> Stack:
    shape = x.shape[1:3] + (channels or x.shape[3],)
    return np.stack([draw.standard_normal(shape, np.float32) for draw in draws])


def _uniform(draws: Draws, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.stack([draw.random(shape, np.float32) for draw in draws])


def _gaussian_noise(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    return x + _normal(draws, x) * np.float32(strength[0])


def _shot_noise(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    photons = 1 / strength[0]
    counts = [draw.poisson(picture * photons) for draw, picture in zip(draws, x, strict=True)]
    return (np.stack(counts) / photons).astype(np.float32)


def _impulse_noise(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    chance = _uniform(draws, x.shape[1:])
    half = np.float32(strength[0] / 2)
    return np.where(chance < half, np.float32(0), np.where(chance > 1 - half, np.float32(1), x))


def _speckle_noise(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    return x + x * _normal(draws, x) * np.float32(strength[0])


def _gaussian_blur(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    return gaussian(x, strength[0])


def _defocus_blur(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    return correlate(x, disc(*strength), "reflect")


def _glass_blur(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    sigma, reach, times = strength[0], max(round(strength[1]), 1), max(round(strength[2]), 1)
    x = gaussian(x, sigma)
    for _ in range(times):
        offsets = np.stack([draw.integers(-reach, reach, (*x.shape[1:3], 2), np.int8) for draw in draws])
        x = shuffle(x, reach, offsets)
    return gaussian(x, sigma)


def _motion_blur(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    return motion(x, max(round(strength[0]), 1), strength[1], [draw.uniform(-45, 45) for draw in draws])


def _zoom_blur(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    factors = np.arange(1, *strength)
    total = x.copy()
    for factor in factors:
        total += zoom(x, float(factor))
    return total / np.float32(len(factors) + 1)


def _snow(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    mean, deviation, enlargement, threshold, radius, sigma, weight = strength
    flakes = _normal(draws, x, 1) * np.float32(deviation) + np.float32(mean)
    flakes = zoom(flakes, enlargement)
    flakes = np.where(flakes < threshold, np.float32(0), np.clip(flakes, 0, 1))
    flakes = motion(flakes, max(round(radius), 1), sigma, [draw.uniform(-135, -45) for draw in draws])
    whitened = np.maximum(x, _luma(x) * np.float32(1.5) + np.float32(0.5))
    result: Stack = np.float32(weight) * x + np.float32(1 - weight) * whitened + flakes + flakes[:, ::-1, ::-1]
    return result


def _frost(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    textures = frost_textures(max(x.shape[1:3]))
    pieces = []
    for draw in draws:
        which, top, left = draw.integers(0, (len(textures), *textures.shape[1:3]))
        rows = (np.arange(x.shape[1]) + top) % textures.shape[1]
        columns = (np.arange(x.shape[2]) + left) % textures.shape[2]
        pieces.append(textures[which][rows[:, None], columns])
    frost = np.stack(pieces)
    return np.float32(strength[0]) * x + np.float32(strength[1]) * (frost if x.shape[3] == 3 else _luma(frost))


def _fog(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    density, decay = strength
    side = 1 << (max(x.shape[1:3]) - 1).bit_length()
    cloud = plasma(_uniform(draws, (side, side)) * 2 - 1, decay)[:, : x.shape[1], : x.shape[2], None]
    top = x.max((1, 2, 3), keepdims=True)
    result: Stack = (x + np.float32(density) * cloud) * top / (top + np.float32(density))
    return result


def _brightness(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    value = x.max(3, keepdims=True)
    brighter = np.minimum(value + np.float32(strength[0]), 1)
    result: Stack = np.where(value > 0, x * (brighter / np.maximum(value, np.float32(1e-6))), brighter)
    return result


def _contrast(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    mean = x.mean((1, 2), keepdims=True)
    result: Stack = (x - mean) * np.float32(strength[0]) + mean
    return result


def _elastic_transform(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    amplitude, smoothness, corner = strength
    count, height, width = x.shape[:3]
    centre, reach = np.array([width / 2, height / 2]), min(height, width) / 3
    anchors = centre + reach * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    shifts = np.stack([draw.uniform(-1, 1, (3, 2)) for draw in draws])
    noise = _uniform(draws, (height, width, 2)) * 2 - 1
    rough = gaussian(noise, smoothness, "symmetric", truncate=3.0) * np.float32(amplitude)
    y, x_ = np.mgrid[:height, :width].astype(np.float64)
    ones = np.concatenate([anchors, np.ones((3, 1))], 1)
    rows = np.empty((count, height, width), np.float32)
    columns = np.empty_like(rows)
    for i in range(count):
        # The affine map that takes the moved anchors back to the anchors.
        moved = np.concatenate([anchors + shifts[i] * corner, np.ones((3, 1))], 1)
        back = np.linalg.solve(moved, ones)
        columns[i] = x_ * back[0, 0] + y * back[1, 0] + back[2, 0]
        rows[i] = x_ * back[0, 1] + y * back[1, 1] + back[2, 1]
    return sample(x, rows + rough[..., 0], columns + rough[..., 1])


def _pixelate(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    height, width = x.shape[1:3]
    small = (max(int(width * strength[0]), 1), max(int(height * strength[0]), 1))
    box = Image.Resampling.BOX
    return _from_pillow([p.resize(small, box).resize((width, height), box) for p in _to_pillow(x)])


def _jpeg_compression(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    pictures = []
    for picture in _to_pillow(x):
        file = BytesIO()
        picture.save(file, "JPEG", quality=round(strength[0]))
        pictures.append(Image.open(file, formats=["JPEG"]))
    return _from_pillow(pictures)


def _spatter(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    mean, deviation, smoothness, threshold, amount, mud = strength
    liquid = gaussian(_normal(draws, x, 1) * np.float32(deviation) + np.float32(mean), smoothness)
    liquid = np.where(liquid < threshold, np.float32(0), liquid)
    if mud > 0.5:
        cover = gaussian((liquid > threshold).astype(np.float32), amount)
        cover = np.where(cover < 0.8, np.float32(0), cover)
        return x * (1 - cover) + _colour((63, 42, 20), x) * cover
    light = correlate(liquid, np.array([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]]), "reflect")
    relief = gaussian(np.clip(liquid + light, 0, None), 0.6)
    relief = relief / np.maximum(relief.max((1, 2, 3), keepdims=True), np.float32(1e-6))
    result: Stack = x + relief * np.float32(amount) * _colour((175, 238, 238), x)
    return result


def _saturate(x: Stack, strength: tuple[float, ...], draws: Draws) -> Stack:
    value, low = x.max(3, keepdims=True), x.min(3, keepdims=True)
    spread = value - low
    # How far each channel lies below the brightest, of the whole spread; a grey pixel counts as red (hue 0).
    below = np.where(spread > 0, (value - x) / np.maximum(spread, np.float32(1e-6)), np.array([0, 1, 1], np.float32))
    saturation = spread / np.maximum(value, np.float32(1e-6))
    grey = spread.max((1, 2, 3), keepdims=True) == 0
    summand = np.where(grey, np.float32(strength[2]), np.float32(strength[1]))
    saturation = np.clip(saturation * np.float32(strength[0]) + summand, 0, 1)
    result: Stack = value * (1 - saturation * below)
    return result


def _luma(x: Stack) -> Stack:
    if x.shape[3] == 1:
        return x
    red, green, blue = x[..., :1], x[..., 1:2], x[..., 2:]
    result: Stack = red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114)
    return result


def _colour(rgb: tuple[int, int, int], x: Stack) -> Stack:
    colour = np.array(rgb, np.float32).reshape(1, 1, 1, 3) / np.float32(255)
    return colour if x.shape[3] == 3 else _luma(colour)


def _to_pillow(x: Stack) -> list[Image.Image]:
    bytes_ = np.rint(x * np.float32(255)).astype(np.uint8)
    return [Image.fromarray(picture if x.shape[3] == 3 else picture[..., 0]) for picture in bytes_]


def _from_pillow(pictures: Sequence[Image.Image]) -> Stack:
    stack: Stack = np.stack([np.asarray(picture, np.float32) for picture in pictures]) / np.float32(255)
    return stack if stack.ndim == 4 else stack[..., None]


_FUNCTIONS: dict[str, Callable[[Stack, tuple[float, ...], Draws], Stack]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}

"""The corruptions of ImageNet-C in five severities, batched, for pictures from 28 x 28 grey to 224 x 224 colour.

Names, formulas and strengths follow Hendrycks and Dietterich (2019): their ImageNet-C at 224 pixels and their
CIFAR-10-C at 32. Between these sides every strength is interpolated linearly in the side; smaller pictures get the
strengths of 32, on larger ones lengths (radii, displacements) grow with the side and the rest stays. What differs,
because it had to be batched or its files cannot be shipped:

- a grey picture (three equal channels) gets grey noise and stays grey, save under saturate;
- frost is laid from procedural textures, not from photographs of frost;
- glass_blur swaps pixels lattice by lattice, not in raster order;
- spatter's water is lit by a plain relief instead of an edge and distance transform, and its strengths are our own;
- where the published strengths do not damage more with each severity they were graded anew: glass_blur at 32,
  elastic_transform (the affine part held small), saturate (order, and more of it at 32).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .filters import Stack, correlate, disc, frost_textures, gaussian, motion, plasma, sample, shuffle, zoom

TEST_CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The fifteen of the benchmark: for the test alone, never seen in training or calibration."""
CALIBRATION_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The benchmark's four validation corruptions: for calibration alone, never in a headline."""
SEVERITIES = (1, 2, 3, 4, 5)

Rows = tuple[tuple[float, ...], ...]
SMALL, LARGE = 32, 224
STRENGTHS: dict[str, tuple[Rows, Rows]] = {
    # name: (five severities at a side of 32, five at 224)
    "gaussian_noise": (((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)), ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    # one over the photons of a white pixel
    "shot_noise": (
        ((1 / 500,), (1 / 250,), (1 / 100,), (1 / 75,), (1 / 50,)),
        ((1 / 60,), (1 / 25,), (1 / 12,), (1 / 5,), (1 / 3,)),
    ),
    "impulse_noise": (((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)), ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    # radius, softening
    "defocus_blur": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    # standard deviation, reach, repetitions
    "glass_blur": (
        ((0.4, 1, 1), (0.4, 1, 2), (0.4, 1, 3), (0.4, 2, 2), (0.4, 2, 3)),
        ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    # radius, standard deviation
    "motion_blur": (
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    # end (exclusive), step of the enlargements
    "zoom_blur": (
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    # mean, deviation, enlargement, threshold of the flakes; radius, deviation of their fall; weight of the picture
    "snow": (
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    # weights of picture and frost
    "frost": (
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    # density, decay of the plasma
    "fog": (
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)), ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)), ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    # amplitude, smoothness of the displacement; largest displacement of the affine map's corners
    "elastic_transform": (
        ((1.28, 1.28, 0.48), (1.92, 1.28, 0.72), (2.56, 1.28, 0.96), (3.2, 1.28, 0.96), (3.2, 0.96, 0.96)),
        ((4.88, 2.44, 2.44), (8.54, 2.44, 3.66), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
    # side of the shrunk picture
    "pixelate": (((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)), ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    # quality
    "jpeg_compression": (((80,), (65,), (58,), (50,), (40,)), ((25,), (18,), (15,), (10,), (7,))),
    "speckle_noise": (((0.06,), (0.1,), (0.12,), (0.16,), (0.2,)), ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,))),
    "gaussian_blur": (((0.4,), (0.6,), (0.7,), (0.8,), (1.0,)), ((1,), (2,), (3,), (4,), (6,))),
    # mean, deviation, smoothness, threshold of the liquid; its strength (water) or smoothness (mud); 1 for mud
    "spatter": (
        (
            (0.62, 0.1, 0.7, 0.7, 0.25, 0),
            (0.65, 0.1, 0.8, 0.7, 0.25, 0),
            (0.65, 0.3, 1, 0.69, 0.25, 0),
            (0.65, 0.1, 0.7, 0.66, 0.6, 1),
            (0.65, 0.1, 0.5, 0.62, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.3, 0),
            (0.65, 0.3, 3, 0.68, 0.3, 0),
            (0.65, 0.3, 2, 0.68, 0.25, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    # factor and summand of the saturation
    "saturate": (
        ((1.5, 0), (0.3, 0), (0.1, 0), (2.5, 0.1), (3, 0.2)),
        ((2, 0), (0.3, 0), (0.1, 0), (5, 0.1), (20, 0.2)),
    ),
}
LENGTHS = {
    "defocus_blur": (0,), "glass_blur": (0, 1), "motion_blur": (0, 1), "snow": (4, 5), "elastic_transform": (0, 1, 2),
    "gaussian_blur": (0,), "spatter": (2,),
}  # fmt: skip
"""Which strengths are lengths in pixels."""
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


def strengths(name: str, severity: int, side: int) -> tuple[float, ...]:
    """The numbers of a corruption for pictures whose shorter side has so many pixels.

    Raises: ValueError for a severity outside 1 to 5.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to 5, got {severity}")
    small, large = STRENGTHS[name]
    inside = min(max(side, SMALL), LARGE)
    share = (inside - SMALL) / (LARGE - SMALL)
    values = [a + (b - a) * share for a, b in zip(small[severity - 1], large[severity - 1], strict=True)]
    for index in LENGTHS.get(name, ()):
        values[index] *= max(side / inside, 1.0)
    return tuple(values)


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
    saturation = np.clip(saturation * np.float32(strength[0]) + np.float32(strength[1]), 0, 1)
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

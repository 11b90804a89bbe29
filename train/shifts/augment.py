"""Batched augmentations on float pictures in [0, 1]: AugMix, PixMix with its fractals, structural views.

Every random parameter is drawn per picture from the torch.Generator that the caller gives (always a CPU one; the
pictures may lie on any device). Channels may be 3, or 1 where all three would be equal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .fractal import fractals as fractals

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
PHOTOMETRIC = ("autocontrast", "equalize", "posterize", "solarize")
OPERATIONS = GEOMETRIC + PHOTOMETRIC
"""AugMix's default operations: colour, contrast, brightness and sharpness stay out, they overlap with the test's."""


def augmix(
    x: Tensor, generator: torch.Generator, severity: float = 3, width: int = 3, depth: int = -1, alpha: float = 1.0
) -> Tensor:
    """AugMix (Hendrycks et al. 2020): (1 - m) x + m sum_i w_i chain_i(x), w ~ Dirichlet(alpha), m ~ Beta(alpha, alpha).

    x: [B, C, H, W]. width: chains. depth: operations a chain, -1 for one to three. severity: 1 to 10.
    """
    draw = _numpy_generator(generator)
    batch = len(x)
    weights = draw.dirichlet([alpha] * width, batch)
    m = draw.beta(alpha, alpha, batch)
    depths = draw.integers(1, 4, width * batch) if depth < 0 else np.full(width * batch, depth)
    chains = x.repeat(width, 1, 1, 1)
    for step in range(int(depths.max(initial=0))):
        operation = draw.integers(0, len(OPERATIONS), width * batch)
        chains = apply_operations(chains, np.where(step < depths, operation, -1), *_levels(draw, chains, severity))
    mixed = torch.einsum("kbchw,bk->bchw", chains.view(width, *x.shape), _like(weights, x))
    return torch.lerp(x, mixed, _like(m, x)[:, None, None, None])


def pixmix(
    x: Tensor, mixing_set: Tensor, generator: torch.Generator, k: int = 4, beta: float = 3.0, severity: float = 3
) -> Tensor:
    """PixMix (Hendrycks et al. 2022): zero to k times mix with an augmented self or a picture of the mixing set, by
    addition or multiplication.

    x: [B, C, H, W]. mixing_set: uint8 or float in [0, 1], [M, C or 1 or 3, H, W]. The operations are OPERATIONS.
    Raises: ValueError where the mixing set's size is not the pictures'.
    """
    if mixing_set.shape[-2:] != x.shape[-2:]:
        raise ValueError(f"mixing set of {tuple(mixing_set.shape[-2:])} for pictures of {tuple(x.shape[-2:])}")
    draw = _numpy_generator(generator)
    batch = len(x)
    rounds = draw.integers(0, k + 1, batch)
    mixed = _augmented(x, draw, severity, draw.random(batch) < 0.5)
    for round_ in range(int(rounds.max(initial=0))):
        active = np.flatnonzero(round_ < rounds)
        own = draw.random(len(active)) < 0.5
        partner = _augmented(x[_index(active, x)], draw, severity, own)
        chosen = draw.integers(0, len(mixing_set), int((~own).sum()))
        partner[_index(np.flatnonzero(~own), x)] = _pictures(mixing_set, chosen, x)
        add = draw.random(len(active)) < 0.5
        a, b = _mixing_weights(draw, len(active), beta)
        mixed[_index(active, x)] = mix(mixed[_index(active, x)], partner, add, a, b)
    return mixed


def mix(u: Tensor, v: Tensor, add: NDArray[np.bool_], a: NDArray[np.float64], b: NDArray[np.float64]) -> Tensor:
    """PixMix's step [B, C, H, W], clipped to [0, 1]: where add, a u + b v on pictures in [-1, 1], else
    (2u)^a (2v)^b / 2."""
    a_, b_ = _like(a, u)[:, None, None, None], _like(b, u)[:, None, None, None]
    chosen = torch.from_numpy(add).to(u.device)[:, None, None, None]
    total = (a_ * (2 * u - 1) + b_ * (2 * v - 1) + 1) / 2
    # The floor keeps a zero to a negative power finite, so that no 0 * inf arises.
    product = (2 * u) ** a_ * (2 * v).clamp(min=1e-37) ** b_ / 2
    return torch.where(chosen, total, product).clamp(0, 1)


def apply_operations(
    x: Tensor, operation: NDArray[np.int64], level: NDArray[np.float64], sign: NDArray[np.float64]
) -> Tensor:
    """One operation a picture: index into OPERATIONS or -1 for none; level in 0 to 10; sign +-1 of a geometric one.

    Strengths at level 10 as in AugMix: 30 degrees, shear 0.3, a third of the side, posterise to 0 bits, solarise all.
    """
    out = x.clone()
    geometric = np.flatnonzero((operation >= 0) & (operation < len(GEOMETRIC)))
    if geometric.size:
        rows = _index(geometric, x)
        size = (x.shape[-2], x.shape[-1])
        matrix = affine_matrices(operation[geometric], level[geometric], sign[geometric], size)
        out[rows] = affine(x[rows], matrix)
    for index, name in enumerate(PHOTOMETRIC, start=len(GEOMETRIC)):
        chosen = np.flatnonzero(operation == index)
        if chosen.size:
            rows = _index(chosen, x)
            out[rows] = _PHOTOMETRIC[name](x[rows], _like(level[chosen], x)[:, None, None, None])
    return out


def affine_matrices(
    operation: NDArray[np.int64], level: NDArray[np.float64], sign: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.float64]:
    """Maps [N, 2, 3] from output to input pixels (x, y, 1), corner at 0, as Pillow's AFFINE takes them."""
    height, width = size
    matrix = np.zeros((len(operation), 2, 3))
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    angle = np.deg2rad(np.trunc(level * 3) * sign)
    shear = level * 0.03 * sign
    for index, name in enumerate(GEOMETRIC):
        rows = operation == index
        if name == "rotate":
            cos, sin = np.cos(angle[rows]), np.sin(angle[rows])
            matrix[rows, 0] = np.stack([cos, -sin, (1 - cos) * width / 2 + sin * height / 2], 1)
            matrix[rows, 1] = np.stack([sin, cos, (1 - cos) * height / 2 - sin * width / 2], 1)
        elif name == "shear_x":
            matrix[rows, 0, 1] = shear[rows]
        elif name == "shear_y":
            matrix[rows, 1, 0] = shear[rows]
        elif name == "translate_x":
            matrix[rows, 0, 2] = np.trunc(level[rows] * width / 30) * sign[rows]
        else:
            matrix[rows, 1, 2] = np.trunc(level[rows] * height / 30) * sign[rows]
    return matrix


def affine(x: Tensor, matrix: NDArray[np.float64]) -> Tensor:
    """Resample [N, C, H, W] bilinearly under pixel maps [N, 2, 3]; black outside."""
    height, width = x.shape[-2:]
    # From pixels with the corner at 0 to grid_sample's [-1, 1]: conjugate by the scaling.
    theta = matrix.copy()
    theta[:, :, 2] += matrix[:, :, 0] * width / 2 + matrix[:, :, 1] * height / 2 - np.array([width / 2, height / 2])
    theta[:, 0] *= np.array([1.0, height / width, 2 / width])
    theta[:, 1] *= np.array([width / height, 1.0, 2 / height])
    grid = F.affine_grid(_like(theta, x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def autocontrast(x: Tensor) -> Tensor:
    """Stretch each channel of each picture to [0, 1]; a constant one stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-12), x)


def equalize(x: Tensor) -> Tensor:
    """Equalise the histogram of each channel of each picture, on 256 levels as Pillow does."""
    value = (x * 255).round().clamp(0, 255).long().flatten(2)
    histogram = torch.zeros(*value.shape[:2], 256, dtype=torch.long, device=x.device)
    histogram.scatter_add_(2, value, torch.ones_like(value))
    last = value.amax(2, keepdim=True)
    step = (value.shape[2] - histogram.gather(2, last)) // 255
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device))
    return (table.gather(2, value).to(x.dtype) / 255).view_as(x)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits (per picture) of 8-bit values."""
    step = 2.0 ** (8 - bits)
    return ((x * 255).round() / step).floor() * step / 255


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert the 8-bit values at or above the threshold (per picture, 0 to 256)."""
    return torch.where((x * 255).round() < threshold, x, 1 - x)


_PHOTOMETRIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": lambda x, level: autocontrast(x),
    "equalize": lambda x, level: equalize(x),
    "posterize": lambda x, level: posterize(x, 4 - (level * 0.4).trunc()),
    "solarize": lambda x, level: solarize(x, 256 - (level * 25.6).trunc()),
}


def structural(x: Tensor, generator: torch.Generator) -> Tensor:
    """Views that keep shape and drop colour and texture [B, C, H, W]; one each by chance: Sobel edges (light on dark or
    dark on light), threshold, inversion, grey, posterised to 2 to 4 levels, another background."""
    draw = _numpy_generator(generator)
    kind = draw.integers(0, 6, len(x))
    strength = draw.random(len(x))
    flip = draw.random(len(x)) < 0.5
    colours = draw.random((len(x), 2, x.shape[1]))
    out = x.clone()
    for index in range(6):
        chosen = np.flatnonzero(kind == index)
        if not chosen.size:
            continue
        rows = _index(chosen, x)
        part, level = x[rows], _like(strength[chosen], x)[:, None, None, None]
        inverted = torch.from_numpy(flip[chosen]).to(x.device)[:, None, None, None]
        if index == 0:
            view = edges(part)
            view = torch.where(inverted, 1 - view, view)
        elif index == 1:
            view = (luma(part) > threshold_of(part) + (level - 0.5) * 0.3).to(x.dtype).expand_as(part)
            view = torch.where(inverted, 1 - view, view)
        elif index == 2:
            view = 1 - part
        elif index == 3:
            view = luma(part).expand_as(part)
        elif index == 4:
            levels = 2 + (level * 3).floor()
            view = (part * levels).floor().clamp(max=levels - 1) / (levels - 1)
        else:
            view = replace_background(part, _like(colours[chosen], x))
        out[rows] = view
    return out


def luma(x: Tensor) -> Tensor:
    """Grey [B, 1, H, W] with Rec. 601 weights."""
    if x.shape[1] == 1:
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return torch.einsum("bchw,c->bhw", x, weights)[:, None]


def edges(x: Tensor) -> Tensor:
    """Sobel gradient magnitude of the luma, scaled to a maximum of 1 a picture, [B, C, H, W]."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=x.dtype, device=x.device)
    padded = F.pad(luma(x), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None]).square().sum(1, keepdim=True).sqrt()
    return (gradient / gradient.amax((2, 3), keepdim=True).clamp(min=1e-3)).expand_as(x)


def threshold_of(x: Tensor) -> Tensor:
    """Middle between the mean of the luma's darker and brighter half-ranges [B, 1, 1, 1] (one step of Ridler's)."""
    grey = luma(x)
    middle = (grey.amin((2, 3), keepdim=True) + grey.amax((2, 3), keepdim=True)) / 2
    bright = (grey > middle).to(x.dtype)
    high = (grey * bright).sum((2, 3), keepdim=True) / bright.sum((2, 3), keepdim=True).clamp(min=1)
    low = (grey * (1 - bright)).sum((2, 3), keepdim=True) / (1 - bright).sum((2, 3), keepdim=True).clamp(min=1)
    return (high + low) / 2


def replace_background(x: Tensor, colours: Tensor) -> Tensor:
    """Give what has the colour of the border (its median) a vertical gradient between two colours [B, 2, C]."""
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
    distance = (x - border[:, :, None, None]).abs().amax(1, keepdim=True)
    keep = ((distance - 0.04) / 0.08).clamp(0, 1)
    ramp = torch.linspace(0, 1, x.shape[2], dtype=x.dtype, device=x.device)[None, None, :, None]
    background = torch.lerp(colours[:, 0, :, None, None], colours[:, 1, :, None, None], ramp)
    return torch.lerp(background.expand_as(x), x, keep)


def _augmented(x: Tensor, draw: np.random.Generator, severity: float, chosen: NDArray[np.bool_]) -> Tensor:
    """A copy of x in which each chosen picture went through one operation."""
    operation = np.where(chosen, draw.integers(0, len(OPERATIONS), len(x)), -1)
    return apply_operations(x, operation, *_levels(draw, x, severity))


def _levels(draw: np.random.Generator, x: Tensor, severity: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return draw.uniform(0.1, severity, len(x)), draw.choice([-1.0, 1.0], len(x))


def _mixing_weights(
    draw: np.random.Generator, count: int, beta: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    inside = draw.random(count) < 0.5
    a = np.where(inside, draw.beta(beta, 1, count), 1 + draw.beta(1, beta, count))
    b = draw.beta(1, beta, count) * np.where(inside, 1, -1)
    return a, b


def _pictures(mixing_set: Tensor, chosen: NDArray[np.int64], x: Tensor) -> Tensor:
    pictures = mixing_set[_index(chosen, mixing_set)].to(x.device)
    pictures = pictures.to(x.dtype) / 255 if pictures.dtype == torch.uint8 else pictures.to(x.dtype)
    if pictures.shape[1] > x.shape[1]:
        return luma(pictures)
    return pictures.expand(-1, x.shape[1], -1, -1)


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """NumPy has the Dirichlet and Beta draws that torch has not with a generator; one draw of the caller's seeds it."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def _index(rows: NDArray[np.int64], x: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(x.device)


def _like(values: NDArray[np.float64], x: Tensor) -> Tensor:
    return torch.from_numpy(values).to(x.device, x.dtype)

"""Augmentations: each operation and each mixing formula against a recomputation picture by picture."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from trivium.train.shifts import augment
from trivium.train.shifts.augment import OPERATIONS, apply_operations, augmix, fractals, pixmix, structural

SIZES = [(28, 28), (40, 56)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(n: int, size: tuple[int, int], seed: int = 0, channels: int = 3) -> Tensor:
    """Random smooth pictures of 8-bit values, float32 [n, channels, *size]."""
    coarse = torch.rand((n, channels, 5, 5), generator=seeded(seed))
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=False)
    return (fine * 255).round().clamp(0, 255) / 255


def to_pillow(x: Tensor) -> Image.Image:
    return Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())


def from_pillow(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture, np.float64).transpose(2, 0, 1) / 255


def bilinear_ref(x: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """One picture [C, H, W] resampled under a pixel map, black outside, pixel by pixel in float64."""
    _, height, width = x.shape
    out = np.zeros_like(x)
    for row in range(height):
        for column in range(width):
            u, v = matrix @ np.array([column + 0.5, row + 0.5, 1.0]) - 0.5
            left, top = int(np.floor(u)), int(np.floor(v))
            for j, i, weight in (
                (left, top, (1 - (u - left)) * (1 - (v - top))),
                (left + 1, top, (u - left) * (1 - (v - top))),
                (left, top + 1, (1 - (u - left)) * (v - top)),
                (left + 1, top + 1, (u - left) * (v - top)),
            ):
                if 0 <= j < width and 0 <= i < height:
                    out[:, row, column] += weight * x[:, i, j]
    return out


def operation_ref(x: NDArray[np.float64], name: str, level: float, sign: float) -> NDArray[np.float64]:
    """An AugMix operation on one picture [C, H, W]: geometry in float64, photometry by Pillow."""
    _, height, width = x.shape
    if name in augment.GEOMETRIC:
        amount = {
            "rotate": np.deg2rad(int(level * 30 / 10)),
            "shear_x": level * 0.3 / 10,
            "shear_y": level * 0.3 / 10,
            "translate_x": int(level * (width / 3) / 10),
            "translate_y": int(level * (height / 3) / 10),
        }[name] * sign
        matrix = {
            "shear_x": [[1, amount, 0], [0, 1, 0]],
            "shear_y": [[1, 0, 0], [amount, 1, 0]],
            "translate_x": [[1, 0, amount], [0, 1, 0]],
            "translate_y": [[1, 0, 0], [0, 1, amount]],
        }.get(name)
        if matrix is None:
            turn = np.array([[np.cos(amount), -np.sin(amount)], [np.sin(amount), np.cos(amount)]])
            centre = np.array([width / 2, height / 2])
            matrix = np.column_stack([turn, centre - turn @ centre]).tolist()
        return bilinear_ref(x, np.array(matrix, np.float64))
    picture = to_pillow(torch.from_numpy(x))
    done = {
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "posterize": lambda: ImageOps.posterize(picture, 4 - int(level * 4 / 10)),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(level * 256 / 10)),
    }[name]()
    return from_pillow(done)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_the_one_of_its_name(name: str, size: tuple[int, int]) -> None:
    x = smooth(4, size)
    level, sign = np.array([0.4, 2.9, 5.3, 9.7]), np.array([1.0, -1.0, 1.0, -1.0])
    out = apply_operations(x, np.full(4, OPERATIONS.index(name)), level, sign).double().numpy()
    # Pillow truncates autocontrast's table to whole levels; all others agree to float32.
    tolerance = 1.01 / 255 if name == "autocontrast" else 2e-4
    for i in range(4):
        expected = operation_ref(x[i].double().numpy(), name, level[i], sign[i])
        assert np.abs(out[i] - expected).max() < tolerance, (name, i)


@pytest.mark.parametrize("transform", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometry_turns_the_way_pillow_turns(transform: str) -> None:
    x = smooth(1, (40, 40))
    level, sign = np.array([4.0]), np.array([1.0])
    out = apply_operations(x, np.array([OPERATIONS.index(transform)]), level, sign)[0]
    matrix = {
        "shear_x": (1, 0.12, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.12, 1, 0),
        "translate_x": (1, 0, 5, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 5),
    }.get(transform)
    picture = to_pillow(x[0])
    bilinear = Image.Resampling.BILINEAR
    if matrix is None:
        expected = picture.rotate(12, bilinear)
    else:
        expected = picture.transform(picture.size, Image.Transform.AFFINE, matrix, bilinear)
    inner = np.s_[:, 12:28, 12:28]
    assert np.abs(out.numpy()[inner] - from_pillow(expected)[inner]).max() < 1.5 / 255


def test_constant_pictures_survive_photometry() -> None:
    x = torch.full((1, 3, 28, 28), 100 / 255)
    for name in ("autocontrast", "equalize"):
        assert apply_operations(x, np.array([OPERATIONS.index(name)]), np.ones(1), np.ones(1)).equal(x)


def test_minus_one_leaves_a_picture_alone() -> None:
    x = smooth(2, (28, 28))
    out = apply_operations(x, np.array([-1, OPERATIONS.index("solarize")]), np.full(2, 9.0), np.ones(2))
    assert out[0].equal(x[0])
    assert not out[1].equal(x[1])


def test_augmix_is_its_formula_on_each_picture() -> None:
    batch, width, alpha, severity = 6, 3, 1.0, 5.0
    x = smooth(batch, (28, 28)).double()
    out = augmix(x, seeded(3), severity, width, -1, alpha)
    # The same draws, in the documented order of the code; everything else recomputed picture by picture.
    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=seeded(3))))
    weights, m = draw.dirichlet([alpha] * width, batch), draw.beta(alpha, alpha, batch)
    depths = draw.integers(1, 4, width * batch)
    steps = []
    for _ in range(depths.max()):
        operation = draw.integers(0, len(OPERATIONS), width * batch)
        steps.append((operation, draw.uniform(0.1, severity, width * batch), draw.choice([-1.0, 1.0], width * batch)))
    for i in range(batch):
        total = np.zeros((3, 28, 28))
        for chain in range(width):
            row = chain * batch + i
            picture = x[i : i + 1]
            for step in range(depths[row]):
                operation, level, sign = steps[step]
                one = slice(row, row + 1)
                picture = apply_operations(picture, operation[one], level[one], sign[one])
            total += weights[i, chain] * picture[0].numpy()
        expected = (1 - m[i]) * x[i].numpy() + m[i] * total
        assert np.abs(out[i].numpy() - expected).max() < 1e-9
    assert set(depths) == {1, 2, 3}


def test_augmix_depth_and_width_are_obeyed() -> None:
    x = smooth(64, (28, 28))
    assert augmix(x, seeded(0), depth=0).allclose(x, atol=1e-6)
    single = augmix(x, seeded(0), width=1, depth=1)
    assert not single.allclose(x, atol=1e-3)


def test_mixing_is_the_published_formula() -> None:
    draw = np.random.default_rng(0)
    u, v = draw.random((50, 1, 4, 4)), draw.random((50, 1, 4, 4))
    v[:5] = 0
    add, (a, b) = draw.random(50) < 0.5, augment._mixing_weights(draw, 50, 3.0)
    assert ((b < 0) == (a > 1)).all()
    assert 0.3 < (b < 0).mean() < 0.7
    out = augment.mix(torch.from_numpy(u), torch.from_numpy(v), add, a, b).numpy()
    for i in range(50):
        if add[i]:
            expected = (a[i] * (u[i] * 2 - 1) + b[i] * (v[i] * 2 - 1) + 1) / 2
        else:
            expected = (u[i] * 2) ** a[i] * np.maximum(v[i] * 2, 1e-37) ** b[i] / 2
        assert np.abs(out[i] - expected.clip(0, 1)).max() < 1e-12


def test_pixmix_mixes_from_zero_to_k_times() -> None:
    x, mixing = smooth(200, (28, 28)), fractals(30, 28, 0)
    untouched = (pixmix(x, mixing, seeded(0)) == x).all(dim=3).all(dim=2).all(dim=1).float().mean()
    # No round (1/5) and no operation before it (1/2); a few operations are identities at low levels.
    assert 0.05 < untouched < 0.2
    unmixed = pixmix(x, mixing, seeded(0), k=0)
    assert 0.4 < (unmixed == x).all(dim=3).all(dim=2).all(dim=1).float().mean() < 0.7


def test_pixmix_takes_bytes_floats_and_refuses_another_size() -> None:
    x, mixing = smooth(8, (28, 28)), fractals(6, 28, 0)
    assert pixmix(x, mixing, seeded(1)).allclose(pixmix(x, mixing.float() / 255, seeded(1)), atol=1e-6)
    with pytest.raises(ValueError, match="mixing set"):
        pixmix(x, fractals(2, 32, 0), seeded(1))


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "augmix": augmix,
    "pixmix": lambda x, generator: pixmix(x, fractals(9, x.shape[-1], 0), generator),
    "structural": structural,
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [28, 224])
def test_augmentations_keep_range_and_type_and_follow_the_generator(name: str, size: int) -> None:
    x = smooth(16 if size == 28 else 4, (size, size))
    before = x.clone()
    out = AUGMENTATIONS[name](x, seeded(5))
    assert x.equal(before)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.isfinite().all()
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    assert out.equal(AUGMENTATIONS[name](x, seeded(5)))
    assert not out.equal(AUGMENTATIONS[name](x, seeded(6)))


@pytest.mark.parametrize("name", ["augmix", "structural"])
def test_equal_pictures_get_parameters_of_their_own(name: str) -> None:
    x = smooth(1, (28, 28)).expand(12, -1, -1, -1).contiguous()
    out = AUGMENTATIONS[name](x, seeded(0))
    assert len({picture.numpy().tobytes() for picture in out}) >= 8


def test_one_channel_stands_for_three_equal_ones() -> None:
    x = smooth(32, (28, 28), channels=1)
    three = x.expand(-1, 3, -1, -1).contiguous()
    assert augmix(x, seeded(0)).expand(-1, 3, -1, -1).allclose(augmix(three, seeded(0)), atol=1e-5)
    grey = fractals(6, 28, 0).float().mean(1, keepdim=True) / 255
    wide = grey.expand(-1, 3, -1, -1)
    assert pixmix(x, grey, seeded(0)).expand(-1, 3, -1, -1).allclose(pixmix(three, wide, seeded(0)), atol=1e-5)


def test_edges_lie_where_the_picture_steps() -> None:
    x = torch.zeros(1, 3, 28, 28)
    x[:, :, :, 14:] = 1
    edges = augment.edges(x)[0, 0]
    assert (edges[:, 13:15] == 1).all()
    assert edges[:, :13].max() == edges[:, 15:].max() == 0


def test_the_background_is_what_has_the_colour_of_the_border() -> None:
    x = torch.ones(2, 3, 28, 28)
    x[:, :, 8:20, 8:20] = torch.tensor([0.8, 0.1, 0.2])[:, None, None]
    colours = torch.tensor([[[0.0, 0, 1], [0, 1, 0]]]).expand(2, -1, -1)
    out = augment.replace_background(x, colours)
    assert out[:, :, 8:20, 8:20].equal(x[:, :, 8:20, 8:20])
    assert out[0, :, 0, 0].tolist() == [0, 0, 1]
    assert out[0, :, -1, -1].tolist() == [0, 1, 0]


def test_structural_views_are_of_six_kinds() -> None:
    x = smooth(120, (28, 28))
    out = structural(x, seeded(0))
    binary = ((out == 0) | (out == 1)).all(dim=3).all(dim=2).all(dim=1).float().mean()
    inverted = (out - (1 - x)).abs().amax((1, 2, 3)) < 1e-6
    grey = (out - augment.luma(x)).abs().amax((1, 2, 3)) < 1e-6
    for share in (binary, inverted.float().mean(), grey.float().mean()):
        assert 0.08 < share < 0.4


@pytest.mark.parametrize("size", [28, 96])
def test_fractals_are_many_and_follow_their_seed(size: int) -> None:
    pictures = fractals(12, size, 4)
    assert pictures.shape == (12, 3, size, size)
    assert pictures.dtype == torch.uint8
    assert pictures.equal(fractals(12, size, 4))
    assert not pictures.equal(fractals(12, size, 5))
    # Rich enough to mix in: nearly all of them vary.
    assert (pictures.float().std(dim=(1, 2, 3)) > 20).float().mean() > 0.9
    assert fractals(0, size, 0).shape == (0, 3, size, size)

"""Corruptions: every name at every size, damage that grows with severity, formulas against other implementations."""

import colorsys
import itertools
from io import BytesIO
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trivium.train.shifts.corruptions import CALIBRATION_CORRUPTIONS, TEST_CORRUPTIONS, corrupt
from trivium.train.shifts.filters import disc, gaussian, plasma, sample, shuffle, zoom
from trivium.train.shifts.strengths import SEVERITIES, STRENGTHS, strengths

ALL = TEST_CORRUPTIONS + CALIBRATION_CORRUPTIONS
Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def photographs() -> dict[str, Bytes]:
    """Real pictures: crops of scikit-learn's two photographs at 28 (grey and colour), 64 and 224 pixels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    crops = []
    for name in ("china.jpg", "flower.jpg"):
        picture = Image.fromarray(datasets.load_sample_image(name))
        crops += [picture.crop((x, y, x + 400, y + 400)) for x, y in ((0, 0), (120, 20), (240, 10))]
    sized = {
        str(side): np.stack([np.asarray(c.resize((side, side), Image.Resampling.LANCZOS)) for c in crops])
        for side in (28, 64, 224)
    }
    grey = np.stack([np.asarray(c.resize((28, 28), Image.Resampling.LANCZOS).convert("L")) for c in crops])
    return sized | {"28 grey": np.repeat(grey[..., None], 3, 3)}


def noise(count: int, height: int, width: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def unit(images: Bytes) -> NDArray[np.float64]:
    return images.astype(np.float64) / 255


def psnr(clean: Bytes, damaged: Bytes) -> float:
    """Mean peak signal-to-noise ratio in dB; 90 where nothing changed."""
    error = ((clean.astype(np.float64) - damaged) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-9))).mean())


def fidelity(clean: Bytes, damaged: Bytes) -> float:
    """Signal to noise in dB after the gain and offset that fit each damaged picture best."""
    pairs = zip(clean.reshape(len(clean), -1), damaged.reshape(len(clean), -1), strict=True)
    unexplained = [1 - np.corrcoef(before, after)[0, 1] ** 2 for before, after in pairs]
    return float(-10 * np.log10(np.mean(unexplained)))


def test_the_benchmark_has_fifteen_and_four() -> None:
    assert len(set(TEST_CORRUPTIONS)) == 15
    assert len(set(CALIBRATION_CORRUPTIONS)) == 4
    assert not set(TEST_CORRUPTIONS) & set(CALIBRATION_CORRUPTIONS)
    assert set(ALL) == set(STRENGTHS)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", ["28", "28 grey", "64", "224"])
def test_damage_grows_with_severity(photographs: dict[str, Bytes], name: str, size: str) -> None:
    clean = photographs[size]
    # Frost and fog hide a picture under grey: they are measured against its best copy in brightness and contrast.
    measure = fidelity if name in ("frost", "fog") else psnr
    levels = [measure(clean, corrupt(clean, name, severity, 0)) for severity in SEVERITIES]
    # A quarter of a dB of leave: fog at 224 is published with a fourth severity that hides no more than the third.
    assert all(later <= sooner + 0.25 for sooner, later in itertools.pairwise(levels)), levels
    assert levels[4] < levels[0] - 0.3, levels
    assert levels[4] < 35


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(28, 28), (33, 47), (8, 8)])
def test_a_picture_is_corrupted_alike_alone_and_in_a_batch(name: str, shape: tuple[int, int]) -> None:
    images = noise(5, *shape)
    images[1] = images[1][..., :1]
    whole = corrupt(images, name, 3, seed=7)
    assert whole.shape == images.shape
    assert whole.dtype == np.uint8
    for i in (0, 1, 4):
        assert (corrupt(images[i : i + 1], name, 3, seed=7, first=i)[0] == whole[i]).all()


@pytest.mark.parametrize("name", ALL)
def test_grey_stays_grey(name: str) -> None:
    images = np.repeat(noise(3, 28, 28)[..., :1], 3, 3)
    out = corrupt(images, name, 5, 0)
    assert (out == out[..., :1]).all() == (name != "saturate")


RANDOM = [name for name in ALL if name not in (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate"
)]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_draws_follow_seed_and_index(name: str) -> None:
    images = np.repeat(noise(1, 32, 32), 2, 0)
    out = corrupt(images, name, 4, 1)
    assert (out == corrupt(images, name, 4, 1)).all()
    assert (out[0] != out[1]).any() == (name in RANDOM)
    assert (out != corrupt(images, name, 4, 2)).any() == (name in RANDOM)


def test_strengths_are_the_published_ones_at_both_ends() -> None:
    assert [strengths("gaussian_noise", s, 224)[0] for s in SEVERITIES] == pytest.approx([0.08, 0.12, 0.18, 0.26, 0.38])
    assert [strengths("gaussian_noise", s, 32)[0] for s in SEVERITIES] == pytest.approx([0.04, 0.06, 0.08, 0.09, 0.10])
    assert [1 / strengths("shot_noise", s, 224)[0] for s in SEVERITIES] == pytest.approx([60, 25, 12, 5, 3])
    assert [strengths("jpeg_compression", s, 28)[0] for s in SEVERITIES] == [80, 65, 58, 50, 40]
    assert strengths("defocus_blur", 5, 224) == pytest.approx((10, 0.5))


def test_strengths_between_and_beyond() -> None:
    assert strengths("contrast", 1, 128)[0] == pytest.approx((0.75 + 0.4) / 2)
    assert strengths("defocus_blur", 5, 448) == pytest.approx((20, 0.5))
    assert strengths("gaussian_noise", 5, 448) == strengths("gaussian_noise", 5, 224)
    assert strengths("motion_blur", 2, 28) == strengths("motion_blur", 2, 32)


def test_noise_has_the_strength_it_names() -> None:
    images = np.full((4, 224, 224, 3), 128, np.uint8)
    images[..., 0] = 127  # colour, so that the channels are drawn apart
    grey = unit(images)
    assert np.std(unit(corrupt(images, "gaussian_noise", 1, 0)) - grey) == pytest.approx(0.08, rel=0.02)
    assert np.std(unit(corrupt(images, "speckle_noise", 1, 0)) - grey) == pytest.approx(0.15 * 0.5, rel=0.02)
    assert np.std(unit(corrupt(images, "shot_noise", 1, 0)) - grey) == pytest.approx((0.5 / 60) ** 0.5, rel=0.02)
    struck = corrupt(images, "impulse_noise", 5, 0)
    assert (struck == 0).mean() == pytest.approx(0.135, rel=0.03)
    assert (struck == 255).mean() == pytest.approx(0.135, rel=0.03)


def test_contrast_and_brightness_are_their_formulas() -> None:
    images = noise(2, 32, 32)
    x = unit(images)
    mean = x.mean((1, 2), keepdims=True)
    assert np.abs(unit(corrupt(images, "contrast", 3, 0)) - ((x - mean) * 0.4 + mean)).max() < 0.51 / 255
    out = unit(corrupt(images, "brightness", 5, 0))[0, :8, :8].reshape(-1, 3)
    for before, after in zip(x[0, :8, :8].reshape(-1, 3), out, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
        assert after == pytest.approx(expected, abs=0.51 / 255)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_saturate_is_its_formula(severity: int) -> None:
    images = noise(1, 8, 8)
    images[0, 0, 0] = 90
    factor, summand, tint = strengths("saturate", severity, 8)
    out = unit(corrupt(images, "saturate", severity, 0)).reshape(-1, 3)
    for before, after in zip(unit(images).reshape(-1, 3), out, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, min(saturation * factor + summand, 1), value)
        assert after == pytest.approx(expected, abs=0.52 / 255)
    grey = np.full((1, 8, 8, 3), 200, np.uint8)
    assert corrupt(grey, "saturate", severity, 0)[0, 0, 0] == pytest.approx(
        [200, 200 * (1 - tint), 200 * (1 - tint)], abs=1
    )


def test_jpeg_and_pixelate_are_pillow() -> None:
    images = noise(1, 224, 224)
    file = BytesIO()
    Image.fromarray(images[0]).save(file, "JPEG", quality=7)
    assert (corrupt(images, "jpeg_compression", 5, 0)[0] == np.asarray(Image.open(file))).all()
    box = Image.Resampling.BOX
    small = Image.fromarray(images[0]).resize((56, 56), box).resize((224, 224), box)
    assert (corrupt(images, "pixelate", 5, 0)[0] == np.asarray(small)).all()


def test_gaussian_blur_is_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    x = unit(noise(2, 40, 31)).astype(np.float32)
    cases: list[tuple[float, Literal["edge", "symmetric"], str]]
    cases = [(0.6, "edge", "nearest"), (3.0, "edge", "nearest"), (2.4, "symmetric", "reflect")]
    for sigma, pad, mode in cases:
        expected = ndimage.gaussian_filter(x.astype(np.float64), (0, sigma, sigma, 0), mode=mode)
        assert np.abs(gaussian(x, sigma, pad) - expected).max() < 1e-5


def test_samples_and_zoom_are_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    x = unit(noise(2, 20, 30)).astype(np.float32)
    draw = np.random.default_rng(1)
    rows = draw.uniform(-5, 25, (2, 20, 30)).astype(np.float32)
    columns = draw.uniform(-5, 35, (2, 20, 30)).astype(np.float32)
    out = sample(x, rows, columns)
    for i in range(2):
        expected = ndimage.map_coordinates(
            x[i, ..., 1].astype(np.float64), [rows[i], columns[i]], order=1, mode="mirror"
        )
        assert np.abs(out[i, ..., 1] - expected).max() < 1e-4
    y, x_ = np.mgrid[:20, :30].astype(np.float32)
    about = [(y - 9.5) / 1.3 + 9.5, (x_ - 14.5) / 1.3 + 14.5]
    expected = ndimage.map_coordinates(x[0, ..., 0].astype(np.float64), about, order=1)
    assert np.abs(zoom(x, 1.3)[0, ..., 0] - expected).max() < 1e-4
    assert np.abs(zoom(x, 1.0) - x).max() < 1e-6


def test_shuffling_moves_pixels_and_loses_none() -> None:
    x = np.arange(2 * 30 * 25, dtype=np.float32).reshape(2, 30, 25, 1)
    offsets = np.random.default_rng(0).integers(-2, 2, (2, 30, 25, 2), np.int8)
    out = shuffle(x, 2, offsets)
    assert (np.sort(out.ravel()) == x.ravel()).all()
    assert (out[0] < 750).all()
    assert (out != x).mean() > 0.7


def test_kernels_and_textures_are_normalised() -> None:
    for radius, alias in ((0.3, 0.4), (1.0, 0.2), (3, 0.1), (10, 0.5)):
        kernel = disc(radius, alias)
        assert kernel.sum() == pytest.approx(1)
        assert kernel == pytest.approx(kernel.T)
        assert kernel.shape[0] % 2 == 1
    clouds = plasma(np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)).astype(np.float32), 2.0)
    assert (clouds.min((1, 2)) == 0).all()
    assert clouds.max((1, 2)) == pytest.approx([1, 1, 1])


def test_blurs_leave_a_constant_picture_alone() -> None:
    images = np.full((2, 28, 28, 3), 117, np.uint8)
    images[1] = (10, 200, 50)
    blurs = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "pixelate", "elastic_transform")
    for name in blurs:
        assert np.abs(corrupt(images, name, 5, 0).astype(int) - images).max() <= 1, name


def test_extremes_and_an_empty_stack_pass() -> None:
    black, white = np.zeros((1, 28, 28, 3), np.uint8), np.full((1, 28, 28, 3), 255, np.uint8)
    with np.errstate(all="raise", under="ignore"):
        for name in ALL:
            for images in (black, white, np.zeros((0, 28, 28, 3), np.uint8)):
                assert corrupt(images, name, 5, 0).shape == images.shape


@pytest.mark.parametrize(
    ("images", "name", "severity", "seed"),
    [
        (noise(1, 8, 8), "rain", 1, 0),
        (noise(1, 8, 8), "fog", 0, 0),
        (noise(1, 8, 8), "fog", 6, 0),
        (noise(1, 8, 8), "fog", 1, -1),
        (noise(1, 8, 8)[0], "fog", 1, 0),
        (noise(1, 8, 8)[..., :1], "fog", 1, 0),
        (unit(noise(1, 8, 8)), "fog", 1, 0),
    ],
)
def test_wrong_arguments_are_refused(images: Bytes, name: str, severity: int, seed: int) -> None:
    with pytest.raises(ValueError, match=r"unknown|severity|negative|uint8"):
        corrupt(images, name, severity, seed)

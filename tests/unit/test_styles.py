"""Style shifts: what each keeps and drops, and that a picture's style depends on nothing beside it."""

import numpy as np
import pytest

from trivium.train.shifts.augment import edges
from trivium.train.shifts.styles import CONTRAST, CYCLES, STYLES, restyle, seen_styles


@pytest.fixture(scope="module")
def disc() -> np.ndarray:
    """A bright disc with a gradient on a dark ground, once grey and once in colour; uint8 [2, 32, 32, 3]."""
    rows, columns = np.mgrid[:32, :32]
    inside = (rows - 16) ** 2 + (columns - 16) ** 2 < 81
    grey = np.where(inside, 150 + 3 * rows, 20)
    colour = np.stack([np.where(inside, 220, 10), np.where(inside, 180, 40), np.where(inside, 60, 90)], 2)
    return np.stack([np.repeat(grey[:, :, None], 3, 2), colour]).astype(np.uint8)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_belongs_to_its_picture(name: str, some_pictures: np.ndarray) -> None:
    whole = restyle(some_pictures, name, 3)
    assert whole.shape == some_pictures.shape
    assert whole.dtype == np.uint8
    assert not np.array_equal(whole, some_pictures)
    for start, stop in ((0, 1), (1, 6), (6, 12)):
        assert np.array_equal(restyle(some_pictures[start:stop], name, 3, start), whole[start:stop])


@pytest.mark.parametrize("name", STYLES)
def test_grey_stays_grey_and_odd_shapes_pass(name: str, disc: np.ndarray) -> None:
    styled = restyle(disc[:1], name, 0)
    assert (styled == styled[..., :1]).all()
    assert restyle(disc[:, :17, :30], name, 0).shape == (2, 17, 30, 3)
    # a picture of one colour has no edges, patches or waves to work on
    flat = np.full((1, 28, 28, 3), 77, np.uint8)
    assert restyle(flat, name, 0).shape == flat.shape


def test_a_sketch_has_lines_where_the_outline_is_and_paper_elsewhere(disc: np.ndarray) -> None:
    sketch = restyle(disc, "sketch", 0)[..., 0].astype(int)
    assert (sketch[:, 13:19, 13:19] > 200).all()
    assert (sketch[:, :3] > 200).all()
    row = sketch[0, 16]
    assert row[5:10].min() < 100
    assert row[23:28].min() < 100


def test_a_sketch_is_none_of_the_training_views(disc: np.ndarray) -> None:
    import torch

    x = torch.from_numpy(disc).permute(0, 3, 1, 2).float() / 255
    seen = edges(x).permute(0, 2, 3, 1).numpy()
    sketch = restyle(disc, "sketch", 0) / 255
    for view in (seen, 1 - seen):
        assert np.abs(sketch - view).mean() > 0.05


def test_inversion_is_its_own_inverse(some_pictures: np.ndarray) -> None:
    assert np.array_equal(restyle(restyle(some_pictures, "inversion", 0), "inversion", 1), some_pictures)


def test_texture_keeps_the_patches_and_drops_what_is_in_them(disc: np.ndarray) -> None:
    textured = restyle(disc, "texture", 0).astype(float)
    inside = disc[0, :, :, 0] > 100
    for styled, picture in zip(textured, disc.astype(float), strict=True):
        core = np.s_[12:20, 12:20]
        assert abs(styled[core].mean() - picture[inside].mean()) < 255 * CONTRAST
        # the disc's own gradient is gone: what is left about the mean is the pattern
        assert styled[inside].std() > 5
    assert not np.array_equal(restyle(disc, "texture", 1), restyle(disc, "texture", 2))


def test_low_pass_keeps_slow_waves_and_drops_fast_ones() -> None:
    place = (np.arange(64) + 0.5) / 64

    def picture(waves: float) -> np.ndarray:
        values = 127.5 + 100 * np.cos(2 * np.pi * waves * place)
        return np.broadcast_to(values[None, None, :, None], (1, 64, 64, 3)).round().astype(np.uint8)

    slow, fast = picture(CYCLES - 2), picture(CYCLES + 2)
    assert np.abs(restyle(slow, "low_pass", 0).astype(int) - slow.astype(int)).max() <= 2
    assert np.abs(restyle(fast, "low_pass", 0).astype(int) - 127).max() <= 2


def test_wrong_calls_are_refused(disc: np.ndarray) -> None:
    with pytest.raises(ValueError, match="unknown style 'cubism'; there are sketch"):
        restyle(disc, "cubism", 0)
    with pytest.raises(ValueError, match="uint8"):
        restyle(disc.astype(np.float32), "sketch", 0)


def test_seen_styles_are_found_wherever_a_recipe_draws_structural_views() -> None:
    assert seen_styles({"shifts": {"augmix": 0.5, "structural": 0.0}, "seed": 1}) == []
    assert seen_styles({"shifts": {"structural": 0.0}, "teacher": {"shifts": {"structural": 0.3}}}) == [
        "sketch",
        "inversion",
    ]
    assert seen_styles(None) == []

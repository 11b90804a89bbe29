"""How strong each corruption is at each severity and size: the numbers published for 32 and for 224 pixels.

Source: Hendrycks and Dietterich (2019), the programs that made CIFAR-10-C and ImageNet-C. Where those do not damage
more with each severity they were graded anew: glass_blur at 32, elastic_transform (the affine part held small),
saturate (order, and more of it at 32), and spatter, whose water is lit in another way here.
"""

from __future__ import annotations

SEVERITIES = (1, 2, 3, 4, 5)
Rows = tuple[tuple[float, ...], ...]
SMALL, LARGE = 32, 224
"""The sides in pixels for which strengths were published."""
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
    # factor and summand of the saturation; what a wholly grey picture gets instead, having nothing to scale
    "saturate": (
        ((1.5, 0, 0.04), (0.3, 0, 0.06), (0.1, 0, 0.08), (2.5, 0.1, 0.1), (3, 0.2, 0.2)),
        ((2, 0, 0.04), (0.3, 0, 0.06), (0.1, 0, 0.08), (5, 0.1, 0.1), (20, 0.2, 0.2)),
    ),
}
LENGTHS = {
    "defocus_blur": (0,), "glass_blur": (0, 1), "motion_blur": (0, 1), "snow": (4, 5), "elastic_transform": (0, 1, 2),
    "gaussian_blur": (0,), "spatter": (2,),
}  # fmt: skip
"""Which strengths are lengths in pixels."""


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

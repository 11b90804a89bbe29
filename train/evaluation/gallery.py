"""Sample pictures for the report: some test pictures under corruptions, or the same things in other styles, with what
each head said of them."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trivium.runtime.router import route, symmetric_divergence

from ..data.pictures import Pictures
from ..shifts.corruptions import corrupt
from .subject import Subject
from .tally import labels_for

KINDS = (
    ("clean", 0),
    ("gaussian_noise", 3),
    ("defocus_blur", 3),
    ("fog", 3),
    ("contrast", 4),
    ("elastic_transform", 3),
)
"""Columns of the gallery: one corruption of each family of ImageNet-C, and contrast, the hardest on grey pictures."""
LARGEST = 128
"""Pixels of a sample's longer side; smaller pictures stay as they are."""


@dataclass(frozen=True)
class Said:
    """One head's answer."""

    head: str
    label: str
    probability: float
    right: bool
    entropy: float
    """Predictive entropy in nats."""
    information: float
    """Mutual information in nats."""


@dataclass(frozen=True)
class Sample:
    """One view of one picture."""

    picture: str
    """data: URI."""
    kind: str
    severity: int
    truth: str
    answer: Said
    """The default router's; its head is who answered, its uncertainty that head's, or the heads' mean."""
    heads: list[Said]
    divergence: float | None
    """Symmetrised KL of clean and robust in nats."""


@dataclass(frozen=True)
class Style:
    """One style of the album."""

    name: str
    part: str
    """test, or the shift set that the style's pictures are from."""
    samples: list[Sample | None]
    """Of each of the album's things; None where the style has none."""


@dataclass(frozen=True)
class Album:
    """The same things in several styles."""

    things: list[str]
    styles: list[Style]


def gallery(
    subject: Subject, pictures: Pictures, chosen: Sequence[int] | NDArray[np.intp], *, rows: int = 6, seed: int = 0
) -> list[list[Sample]]:
    """Up to `rows` test pictures of different classes, drawn by seed among `chosen`, each under KINDS."""
    manifest = subject.manifest
    labels = labels_for(pictures, manifest.classes)
    order = np.random.Generator(np.random.Philox(seed)).permutation(np.asarray(chosen))
    _, first = np.unique(labels[order], return_index=True)
    picked = order[np.sort(first)[:rows]]
    images = pictures.batch(picked).permute(0, 2, 3, 1).contiguous().numpy()
    columns = [
        samples(
            subject, images if severity == 0 else corrupt(images, kind, severity, seed), labels[picked], kind, severity
        )
        for kind, severity in KINDS
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def album(
    subject: Subject, pictures: Pictures, sets: Mapping[str, Pictures], *, things: int = 6, seed: int = 0
) -> Album | None:
    """Up to `things` things of different classes, each in every style of the test pictures and of the shift sets; None
    where the sets show none of the test's things.

    A picture's file says what it shows: CLASS/THING.STYLE.SUFFIX. Things that most styles show come first; among them
    the seed decides.
    """
    parts = {"test": pictures, **sets}
    drawn: dict[tuple[str, str], dict[tuple[str, str], int]] = defaultdict(dict)
    for part, each in parts.items():
        for index, file in enumerate(each.files or ()):
            thing, _, style = file.stem.rpartition(".")
            if thing:
                drawn[file.parent.name, thing][part, style] = index
    known = sorted(key for key, views in drawn.items() if {"test"} < {part for part, _ in views})
    if not known:
        return None
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(known))
    first: dict[str, tuple[str, str]] = {}
    for key in sorted((known[i] for i in order), key=lambda key: -len(drawn[key])):
        first.setdefault(key[0], key)
    picked = [drawn[key] for key in list(first.values())[:things]]
    names = [thing.rpartition(".")[2] for _, thing in list(first.values())[:things]]
    tests = [next(index for (part, _), index in views.items() if part == "test") for views in picked]
    labels = labels_for(pictures, subject.manifest.classes)[tests]
    styles = []
    for part, style in sorted({view for views in picked for view in views}, key=lambda v: (list(parts).index(v[0]), v)):
        having = np.array([i for i, views in enumerate(picked) if (part, style) in views])
        images = parts[part].batch([picked[i][part, style] for i in having]).permute(0, 2, 3, 1).contiguous().numpy()
        said = dict(zip(having.tolist(), samples(subject, images, labels[having], style, 0), strict=True))
        styles.append(Style(style, part, [said.get(i) for i in range(len(picked))]))
    return Album(names, styles)


def samples(
    subject: Subject, images: NDArray[np.uint8], labels: NDArray[np.int64], kind: str, severity: int
) -> list[Sample]:
    """What a model says of some views, uint8 [N, H, W, 3]."""
    manifest = subject.manifest
    statistics, _ = subject.answer(images)
    routed = route(statistics, manifest)
    divergence = None
    if {"clean", "robust"} <= set(manifest.heads):
        divergence = symmetric_divergence(statistics, manifest.heads.index("clean"), manifest.heads.index("robust"))
    found = []
    for i, label in enumerate(labels.tolist()):

        def said(head: str, probabilities: NDArray[np.floating], entropy: float, information: float) -> Said:
            best = int(probabilities.argmax())
            right = best == label  # noqa: B023  used within this turn of the loop
            return Said(head, manifest.classes[best], float(probabilities[best]), right, entropy, information)

        heads = [
            said(
                head,
                statistics.probabilities[i, k],
                float(statistics.predictive_entropy[i, k]),
                float(statistics.mutual_information[i, k]),
            )
            for k, head in enumerate(manifest.heads)
        ]
        parts = [each for each in heads if each.head in routed.head[i].split("+")] or heads
        answer = said(
            routed.head[i],
            routed.probabilities[i],
            float(np.mean([each.entropy for each in parts])),
            float(np.mean([each.information for each in parts])),
        )
        distance = None if divergence is None else float(divergence[i])
        found.append(Sample(data_uri(images[i]), kind, severity, manifest.classes[label], answer, heads, distance))
    return found


def data_uri(image: NDArray[np.uint8]) -> str:
    """A picture uint8 [H, W, 3] inside a page: PNG where it is small, else JPEG, scaled down to LARGEST."""
    picture = Image.fromarray(image)
    small = max(picture.size) <= LARGEST // 2
    picture.thumbnail((LARGEST, LARGEST))
    buffer = BytesIO()
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"

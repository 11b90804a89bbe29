"""Fixtures of several unit tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trivium.runtime.predictor import Predictor


@pytest.fixture(scope="session")
def labelled(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of class folders with 240 pictures, on nine in ten of which the tiny bundle's clean head is right."""
    predictor = Predictor.load(tiny_bundle)
    classes = predictor.manifest.classes
    draw = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("labelled") / "folder"
    for number in range(240):
        blocks = draw.integers(0, 256, (4, 4, 3)).repeat(9, axis=0).repeat(9, axis=1)
        picture = Image.fromarray((blocks + draw.integers(-12, 13, blocks.shape)).clip(0, 255).astype(np.uint8))
        (root / "drafts").mkdir(parents=True, exist_ok=True)
        path = root / "drafts" / f"{number:03}.png"
        picture.save(path)
        answer = predictor.infer(predictor.decode(path.read_bytes()), "clean").class_id
        own = answer if draw.random() < 0.9 else (answer + 1) % len(classes)
        (root / classes[own]).mkdir(exist_ok=True)
        path.rename(root / classes[own] / path.name)
    (root / "drafts").rmdir()
    return root

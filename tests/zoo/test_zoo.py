"""Does each family come through the export, or stop for the reason that is known; and is the page of this list?"""

from __future__ import annotations

import re

import pytest

from .architectures import ARCHITECTURES, Architecture
from .trial import DECIDING, ROOT, outcome

PAGE = ROOT / "export" / "ZOO.md"
NAMED = {"ResNet", "ConvNeXt", "EfficientNet", "ViT", "DeiT", "Swin", "MobileNetV4", "RegNet", "MLP-Mixer"}
"""Families that must not fail."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_architecture(architecture: Architecture) -> None:
    found = outcome(architecture)
    assert found is not None
    if architecture.refusal:
        assert found.reason.startswith(architecture.refusal)
        return
    assert found.reason == ""
    assert found.difference is not None
    assert max(found.difference.values()) < 1e-2


def test_the_page_says_what_the_list_says() -> None:
    good, _, bad = PAGE.read_text(encoding="utf-8").partition("These do not pass")
    passing, failing = (re.findall(r"^\| ([^|]+) \| `([^`]+)`", part, re.MULTILINE) for part in (good, bad))
    assert passing == [(a.family, a.name) for a in ARCHITECTURES if not a.refusal]
    assert failing == [(a.family, a.name) for a in ARCHITECTURES if a.refusal]


def test_what_outcomes_depend_on_is_there() -> None:
    assert [name for name in DECIDING if not (ROOT / name).is_file()] == []


def test_enough_families_pass() -> None:
    families = {a.family for a in ARCHITECTURES if not a.refusal}
    assert len(families) >= 25
    assert families >= NAMED

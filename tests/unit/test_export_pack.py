"""Writing bundles: all or nothing, nothing replaced unasked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trivium.export import parity
from trivium.export.labels import read_labels
from trivium.export.pack import golden_pictures
from trivium.export.parity import Difference, ParityError, check, differences, tolerances
from trivium.export.source import without_directories
from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import MANIFEST, Preprocessing
from trivium.runtime.errors import ConfigError
from trivium.runtime.staging import staging

PREPROCESSING = Preprocessing(height=20, width=30, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def test_what_was_staged_takes_the_place(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    for content in ("first", "second"):
        with staging(target, force=content == "second") as root:
            (root / MANIFEST).write_text(content)
            assert not (target / MANIFEST).exists() or (target / MANIFEST).read_text() == "first"
        assert (target / MANIFEST).read_text() == content
        assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_a_failure_leaves_nothing_new_and_nothing_broken(tmp_path: Path) -> None:
    def fail(target: Path, force: bool) -> None:
        with staging(target, force) as root:
            (root / MANIFEST).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "bundle", False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "bundle", True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / MANIFEST).read_text() == "old"


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    bundle, home, link = tmp_path / "bundle", tmp_path / "home", tmp_path / "link"
    for directory, name in ((bundle, MANIFEST), (home, "letters.txt")):
        directory.mkdir()
        (directory / name).write_text("precious")
    link.symlink_to(bundle)
    for target, force, reason in (
        (bundle, False, "--force"),
        (home, True, "is no bundle"),
        (link, True, "is no bundle"),
        (home / "letters.txt", True, "is no bundle"),
        (home / "letters.txt" / "bundle", False, "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=reason), staging(target, force):
            pytest.fail("the block must not run")
    assert (home / "letters.txt").read_text() == (bundle / MANIFEST).read_text() == "precious"


def test_golden_pictures_are_drawn_the_same_everywhere() -> None:
    pictures = golden_pictures(PREPROCESSING, 3)
    assert pictures.shape == (4, 20, 30, 3)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, golden_pictures(PREPROCESSING, 3))
    assert (pictures != golden_pictures(PREPROCESSING, 4)).mean() > 0.5
    assert all(picture.std() > 10 for picture in pictures)


def statistics(shift: float = 0.0) -> HeadStatistics:
    shapes = ((2, 3, 10), (2, 3), (2, 3), (2, 3, 3), (2, 3))
    return HeadStatistics(*(np.full(shape, 0.1) for shape in shapes))._replace(energy=np.full((2, 3), -10 + shift))


def test_parity_refuses_the_worst_row_and_nan() -> None:
    limits = parity.REFERENCE_LIMITS
    rows = differences("a - b", statistics(0.02), statistics(), limits)
    assert [row.value for row in rows[:4]] == [0, 0, 0, 0]
    assert rows[4].value == pytest.approx(0.002)
    assert tolerances(rows)["a - b: energy"] == 0.002
    with pytest.raises(ParityError, match=r"a - b: energy differs by 0.002, more than 0.0001"):
        check(rows)
    check(differences("a - b", statistics(1e-5), statistics(), limits))
    with pytest.raises(ParityError, match="nan"):
        check([Difference("a - b", "energy", float("nan"), 1.0)])


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("shirt\n coat \nbag\n", encoding="utf-8")
    (tmp_path / "names.json").write_text('["shirt", "coat", "bag"]')
    assert read_labels(tmp_path / "names.txt") == read_labels(tmp_path / "names.json") == ["shirt", "coat", "bag"]
    (tmp_path / "hole.txt").write_text("shirt\n\nbag")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "object.json").write_text("{}")
    for name, reason in (
        ("hole.txt", "a name is empty"),
        ("empty.txt", "empty"),
        ("bytes.txt", "no UTF-8"),
        ("broken.json", "no valid JSON"),
        ("object.json", "not a JSON list"),
        ("absent.txt", "No such file"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            read_labels(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_bundle_tells_nobodys_directories() -> None:
    found = without_directories({"root": "/home/someone/data/birds", "list": ["/etc/x", "a/b", 3, None]})
    assert found == {"root": "birds", "list": ["x", "a/b", 3, None]}

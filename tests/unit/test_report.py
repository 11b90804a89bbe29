"""The report: whole in itself, true to the results, safe against names, and quiet in a real browser."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.browser import CHROMIUM, WHY_NOT, overflow

from trivium.runtime.bundle import Calibration
from trivium.train.data.pictures import DataSpec, load_pictures
from trivium.train.data.shift_sets import beside, open_shift
from trivium.train.evaluation.evaluate import evaluate
from trivium.train.evaluation.gallery import LARGEST, Album, album, data_uri, gallery
from trivium.train.evaluation.report import heat, percent, render, signed, styles, write_report
from trivium.train.evaluation.results import Results
from trivium.train.evaluation.subject import BundleSubject

NASTY = '<script>alert(1)</script> & "co"'


class Page(HTMLParser):
    """Collects tags, references and text, and sees that tags nest."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, some_pictures: np.ndarray):  # type: ignore[no-untyped-def]
    """(results, samples) of a tiny bundle on files, with a calibration and costs on record."""
    root = tmp_path_factory.mktemp("data")
    for i in range(10):
        for split in ("train", "val", "test"):
            target = root / split / f"class {i}"
            target.mkdir(parents=True)
            Image.fromarray(np.roll(some_pictures[i], i, 0)).save(target / "0.png")
    subject = BundleSubject(str(tiny_bundle))
    pictures = load_pictures(DataSpec(kind="imagefolder", root=root), "test", subject.manifest.preprocessing)
    outside = {"digits": load_pictures(DataSpec(kind="digits", limit=20), "test", subject.manifest.preprocessing)}
    results, _ = evaluate(subject, pictures, original=subject, styles=True, outside=outside)
    row = {"router": "combined", "accuracy": 0.8, "accuracy_clean": 0.9, "accuracy_shifted": 0.7, "difference": 0.0,
           "difference_low": 0.0, "difference_high": 0.0, "may_lose_on": ""}  # fmt: skip
    record = Calibration(
        temperature={"clean": 1.25}, mixture={"clean": 0.5, "speckle_noise": 0.5}, pictures=300, data=NASTY, seed=0,
        routers=[row, {"router": "of another release"}], chosen_because="it was best",
    )  # fmt: skip
    costs = {"student": {"cpu_seconds": 1234.5, "wall_seconds": 700.0}}
    results = results.model_copy(update={"calibration": record, "costs": costs})
    return results, gallery(subject, pictures, range(len(pictures)), rows=3)


@pytest.fixture(scope="module")
def same_things(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, some_pictures: np.ndarray) -> Album:
    """Eight things of the test, class 0's two in one style more than the others'; two sets, one of them without half
    of the things."""
    root = tmp_path_factory.mktemp("renditions")

    def write(place: str, shade: int) -> None:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), (shade, 0, 0)).save(path)

    for i in range(4):
        for split in ("train", "val"):
            write(f"{split}/class {i}/0.png", 0)
        for thing in ("cup", "kin.man-cook"):
            write(f"test/class {i}/{thing}.oil.png", 10 * i)
            write(f"shifts/ink/class {i}/{thing}.pen.png", 10 * i + 1)
            if i < 2:
                write(f"shifts/coal/class {i}/{thing}.soot.png", 10 * i + 2)
            if i == 0:
                write(f"test/class {i}/{thing}.chalk.png", 10 * i + 3)
        write(f"shifts/ink/class {i}/never-seen.pen.png", 200)
        write(f"test/class {i}/only-here.oil.png", 201)
    subject = BundleSubject(str(tiny_bundle))
    settings = subject.manifest.preprocessing
    pictures = load_pictures(DataSpec(kind="imagefolder", root=root), "test", settings)
    sets = {text.partition("=")[0]: open_shift(text, subject.manifest.classes, settings) for text in beside(pictures)}
    assert list(sets) == ["coal", "ink"]
    found = album(subject, pictures, {name: each.pictures for name, each in sets.items()}, things=3)
    assert found is not None
    assert album(subject, pictures, {}) is None
    return found


def test_the_album_shows_the_same_things_in_every_style(same_things: Album) -> None:
    assert [(style.part, style.name) for style in same_things.styles] == [
        ("test", "chalk"),
        ("test", "oil"),
        ("coal", "soot"),
        ("ink", "pen"),
    ]
    assert set(same_things.things) <= {"cup", "man-cook"}
    truths = [[sample and sample.truth for sample in style.samples] for style in same_things.styles]
    assert truths[1] == truths[3]
    assert truths[1][:2] == ["class 0", "class 1"]
    assert truths[0] == ["class 0", None, None]
    assert truths[2] == ["class 0", "class 1", None]
    for row, digit in ((0, 3), (1, 0), (2, 2), (3, 1)):
        for sample in filter(None, same_things.styles[row].samples):
            shade = 10 * int(sample.truth.split()[1]) + digit
            assert sample.picture == data_uri(np.full((32, 32, 3), (shade, 0, 0), np.uint8))
            assert sample.kind == same_things.styles[row].name


def test_the_page_shows_the_album(made, same_things: Album) -> None:  # type: ignore[no-untyped-def]
    results, samples = made
    text = " ".join(parsed(render(results, samples, same_things)).text)
    assert "The same things in other styles" in text
    for word in (*(thing.replace("-", " ") for thing in same_things.things), "oil", "soot", "coal"):
        assert word in text
    assert "The same things in other styles" not in " ".join(parsed(render(*made)).text)


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_whole_in_itself(made) -> None:  # type: ignore[no-untyped-def]
    text = render(*made)
    page = parsed(text)
    assert all(reference.startswith("data:") for reference in page.references)
    assert len([r for r in page.references if r.startswith("data:image/png")]) == 3 * 6
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)


def test_the_page_shows_the_numbers(made) -> None:  # type: ignore[no-untyped-def]
    results: Results = made[0]
    page = parsed(render(*made))
    text = " ".join(page.text)
    for each in results.answerers:
        assert each.name in text
        assert percent(each.accuracy.corrupted) in text
    for kind in results.corruptions:
        assert kind.replace("_", " ") in text
    for name, shift in results.shifts.items():
        assert name.replace("_", " ") in text
        assert percent(shift.answerers["combined"].accuracy) in text
    assert results.mce is not None
    assert f"{results.mce.values['blend']:.1f}" in text
    for value in results.ood["digits"].auroc.values():
        assert f"{value:.3f}" in text
    assert "it was best" in text
    assert "1,234" in text
    assert page.tags.count("svg") >= 15 + len(results.entropy) + len(results.head_share)


def test_names_are_escaped(made) -> None:  # type: ignore[no-untyped-def]
    results, samples = made
    model = results.model.model_copy(update={"name": NASTY})
    page = parsed(render(results.model_copy(update={"model": model}), samples))
    assert "script" not in page.tags
    assert NASTY in "".join(page.text)


def test_the_page_does_without_what_is_absent(made) -> None:  # type: ignore[no-untyped-def]
    results: Results = made[0]
    bare = [
        each.model_copy(update={"negative_flips": None, "positive_flips": None, "over_original": None})
        for each in results.answerers
        if each.role != "original"
    ]
    nothing: dict[str, object] = {"calibration": None, "costs": {}, "mce": None, "shifts": {}, "ood": {}}
    page = parsed(render(results.model_copy(update={"answerers": bare, **nothing}), []))
    text = " ".join(page.text)
    assert "no original classifier to compare with" in text
    assert "How the router was chosen" not in text
    assert "Sample pictures" not in text
    assert "What training cost" not in text


def test_unknown_heads_get_styles_of_their_own(made) -> None:  # type: ignore[no-untyped-def]
    results: Results = made[0]
    names = ["teacher", "student", "clean"]
    answerers = [results.answerers[1].model_copy(update={"name": name}) for name in names]
    found = styles(results.model_copy(update={"answerers": answerers, "head_share": {}}))
    assert list(found) == names
    assert len({(each.color, each.mark) for each in found.values()}) == 3


def test_formats() -> None:
    assert (percent(0.12345), percent(None), percent(0.5, 0)) == ("12.3", "–", "50")
    assert (signed(0.0123), signed(-0.0123), signed(-0.00001)) == ("+1.2", "−1.2", "0.0")
    assert (heat(1.0), heat(0.2), heat(0.0)) == (0, 60, 60)


def test_large_pictures_are_scaled_down_and_small_ones_kept() -> None:
    assert data_uri(np.zeros((28, 28, 3), np.uint8)).startswith("data:image/png;base64,")
    large = data_uri(np.random.default_rng(0).integers(0, 256, (224, 300, 3), np.uint8))
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 4 * LARGEST * LARGEST


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
@pytest.mark.parametrize("width", [1280, 800])
def test_a_browser_has_nothing_to_complain_about(  # type: ignore[no-untyped-def]
    made, same_things: Album, width: int, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    results, samples = made
    write_report(results, samples, page, same_things)
    assert overflow(page, width) <= 0

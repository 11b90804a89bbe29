"""The emoji renditions: packages, identities, parts, an interrupted build; drawn here from tiny packages."""

import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError
from trivium.train import data_cli
from trivium.train.data import npm, renditions
from trivium.train.data.emoji import contents, package_of
from trivium.train.data.pictures import DataSpec, load_described, load_pictures, parse_spec

pytest.importorskip("resvg_py", reason="drawing the renditions needs resvg-py: pip install 'trivium[renditions]'")

SMALL = Preprocessing(height=16, width=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
THINGS = 5
"""Of each concept."""
STYLES = contents()["styles"]
CHARTED = ("noto", "openmoji")
"""Styles whose tiny package maps code points to names; the others' icons are known by name alone."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("TRIVIUM_CACHE", str(directory))
    return directory


def rows() -> list[dict[str, object]]:
    """As emoji-datasource has them: some things of every concept, a runner of three sexes, a flag."""
    found: list[dict[str, object]] = []

    def add(unified: str, short_name: str, subcategory: str) -> None:
        name = short_name.replace("_", " ").upper()
        row = {"unified": unified, "short_name": short_name, "short_names": [short_name], "name": name}
        found.append(row | {"subcategory": subcategory, "sort_order": len(found)})

    for number, subcategories in enumerate(contents()["concepts"].values()):
        for thing in range(THINGS):
            add(f"{0x20000 + 16 * number + thing:X}", f"thing_{number}_{thing}", subcategories[0].replace("*", "x"))
    for suffix, name in (("", "runner"), ("-200D-2640-FE0F", "woman-running"), ("-200D-2642-FE0F", "man-running")):
        add(f"1F3C3{suffix}", name, "person-activity")
    add("1F468-200D-1F9B0", "red_haired_man", "person")
    add("1F9D1-200D-1F9B0", "red_haired_person", "person")
    add("1F1E6-1F1E8", "flag-ac", "country-flag")
    return found


def packages(directory: Path) -> Path:
    """All packages: tarballs as npm packs them, and one unpacked."""
    emoji = rows()

    def write(name: str, version: str, files: dict[str, object]) -> None:
        about: dict[str, object] = {"name": name, "version": version}
        path = directory / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz") as archive:
            for file, document in (files | {"package.json": about}).items():
                content = json.dumps(document).encode()
                member = tarfile.TarInfo(f"package/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    for number, (style, about) in enumerate(STYLES.items()):
        icons = {}
        for place, row in enumerate(emoji):
            name = str(row["short_name"]).replace("_", "-")
            # fxemoji writes no hyphens.
            name = name.replace("-", "") if style == "fxemoji" else name
            body = f'<rect x="{place % 7}" y="1" width="6" height="{2 + place % 5}" fill="rgb({number * 20},9,90)"/>'
            icons[name] = {"body": body}
        document = {"prefix": style, "icons": icons, "width": 16, "height": 8}
        info = {"author": {"name": f"Hand {number}", "url": "https://example.org"}, "license": {"title": "CC BY 4.0"}}
        files: dict[str, object] = {"icons.json": document, "info.json": info}
        if style in CHARTED:
            codes = {str(row["unified"]).lower(): str(row["short_name"]).replace("_", "-") for row in emoji}
            files["chars.json"] = codes
        write(package_of(style), about["version"], files)
    about = contents()["emoji"]
    write(about["package"], about["version"], {"emoji.json": emoji})
    unpacked = directory / "unpacked"
    with tarfile.open(directory / f"iconify-json-noto-{STYLES['noto']['version']}.tgz") as archive:
        archive.extractall(unpacked, filter="data")
    (directory / f"iconify-json-noto-{STYLES['noto']['version']}.tgz").unlink()
    return directory


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return renditions.obtain(tmp_path_factory.mktemp("made") / "set", source, size=16, say=lambda line: None)


def test_an_identity_is_in_one_part_and_every_style_where_it_belongs(made: Path) -> None:
    parts: dict[str, set[str]] = {}
    for path in made.rglob("*.png"):
        part = path.relative_to(made).parts[0]
        identity, _, style = path.name.removesuffix(".png").split(".")
        if part != "shifts":
            assert STYLES[style]["set"] == "train"
            parts.setdefault(identity, set()).add(part)
    assert all(len(each) == 1 for each in parts.values())
    assert Counter(min(each) for each in parts.values()).keys() == {"train", "val", "test"}
    for path in made.glob("shifts/*/*/*.png"):
        identity, _, style = path.name.removesuffix(".png").split(".")
        shift = path.parts[-3]
        assert STYLES[style]["set"] == shift.removeprefix("known-")
        assert parts[identity] == {"train" if shift.startswith("known-") else "test"}
    assert {path.name for path in (made / "shifts").iterdir()} == {
        f"{known}{kind}" for known in ("", "known-") for kind in ("unseen-colour", "line-art", "black-and-white")
    }
    names = {path.name.split(".")[0] for path in made.rglob("*.png") if "running" in path.name}
    assert names == {"runner"}
    assert {path.name.split(".")[0] for path in made.rglob("*red-haired*.png")} == {"red-haired-person"}
    assert not list(made.rglob("*flag*"))


def test_every_style_draws_every_thing_of_its_part(made: Path) -> None:
    """By chars.json, by names shared with such sets, and by names without hyphens."""
    drawn = Counter(path.name.split(".")[2] for path in made.rglob("*.png"))
    assert set(drawn) == set(STYLES)
    training = {drawn[style] for style, about in STYLES.items() if about["set"] == "train"}
    others = {drawn[style] for style, about in STYLES.items() if about["set"] != "train"}
    assert training == {len(rows()) - 1}
    assert len(others) == 1


def test_pictures_are_square_rgb_on_white_with_the_drawing_in_the_middle(made: Path) -> None:
    picture = Image.open(next(made.rglob("*.noto.png")))
    assert (picture.size, picture.mode) == ((16, 16), "RGB")
    pixels = np.asarray(picture)
    assert (pixels[:4] == 255).all()
    assert (pixels[12:] == 255).all()
    assert (pixels[4:12] < 255).any()


def test_the_set_is_a_data_set_without_a_path(made: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"no emoji renditions; run: trivium data renditions$"):
        load_pictures(DataSpec(kind="renditions"), "train", SMALL)
    cache.mkdir()
    shutil.copytree(made, cache / "renditions")
    for spec in (parse_spec("renditions"), DataSpec(kind="renditions", root=made)):
        pictures = {part: load_pictures(spec, part, SMALL) for part in ("train", "calibration", "test")}
        assert pictures["train"].classes == sorted(contents()["concepts"])
        for part, directory in (("train", "train"), ("calibration", "val"), ("test", "test")):
            assert len(pictures[part]) == len(list((made / directory).rglob("*.png")))
    again = load_described(pictures["test"].describe(), "test", SMALL, root=cache / "renditions")
    assert (again.batch([0, 5]) == pictures["test"].batch([0, 5])).all()


def test_the_same_seed_makes_the_same_bytes_and_another_seed_other_parts(
    made: Path, source: Path, tmp_path: Path
) -> None:
    again = renditions.obtain(tmp_path / "again", source, size=16, say=lambda line: None)
    assert tree(again) == tree(made)
    other = renditions.obtain(tmp_path / "other", source, size=16, seed=1, say=lambda line: None)
    assert tree(other / "train").keys() != tree(made / "train").keys()


def test_an_interrupted_set_does_not_look_whole_and_goes_on(
    made: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    most = 100
    real = renditions.rasteriser()

    def until_killed(svg: str, size: int) -> Image.Image:
        if len(drawn) == most:
            raise KeyboardInterrupt
        drawn.append(svg)
        return real(svg, size)

    monkeypatch.setattr(renditions, "rasteriser", lambda: until_killed)
    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        renditions.obtain(out, source, size=16, say=lambda line: None)
    assert renditions.locate(out) is None
    assert not out.exists()
    most = 100_000
    renditions.obtain(out, source, size=16, say=lambda line: None)
    assert len(drawn) == len(list(made.rglob("*.png")))
    assert tree(out) == tree(made)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_there_stays(made: Path, source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert renditions.obtain(made, source, size=16, say=said.append) == made
    assert "there already" in said[0]
    with pytest.raises(ConfigError, match=r"made with size 16 and seed 0; remove it, or choose another --out"):
        renditions.obtain(made, source, size=32)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="there already, and no set of emoji renditions"):
        renditions.obtain(tmp_path / "mine", source)


def test_the_card_names_counts_licences_and_versions(made: Path) -> None:
    text = (made / "README.md").read_text()
    assert f"{len(list(made.rglob('*.png'))):,} pictures of 16 x 16" in text
    for number, (style, about) in enumerate(STYLES.items()):
        row = (
            f"| {style} | @iconify-json/{style} {about['version']} | [Hand {number}](https://example.org) | CC BY 4.0 |"
        )
        assert row in text
    record = json.loads((made / renditions.RECORD).read_text())
    assert record["packages"] == renditions.wanted()
    assert sum(n for part in record["counts"].values() for n in part.values()) == len(list(made.rglob("*.png")))


def test_packages_that_are_not_what_they_should_be_are_one_line(source: Path, tmp_path: Path) -> None:
    def refused(directory: Path, words: str) -> None:
        with pytest.raises(ConfigError, match=words) as caught:
            renditions.obtain(tmp_path / "never", directory, size=16, say=lambda line: None)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "never").exists()

    refused(tmp_path / "nowhere", "no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no @iconify-json/noto in it \(12 of 12 packages are missing\)")
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    tarball = next(bad.glob("*openmoji*"))
    whole = tarball.read_bytes()
    tarball.write_bytes(whole[: len(whole) // 2])
    refused(bad, "openmoji.* cannot be read")
    tarball.write_bytes(b"no tarball")
    refused(bad, "openmoji.* cannot be read")
    tarball.write_bytes(whole)
    icons = bad / "unpacked" / "package" / "icons.json"
    document = json.loads(icons.read_text())
    icons.write_text(json.dumps(document | {"prefix": "other"}))
    refused(bad, "is not the Iconify set 'noto'")
    icons.write_text(json.dumps(document | {"icons": {"unheard-of": {"body": "<g/>"}}, "aliases": {}}))
    (icons.parent / "chars.json").unlink()
    refused(bad, "none of its icons is a known emoji")
    icons.write_text(json.dumps(document | {"icons": {name: {"body": "<g"} for name in document["icons"]}}))
    refused(bad, "icons cannot be drawn; the first: ")


def test_another_version_is_told(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    about = mine / "unpacked" / "package" / "package.json"
    about.write_text(json.dumps({"name": "@iconify-json/noto", "version": "9.9.9"}))
    said: list[str] = []
    out = renditions.obtain(tmp_path / "set", mine, size=16, say=said.append)
    assert said[0].startswith("@iconify-json/noto is 9.9.9, not")
    assert json.loads((out / renditions.RECORD).read_text())["packages"]["@iconify-json/noto"] == "9.9.9"


def fake_npm(directory: Path, source: Path) -> None:
    """An npm that packs from a directory, for the registry cannot be had in a test."""
    script = directory / "npm"
    directory.mkdir()
    script.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys, pathlib\n"
        f"source = pathlib.Path({str(source)!r})\n"
        "name, _, version = sys.argv[2].rpartition('@')\n"
        "with (source / 'calls').open('a') as file: file.write(sys.argv[2] + '\\n')\n"
        "file = source / f\"{name.strip('@').replace('/', '-')}-{version}.tgz\"\n"
        "if not file.exists():\n"
        "    sys.exit(f'npm error code ETARGET\\nnpm error notarget No matching version found for {sys.argv[2]}.')\n"
        "shutil.copy(file, '.')\n"
    )
    script.chmod(0o755)


def test_packages_are_fetched_by_npm_and_only_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    registry = tmp_path / "registry"
    shutil.copytree(source, registry)
    with tarfile.open(registry / f"iconify-json-noto-{STYLES['noto']['version']}.tgz", "w:gz") as archive:
        archive.add(registry / "unpacked" / "package", "package")
    fake_npm(tmp_path / "bin", registry)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    found = npm.fetch(renditions.wanted(), cache / "npm", lambda line: None)
    assert {name: package.version for name, package in found.items()} == renditions.wanted()
    assert sorted((registry / "calls").read_text().split()) == sorted(
        f"{name}@{version}" for name, version in renditions.wanted().items()
    )
    npm.fetch(renditions.wanted(), cache / "npm", lambda line: None)
    assert len((registry / "calls").read_text().split()) == 12
    with pytest.raises(
        ConfigError, match=re.escape("npm pack @iconify-json/noto@0.0.1: No matching version found for @iconify-json/n")
    ):
        npm.fetch({"@iconify-json/noto": "0.0.1"}, cache / "npm", lambda line: None)
    kept = next((cache / "npm").glob("*openmoji*"))
    shutil.copy(next((cache / "npm").glob("*noto-v1*")), kept)
    with pytest.raises(ConfigError, match="delete it to have it fetched again"):
        npm.fetch(renditions.wanted(), cache / "npm", lambda line: None)


def test_without_npm_or_the_rasteriser_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["trivium data", "renditions", "--out", str(tmp_path / "set")])
    with pytest.raises(ConfigError, match=r"needs npm, which is not on PATH.*\(--from\)"):
        data_cli.main()
    monkeypatch.setattr("sys.argv", [*sys.argv, "--size", "4"])
    with pytest.raises(ConfigError, match="8 to 1024"):
        data_cli.main()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"pip install 'trivium\[renditions\]'"):
        renditions.obtain(tmp_path / "set", source)


@pytest.mark.slow
def test_the_real_set_is_as_large_as_it_was(tmp_path: Path) -> None:
    """From the registry, two minutes; the counts are those of the pinned versions."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not on PATH")
    try:
        out = renditions.obtain(tmp_path / "set")
    except ConfigError as error:
        if "npm pack" not in str(error):
            raise
        pytest.skip(f"the registry cannot be reached: {error}")
    counts = json.loads((out / renditions.RECORD).read_text())["counts"]
    totals = {part: sum(styles.values()) for part, styles in counts.items()}
    assert (totals["train"], totals["val"], totals["test"]) == (2876, 533, 1215)
    assert (totals["shifts/unseen-colour"], totals["shifts/line-art"], totals["shifts/black-and-white"]) == (
        878,
        337,
        543,
    )
    # One thing, two hands: the same animal, other lines.
    cats = sorted(out.rglob("cat.cat.*.png"))
    assert len(cats) >= 4
    # and all of them on one side of the split
    assert {cat.relative_to(out).parts[0] for cat in cats} in ({"train"}, {"val"}, {"test", "shifts"})

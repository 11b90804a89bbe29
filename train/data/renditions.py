"""Emoji renditions: the same things drawn by eleven hands, made into class folders from npm's icon packages.

A shift of style like ImageNet-R's and -Sketch's that can be had: four colour styles to train on, other colour styles,
line art, and black and white. renditions.yaml says which packages, concepts and identities.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trivium.runtime.bundle import digest
from trivium.runtime.errors import ConfigError

from .emoji import (
    CONTENTS,
    SHARES,
    Emoji,
    Rendition,
    code_names,
    contents,
    emoji_of,
    package_of,
    plan,
    split_identities,
)
from .fashion_mnist import cache_directory
from .npm import Package, fetch, packages_in

RECORD = "renditions.json"
"""What a whole set ends with: its size, seed, packages and counts."""
UNDERWAY = "underway.json"
"""What an unfinished set begins with: of what it is being made."""
UNDRAWN = 0.02
"""Share of icons that may fail to rasterise; more means that the packages are not what they were."""


def wanted() -> dict[str, str]:
    """All packages, name -> version."""
    emoji = contents()["emoji"]
    styles = contents()["styles"].items()
    return {package_of(name): style["version"] for name, style in styles} | {emoji["package"]: emoji["version"]}


def default_directory() -> Path:
    """Where the set lies unless the user says otherwise."""
    return cache_directory() / "renditions"


def locate(root: Path | None = None) -> Path | None:
    """The directory of a whole set: root, or the default one; None where there is none."""
    directory = root or default_directory()
    return directory if (directory / RECORD).is_file() else None


def obtain(
    out: Path | None = None,
    source: Path | None = None,
    *,
    size: int = 96,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Make the set of pictures size x size in `out` (default_directory) and return its directory.

    The packages come from `source`, a directory of npm tarballs or folders, or are fetched by npm. Identities are
    split by seed. A set that is there already stays; one that was interrupted goes on where it was.

    Raises: ConfigError where a package or the rasteriser is missing, a package is not what it should be, or `out`
    holds something else.
    """
    target = out or default_directory()
    if target.exists() and locate(target) is None:
        raise ConfigError(f"{target}: there already, and no set of emoji renditions; choose another --out")
    if locate(target) is not None:
        record = _record(target)
        if (record.get("size"), record.get("seed")) != (size, seed):
            raise ConfigError(
                f"{target}: made with size {record.get('size')} and seed {record.get('seed')}; remove it, or choose "
                "another --out"
            )
        say(f"the emoji renditions are there already: {target}")
        return target
    rasterise = rasteriser()
    packages = _packages(source, say)
    emoji = emoji_of(packages[contents()["emoji"]["package"]])
    parts = split_identities(emoji, seed)
    names = code_names(packages, emoji)
    planned = list(plan(packages, emoji, names, parts))
    say(f"drawing {len(planned):,} pictures of {len({e.identity for e in emoji})} things, {size} x {size} pixels")
    scratch = target.parent / f".{target.name}.partial"
    try:
        versions = {name: packages[name].version for name in sorted(packages)}
        record = {"size": size, "seed": seed, "packages": versions, "contents_sha256": digest(CONTENTS)}
        _reset(scratch, record)
        failed = draw(planned, scratch, size, rasterise)
        if len(failed) > UNDRAWN * len(planned):
            raise ConfigError(f"{len(failed)} of {len(planned)} icons cannot be drawn; the first: {failed[0]}")
        for place in failed:
            say(f"left out, cannot be drawn: {place}")
        drawn = [each.place for each in planned if each.place not in set(failed)]
        (scratch / "README.md").write_text(card(drawn, emoji, packages, size, seed), encoding="utf-8")
        whole = {"format": "trivium-renditions", "schema_version": 1, **record, "counts": counts(drawn)}
        (scratch / RECORD).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (scratch / UNDERWAY).unlink()
        scratch.rename(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from None
    say(f"{len(drawn):,} emoji renditions written to {target}; licences: {target / 'README.md'}")
    return target


def rasteriser() -> Callable[[str, int], Image.Image]:
    """A function from an SVG document and a size in pixels to an RGB picture on white.

    Raises: ConfigError where resvg-py is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError:
        raise ConfigError("drawing the renditions needs resvg-py; run: pip install 'trivium[renditions]'") from None

    def rasterise(svg: str, size: int) -> Image.Image:
        png = svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGB")

    return rasterise


def draw(
    planned: Iterable[Rendition], directory: Path, size: int, rasterise: Callable[[str, int], Image.Image]
) -> list[str]:
    """Draw what is not there yet; the places of those that cannot be drawn."""
    failed = []
    for each in planned:
        path = directory / each.place
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture = rasterise(each.svg, size)
        except ValueError:
            failed.append(each.place)
            continue
        unfinished = path.with_suffix(".unfinished")
        picture.save(unfinished, "PNG")
        unfinished.replace(path)
    return failed


def counts(places: Iterable[str]) -> dict[str, dict[str, int]]:
    """Part of the set -> style -> pictures."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for place in places:
        *part, _, file = place.split("/")
        found["/".join(part)][file.split(".")[2]] += 1
    return {part: dict(found[part]) for part in sorted(found)}


def card(places: Iterable[str], emoji: Iterable[Emoji], packages: Mapping[str, Package], size: int, seed: int) -> str:
    """The data set's card: how it was made, counts, licences and attribution."""
    places = list(places)
    by_part = counts(places)
    classes = Counter((place.split("/")[-2], "/".join(place.split("/")[:-2])) for place in places)
    identities = {concept: {e.identity for e in emoji if e.concept == concept} for concept in contents()["concepts"]}
    lines = [
        "# Emoji renditions",
        "",
        f"{len(places):,} pictures of {size} x {size} pixels: the same things drawn in {len(contents()['styles'])} "
        "styles, as class folders. Made on this machine from npm packages by `trivium data renditions`; the drawings "
        "belong to their authors, under the licences below, which also bind whoever passes the pictures on.",
        "",
        "File names: `IDENTITY.EMOJI.STYLE.png`. The variants of one thing (man, woman, person; phases of the moon; "
        "full list in trivium's train/data/renditions.yaml) share an identity, and an identity is in one part only. "
        f"The identities of every class were drawn into the parts by seed {seed}: "
        + ", ".join(f"{share:.0%} {part}" for part, share in SHARES.items())
        + ". Emoji with a skin tone are left out, as are flags, symbols and a few subcategories that hold no one kind.",
        "",
        "- `train`, `val`, `test`: the training styles; `test` shows things that are in neither of the others",
        "- `shifts/NAME`: the things of `test` in other styles",
        "- `shifts/known-NAME`: the things of `train` in other styles",
        "",
        "| part | " + " | ".join(("pictures", "styles")) + " |",
        "|---|---|---|",
    ]
    for part, styles in by_part.items():
        each = ", ".join(f"{style} {count}" for style, count in sorted(styles.items()))
        lines.append(f"| {part} | {sum(styles.values())} | {each} |")
    lines += ["", "| class | Unicode subcategories | identities | train | val | test |", "|---|---|---|---|---|---|"]
    for concept, subcategories in contents()["concepts"].items():
        shares = " | ".join(str(classes[concept, part]) for part in SHARES)
        lines.append(f"| {concept} | {', '.join(subcategories)} | {len(identities[concept])} | {shares} |")
    lines += ["", "| style | package | author | licence |", "|---|---|---|---|"]
    for style in contents()["styles"]:
        package = packages[package_of(style)]
        about = package.document("info.json")
        author, licence = (about or {}).get("author", {}), (about or {}).get("license", {})
        lines.append(
            f"| {style} | {package.name} {package.version} | {_linked(author.get('name'), author.get('url'))} | "
            f"{_linked(licence.get('title'), licence.get('url'))} |"
        )
    datasource = packages[contents()["emoji"]["package"]]
    lines += ["", f"Categories and names: {datasource.name} {datasource.version} (Cal Henderson, MIT).", ""]
    return "\n".join(lines)


def _packages(source: Path | None, say: Callable[[str], None]) -> dict[str, Package]:
    versions = wanted()
    if source is None:
        return fetch(versions, cache_directory() / "npm", say)
    found = packages_in(source)
    if missing := [name for name in versions if name not in found]:
        raise ConfigError(f"{source}: no {missing[0]} in it ({len(missing)} of {len(versions)} packages are missing)")
    for name, version in versions.items():
        if found[name].version != version:
            say(f"{name} is {found[name].version}, not {version}: other drawings than the usual set's")
    return {name: found[name] for name in versions}


def _linked(text: str | None, url: str | None) -> str:
    return f"[{text}]({url})" if text and url else text or "unknown"


def _reset(scratch: Path, record: Mapping[str, Any]) -> None:
    """Keep an interrupted set that was being made of the same things, else begin anew."""
    file = scratch / UNDERWAY
    if scratch.is_dir() and not (file.is_file() and file.read_text(encoding="utf-8") == json.dumps(record)):
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record), encoding="utf-8")


def _record(directory: Path) -> dict[str, Any]:
    try:
        document = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict) or document.get("format") != "trivium-renditions":
        raise ConfigError(f"{directory / RECORD}: unreadable; remove {directory} to have it made anew")
    return document

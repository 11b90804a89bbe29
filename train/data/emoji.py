"""Emoji and who draws them: concepts, identities and their parts, and the icon of each emoji in each style."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trivium.runtime.errors import ConfigError

from .npm import Package

CONTENTS = Path(__file__).with_name("renditions.yaml")
SHARES = {"train": 0.62, "val": 0.12, "test": 0.26}
"""Of each concept's identities."""


@dataclass(frozen=True)
class Emoji:
    """One emoji of a concept."""

    code: str
    """Code points in lower-case hexadecimal, joined by hyphens, without variation selectors."""
    name: str
    """Letters, digits and hyphens; no two emoji share it."""
    concept: str
    identity: str
    """Shared by the variants of one thing, which are never in two parts."""


@dataclass(frozen=True)
class Rendition:
    """One picture to be drawn."""

    place: str
    """Its file, relative to the set: PART/CONCEPT/IDENTITY.EMOJI.STYLE.png."""
    svg: str


@cache
def contents() -> Any:
    """renditions.yaml."""
    return yaml.safe_load(CONTENTS.read_text(encoding="utf-8"))


def package_of(style: str) -> str:
    """The npm package that holds a style."""
    return f"@iconify-json/{style}"


def emoji_of(datasource: Package) -> list[Emoji]:
    """The emoji of all concepts, in Unicode's order.

    Raises: ConfigError where the package is not emoji-datasource's.
    """
    rows = datasource.document("emoji.json")
    needed = ("unified", "short_name", "subcategory", "sort_order")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and all(key in r for key in needed) for r in rows):
        raise ConfigError(f"{datasource.path}: its emoji.json is no list of emoji with {', '.join(needed)}")
    rows = sorted(rows, key=lambda row: row["sort_order"])
    # A base that is no emoji itself has the name of its first variant.
    short = {base_code(row["unified"]): row["short_name"] for row in reversed(rows)}
    short |= {plain_code(row["unified"]): row["short_name"] for row in rows}
    kin = contents()["kin"]
    found: list[Emoji] = []
    taken: set[str] = set()
    for row in rows:
        concept = _matching(contents()["concepts"], row["subcategory"])
        if concept is None:
            continue
        code, base = plain_code(row["unified"]), base_code(row["unified"])
        label = short[base]
        identity = _matching(kin, row["short_name"]) or _matching(kin, label) or _slug(label)
        name = _slug(row["short_name"])
        name = name if name not in taken else f"{name}-{code}"
        taken.add(name)
        found.append(Emoji(code, name, concept, identity))
    if missing := set(contents()["concepts"]) - {each.concept for each in found}:
        raise ConfigError(f"{datasource.path}: its emoji.json has no emoji for {min(missing)}")
    return found


def plain_code(unified: str) -> str:
    """Code points as written in all packages: lower-case, without variation selectors."""
    return "-".join(point for point in unified.lower().split("-") if point != "fe0f")


def base_code(unified: str) -> str:
    """Code points without what makes a variant: man or woman, direction, colour."""
    code = f"-{unified.lower()}-"
    for variant in contents()["variants"]:
        code = code.replace(f"-{variant}-", "-")
    code = code.strip("-")
    first, joiner, rest = code.partition("-200d-")
    if joiner and first in contents()["people"]["from"]:
        return f"{contents()['people']['to']}-200d-{rest}"
    return code


def split_identities(emoji: Iterable[Emoji], seed: int) -> dict[str, str]:
    """identity -> train, val or test, drawn by seed within the concept of the identity's first emoji by SHARES."""
    concepts: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for each in emoji:
        if each.identity not in seen:
            seen.add(each.identity)
            concepts[each.concept].append(each.identity)
    parts = {}
    generator = np.random.Generator(np.random.Philox(seed))
    for concept in sorted(concepts):
        members = sorted(concepts[concept])
        order = generator.permutation(len(members))
        ends = np.round(np.cumsum(list(SHARES.values())) * len(members))
        for place, index in enumerate(order):
            parts[members[index]] = list(SHARES)[int(np.searchsorted(ends, place, side="right"))]
    return parts


def code_names(packages: Mapping[str, Package], emoji: Iterable[Emoji]) -> dict[str, str]:
    """Icon name -> code, gathered from the sets that map their code points (chars.json) and from the emoji's names; for
    the sets that do not."""
    codes = {each.code for each in emoji}
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for style in contents()["styles"]:
        package = packages[package_of(style)]
        aliases = _aliases(package)
        for code, name in _chars(package).items():
            for each in (name, *aliases.get(name, ())):
                votes[each][plain_code(code)] += 1
    datasource = packages[contents()["emoji"]["package"]].document("emoji.json")
    for row in datasource:
        for name in (row.get("name"), *row.get("short_names", ())):
            if name:
                votes[_slug(name.lower())].setdefault(plain_code(row["unified"]), 0)
    # Most sets' word counts; among equals the first in the sets' order.
    return {name: best for name, each in votes.items() if (best := each.most_common(1)[0][0]) in codes}


def plan(
    packages: Mapping[str, Package], emoji: Iterable[Emoji], names: Mapping[str, str], parts: Mapping[str, str]
) -> Iterator[Rendition]:
    """Every picture of the set: training styles of all identities; other styles of those of test and of train.

    Raises: ConfigError where a package is no icon set or matches no emoji.
    """
    by_code = {each.code: each for each in emoji}
    # Some sets write names without hyphens.
    squeezed = {name.replace("-", ""): code for name, code in reversed(list(names.items()))}
    for style, about in contents()["styles"].items():
        package = packages[package_of(style)]
        document = _icons(package)
        own: dict[str, list[str]] = defaultdict(list)
        for code, name in _chars(package).items():
            own[name].append(plain_code(code))
        aliases = _aliases(package)
        drawn: set[str] = set()
        for name, icon in document["icons"].items():
            if icon.get("hidden") or not isinstance(icon.get("body"), str) or name in about.get("without", ()):
                continue
            known = (names.get(each) or squeezed.get(each) for each in (name, *aliases.get(name, ())))
            for code in own.get(name) or [next(filter(None, known), "")]:
                if code not in by_code or code in drawn:
                    continue
                drawn.add(code)
                each = by_code[code]
                if (part := _part(about["set"], parts[each.identity])) is not None:
                    file = f"{each.identity}.{each.name}.{style}.png"
                    yield Rendition(f"{part}/{each.concept}/{file}", svg_document(icon, document))
        if not drawn:
            raise ConfigError(f"{package.path}: none of its icons is a known emoji")


def svg_document(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """An icon of an Iconify set as a square SVG document, the drawing in its middle."""
    left, top, width, height = (
        float(icon.get(key, defaults.get(key, value)))
        for key, value in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side:g}" height="{side:g}">{icon["body"]}</svg>'
    )


def _icons(package: Package) -> dict[str, Any]:
    document = package.document("icons.json")
    prefix = package.name.partition("/")[2]
    if (
        not isinstance(document, dict)
        or document.get("prefix") != prefix
        or not isinstance(document.get("icons"), dict)
    ):
        raise ConfigError(f"{package.path}: its icons.json is not the Iconify set {prefix!r}")
    return document


def _chars(package: Package) -> dict[str, str]:
    return package.document("chars.json") or {}


def _aliases(package: Package) -> dict[str, list[str]]:
    """Icon -> its other names; a turned or mirrored icon is not the same."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, alias in _icons(package).get("aliases", {}).items():
        if set(alias) == {"parent"}:
            found[alias["parent"]].append(name)
    return found


def _part(set_: str, identity: str) -> str | None:
    if set_ == "train":
        return identity
    return {"test": f"shifts/{set_}", "train": f"shifts/known-{set_}"}.get(identity)


def _matching(table: Mapping[str, list[str]], name: str) -> str | None:
    return next((key for key, patterns in table.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)), None)


def _slug(name: str) -> str:
    if name in ("+1", "-1"):
        return "thumbs-up" if name == "+1" else "thumbs-down"
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")

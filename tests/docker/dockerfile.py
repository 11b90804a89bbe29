"""A Dockerfile as stages of instructions, as far as ours go: no heredocs, no parser directives."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path


@dataclass
class Stage:
    """From one FROM to the next."""

    image: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)
    """(keyword, arguments), continuation lines joined, in their order."""

    def last(self, keyword: str) -> str:
        """The arguments of the last instruction of a kind, which is the one in force; "" where there is none."""
        return next((text for word, text in reversed(self.instructions) if word == keyword), "")

    def command(self, keyword: str) -> list[str]:
        """The words of an ENTRYPOINT or HEALTHCHECK in exec form."""
        words: list[str] = json.loads(re.sub(r"^.*?CMD\s+", "", self.last(keyword)))
        return words


def parse(path: Path) -> list[Stage]:
    """The stages of a Dockerfile; the last one is the image."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for statement in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        keyword, _, rest = statement.strip().partition(" ")
        if keyword == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(image.strip(), name.strip()))
        elif keyword:
            stages[-1].instructions.append((keyword, " ".join(rest.split())))
    return stages


def variables(text: str) -> dict[str, str]:
    """What an ENV instruction sets."""
    return dict(word.split("=", 1) for word in shlex.split(text))  # type: ignore[misc]


def context(root: Path) -> list[Path]:
    """The files below root that .dockerignore lets into a build, relative to root."""
    patterns = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]

    def enters(path: Path) -> bool:
        inside = True
        names = ["/".join(path.parts[:count]) for count in range(1, len(path.parts) + 1)]
        for rule in rules:
            pattern = rule.removeprefix("!")
            forms = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
            if any(_matches(name, form) for name in names for form in forms):
                inside = rule.startswith("!")
        return inside

    tops = {rule.removeprefix("!").split("/")[0] for rule in rules if rule.startswith("!")}
    files = [
        path for top in sorted(tops) for path in ((root / top).rglob("*") if (root / top).is_dir() else [root / top])
    ]
    return [path.relative_to(root) for path in files if path.is_file() and enters(path.relative_to(root))]


def _matches(name: str, pattern: str) -> bool:
    """A star ends at a slash, unless there are two."""
    if pattern.startswith("**/"):
        return fnmatch(name, pattern)
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)

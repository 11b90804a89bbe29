"""report.html: one page that holds everything an evaluation found, pictures included, and asks the network nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import charts
from .charts import MARKS, Series
from .gallery import Album, Sample
from .results import Results

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "report.html.jinja"
SPARE = ("--c-spare-1", "--c-spare-2", "--c-spare-3", "--c-spare-4")
"""Colours of heads that have no colour of their own."""
KNOWN = {
    "original": Series("original", "--c-original", "circle", dash="5 3"),
    "clean": Series("clean", "--c-clean", "circle"),
    "robust": Series("robust", "--c-robust", "square"),
    "combined": Series("combined", "--c-combined", "triangle"),
    "mean": Series("mean", "--c-mean", "diamond"),
    "min_entropy": Series("min_entropy", "--c-min-entropy", "diamond"),
    "paper": Series("paper", "--c-paper", "diamond"),
    "blend": Series("blend", "--c-blend", "diamond", dash="1.5 2.5", width=2.6),
    "gate": Series("gate", "--c-gate", "square", dash="4 2"),
    "clean+combined": Series("clean+combined", "--c-blend", "diamond"),
}


def write_report(results: Results, samples: Sequence[Sequence[Sample]], path: Path, album: Album | None = None) -> None:
    """Write the page; samples are rows of one picture under several corruptions (gallery.py)."""
    path.write_text(render(results, samples, album), encoding="utf-8")


def render(results: Results, samples: Sequence[Sequence[Sample]], album: Album | None = None) -> str:
    """The page as text."""
    style = styles(results)
    drawn = [each.name for each in results.answerers if each.role != "rule" or each.default]
    voices = sorted({label for rule in results.head_share.values() for shares in rule.values() for label in shares})
    kinds = {
        kind: charts.severity_lines(
            {style[name]: [results.answerer(name).accuracy.clean, *found.accuracy[name]] for name in drawn},
            f"Accuracy under {words(kind)} by severity",
        )
        for kind, found in results.corruptions.items()
    }
    page = environment().get_template(PAGE)
    return page.render(
        r=results,
        default=results.default,
        style=style,
        drawn=drawn,
        swatches={name: charts.swatch(series) for name, series in style.items()},
        kinds=kinds,
        reliability={name: charts.reliability_plot(style[name], results.reliability[name]) for name in drawn},
        entropy={head: charts.entropy_histogram(head, found) for head, found in results.entropy.items()},
        shares={
            rule: charts.share_bars(found, style, f"Who answered under {rule}, by severity")
            for rule, found in results.head_share.items()
        },
        voices=voices,
        best={
            key: max((getattr(each, key) or 0.0 for each in results.detection), default=0.0)
            for key in ("shift", "errors_clean", "errors_corrupted")
        },
        samples=samples,
        album=album,
    )


def environment() -> Environment:
    """Where the pages' templates come from, strict and escaping."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {"percent": percent, "signed": signed, "words": words, "heat": heat}
    return found


def styles(results: Results) -> dict[str, Series]:
    """A series for every answerer and every label of who answered; unknown heads take spare colours in turn."""
    labels = [label for rule in results.head_share.values() for shares in rule.values() for label in shares]
    names = list(dict.fromkeys([each.name for each in results.answerers] + labels))
    unknown = [name for name in names if name not in KNOWN]
    spare = {
        name: Series(name, SPARE[i % len(SPARE)], MARKS[i % len(MARKS)], dash="" if i < len(SPARE) else "2 2")
        for i, name in enumerate(unknown)
    }
    return {name: KNOWN.get(name) or spare[name] for name in names}


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """A difference in percentage points, with its sign."""
    text = f"{100 * value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def words(name: str) -> str:
    """A corruption's name as words."""
    return name.replace("_", " ")


def heat(value: float) -> int:
    """Strength, 0 to 60, of a cell of accuracy `value`: the more errors the stronger, all of it from 80 % errors up."""
    return round(60 * min(max(1 - value, 0.0) / 0.8, 1.0))

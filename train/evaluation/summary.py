"""Several evaluations side by side: runs of one method (several seeds) as one row, with mean and spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trivium.runtime.errors import ConfigError

from ..models.mc import ORIGINAL
from .columns import ACCURACY, CONFIDENCE, Column, Of, Unit, attack_columns, outside_columns, shift_columns
from .results import Results, read_results

RESULTS = "results.json"


class Spread(NamedTuple):
    """Mean, sample standard deviation (None of one run), and the values by run."""

    mean: float
    deviation: float | None
    values: list[float]


@dataclass(frozen=True)
class Run:
    """One evaluation, under the name of the row that it belongs to."""

    name: str
    path: Path
    results: Results


@dataclass(frozen=True)
class Row:
    """One answerer of the runs of one name; answerer None: each run's default router."""

    name: str
    runs: Sequence[Results]
    answerer: str | None = None

    def values(self, of: Of) -> list[float | None]:
        return [of(run, run.default if self.answerer is None else run.answerer(self.answerer)) for run in self.runs]


@dataclass(frozen=True)
class Comparison:
    """All runs on one data set.

    rows: every run's default router, a row a name, after the original classifiers. Where all runs of a seed share an
    original, it is one row.
    answerers: every head and router of the runs that have several.
    """

    title: str
    runs: Sequence[Results]
    rows: Sequence[Row]
    answerers: Sequence[Row]


@dataclass(frozen=True)
class Table:
    """Rows by columns; columns in which nothing is known are left out."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Spread | None]]]

    def best(self, column: int) -> float | None:
        """The best mean of a column that has a better side and two different means."""
        means = [cells[column].mean for _, cells in self.rows if cells[column] is not None]  # type: ignore[union-attr]
        better = self.columns[column].better
        return max(means, key=lambda mean: better * mean) if better and len(set(means)) > 1 else None


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Runs from files, directories that hold results.json in them or below, and NAME=PATH, which names the row.

    Without a name, a run's row has the name of its model, which is that of its recipe.

    Raises: ConfigError in one line, also where a row has one seed twice.
    """
    runs: list[Run] = []
    for text in arguments:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = "", text
        for path in _files(Path(place)):
            if path.resolve() not in [run.path.resolve() for run in runs]:
                results = read_results(path)
                runs.append(Run(name or results.model.name, path, results))
    taken: dict[tuple[str, str, int], Path] = {}
    for run in runs:
        seed = run.results.run_seed
        key = (run.results.data.model_dump_json(), run.name, seed)
        if key in taken:
            raise ConfigError(
                f"{taken[key]} and {run.path} are both {run.name} with seed {seed}: give one another name, "
                f"NAME={run.path}"
            )
        taken[key] = run.path
    return runs


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """One comparison a data set and number of pictures of it, in the order given.

    Raises: ConfigError where runs on the same data measure different things.
    """
    by_data: dict[str, list[Run]] = {}
    for run in runs:
        by_data.setdefault(run.results.data.model_dump_json(), []).append(run)
    return [_comparison(group) for group in by_data.values()]


def table(title: str, columns: Sequence[Column], rows: Iterable[Row]) -> Table:
    """Mean and spread of every column over every row's runs."""
    cells = [(row.name, [spread(row.values(column.of)) for column in columns]) for row in rows]
    known = [i for i in range(len(columns)) if any(values[i] is not None for _, values in cells)]
    return Table(title, [columns[i] for i in known], [(name, [values[i] for i in known]) for name, values in cells])


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation; None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, known)


def show(found: Spread | None, unit: Unit) -> str:
    """A cell: mean ± standard deviation, shares in percent; a dash where nothing is known."""
    if found is None:
        return "–"
    scale = 100 if unit in ("share", "points") else 1
    digits = {"seconds": 0, "area": 3}.get(unit, 1)
    mean = f"{scale * found.mean:{'+' if unit == 'points' else ''}.{digits}f}".replace("-", "−")
    return mean if found.deviation is None else f"{mean} ± {scale * found.deviation:.{digits}f}"


def tables(found: Comparison) -> list[Table]:
    """All tables of a comparison: of the default routers, and of every head and router."""
    shifts = shift_columns(found.runs, lambda on: on.accuracy, 1)
    attacks = attack_columns(found.runs)
    made = [
        table("Accuracy, flips and cost", ACCURACY, found.rows),
        table("Confidence", CONFIDENCE, found.rows),
        table("Accuracy on shifts", shifts, found.rows),
        table("Negative flips on shifts", shift_columns(found.runs, lambda on: on.negative_flips, -1), found.rows),
        table("Calibration error on shifts", shift_columns(found.runs, lambda on: on.ece, -1), found.rows),
        table("Accuracy under attack", attacks, found.rows),
        table("Against other data: area under the ROC curve", outside_columns(found.runs), found.rows),
        table("Every head and router: accuracy and flips", ACCURACY, found.answerers),
        table("Every head and router: confidence", CONFIDENCE, found.answerers),
        table("Every head and router: accuracy on shifts", shifts, found.answerers),
        table("Every head and router: accuracy under attack", attacks, found.answerers),
    ]
    return [each for each in made if each.columns and each.rows]


def document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The tables as plain JSON: seeds, default routers, and mean, deviation and values of each cell."""
    return {
        "format": "trivium-summary",
        "comparisons": [
            {
                "data": found.runs[0].data.model_dump(),
                "rows": {
                    row.name: {
                        "seeds": [run.run_seed for run in row.runs],
                        "default_routers": [run.model.default_router for run in row.runs],
                    }
                    for row in found.rows
                },
                "tables": {
                    each.title: {
                        name: {
                            column.name: cell._asdict()
                            for column, cell in zip(each.columns, cells, strict=True)
                            if cell is not None
                        }
                        for name, cells in each.rows
                    }
                    for each in tables(found)
                },
            }
            for found in comparisons
        ],
    }


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The tables for a README."""
    lines: list[str] = []
    for found in comparisons:
        lines += [f"## {found.title}", ""]
        for each in tables(found):
            heads = [column.name + (", %" if column.unit == "share" else "") for column in each.columns]
            rows = {
                name: [show(cell, column.unit) for cell, column in zip(row, each.columns, strict=True)]
                for name, row in each.rows
            }
            lines += [f"**{each.title}**", "", *grid(heads, rows), ""]
    return "\n".join(lines)


def grid(columns: Sequence[str], rows: Mapping[str, Sequence[str]], rule: str = "---") -> list[str]:
    """Lines of a Markdown table. rows: name -> its cells; rule: of their columns, ---: aligns them at the right."""
    cells = [f"| {name} | {' | '.join(row)} |" for name, row in rows.items()]
    return [f"| | {' | '.join(columns)} |", "|---|" + f"{rule}|" * len(columns), *cells]


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ConfigError(f"{place}: no such file or directory")
    found = [place / RESULTS] if (place / RESULTS).is_file() else sorted(place.rglob(RESULTS))
    if not found:
        raise ConfigError(f"{place}: no {RESULTS} in it or below")
    return found


def _comparison(group: Sequence[Run]) -> Comparison:
    first = group[0].results
    for run in group[1:]:
        for what in ("left_out", "severities"):
            if getattr(run.results, what) != getattr(first, what):
                raise ConfigError(
                    f"{group[0].path} and {run.path} differ in {what}: {getattr(first, what)} and "
                    f"{getattr(run.results, what)}"
                )
    by_name: dict[str, list[Results]] = {}
    for run in sorted(group, key=lambda run: run.results.run_seed):
        by_name.setdefault(run.name, []).append(run.results)
    answerers = []
    for name, runs in by_name.items():
        names = [each.name for each in runs[0].answerers]
        if any([each.name for each in run.answerers] != names for run in runs):
            raise ConfigError(f"the runs of {name} differ in their heads or routers")
        # a run of one head is its own default row
        several = [each.name for each in runs[0].answerers if each.role != "original"]
        answerers += [Row(f"{name}: {each}", runs, each) for each in several if len(several) > 1]
    return Comparison(
        f"{first.data.source}: {first.data.pictures:,} {first.data.split} pictures, {first.data.corrupted:,} corrupted",
        [run.results for run in group],
        [*_originals(by_name), *(Row(name, runs) for name, runs in by_name.items())],
        answerers,
    )


def _originals(by_name: dict[str, list[Results]]) -> list[Row]:
    """The original classifiers that stand beside what was made of them: one row where the runs of a seed agree."""
    have: dict[str, list[Results]] = {}
    distinct: dict[tuple[int, float, float], Results] = {}
    for name, runs in by_name.items():
        for run in runs:
            own = next((each for each in run.answerers if each.role == "original" and not each.default), None)
            if own is not None:
                have.setdefault(name, []).append(run)
                distinct.setdefault((run.run_seed, own.accuracy.clean, own.accuracy.corrupted), run)
    if len(distinct) <= len({run.run_seed for run in distinct.values()}):
        return [Row("original", list(distinct.values()), ORIGINAL)] if distinct else []
    return [Row(f"{name}: original", runs, ORIGINAL) for name, runs in have.items()]

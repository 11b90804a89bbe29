"""The page of `trivium report`: runs compared, whole in itself, asking the network nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from . import overview_charts as drawn
from .charts import Series, reliability_plot, swatch
from .columns import MEAN, Of, cost, radius, robust, shift_columns
from .report import environment
from .results import Diagrams, Results
from .summary import Comparison, Row, Spread, Table, show, spread, tables

PAGE = "comparison.html.jinja"


def render(comparisons: Sequence[Comparison], command: str) -> str:
    """The page as text."""
    return environment().get_template(PAGE).render(
        command=command, parts=[part(found) for found in comparisons], runs=sum(len(c.runs) for c in comparisons)
    )  # fmt: skip


def part(found: Comparison) -> dict[str, Any]:
    """What the page says of one data set."""
    style = drawn.series([row.name for row in found.rows])
    return {
        "found": found,
        "rows": [(i, row, swatch(style[row.name])) for i, row in enumerate(found.rows, start=1)],
        "tables": [laid_out(each) for each in tables(found)],
        "paretos": paretos(found, style),
        "corruptions": corruption_bars(found, style),
        "counted": {name: each.counted for name, each in found.runs[0].corruptions.items()},
        "curves": curves(found, style),
        "reliability": {row.name: reliability_plot(style[row.name], _diagrams(row)) for row in found.rows},
        "stages": stages(found),
    }


def laid_out(made: Table) -> dict[str, Any]:
    """A table's heads and texts; a cell is (text, is the best)."""
    best = [made.best(i) for i in range(len(made.columns))]
    rows = [
        (
            name,
            [
                (show(cell, column.unit), cell is not None and cell.mean == best[i])
                for i, (cell, column) in enumerate(zip(row, made.columns, strict=True))
            ],
        )
        for name, row in made.rows
    ]
    return {"title": made.title, "heads": [column.name for column in made.columns], "rows": rows}


def paretos(found: Comparison, style: Mapping[str, Series]) -> dict[str, Markup]:
    """Title -> accuracy against training cost: corrupted, on shifts, and under the widest attack, where known."""
    unit = "gpu_seconds" if all(_cost(run, "gpu_seconds") for run in found.runs if run.costs) else "cpu_seconds"
    across = f"training after the original, {unit[:3].upper()}-seconds"
    measures: dict[str, Of] = {"corrupted accuracy, %": lambda r, a: a.accuracy.corrupted}
    for column in shift_columns(found.runs, lambda on: on.accuracy, 1):
        if column.name == MEAN:
            measures["accuracy on shifts, mean, %"] = column.of
    for norm, eps in _radii(found.runs):
        measures[f"robust accuracy, {radius(norm, eps)}, %"] = robust(norm, eps)
    plots = {}
    for title, of in measures.items():
        points = {}
        reference = None
        for row in found.rows:
            x, y = spread(row.values(lambda r, a: cost(r, a, unit))), spread(row.values(of))
            if y is not None and x is not None and x.mean > 0:
                points[style[row.name]] = (x, y)
            elif y is not None and row.name == "original":
                reference = y.mean
        if len(points) > 1:
            numbers = [list(style.values()).index(one) + 1 for one in points]
            plots[title] = drawn.pareto(points, numbers, across, title, reference)
    return plots


def corruption_bars(found: Comparison, style: Mapping[str, Series]) -> dict[str, Markup]:
    """Corruption -> a bar a row: accuracy, mean over severities."""

    def mean(kind: str) -> Of:
        return lambda r, a: float(np.mean(r.corruptions[kind].accuracy[a.name]))

    return {
        kind: drawn.bars(
            {style[row.name]: spread(row.values(mean(kind))) for row in found.rows},
            f"Accuracy under {kind.replace('_', ' ')} by row",
        )
        for kind in found.runs[0].corruptions
    }


def curves(found: Comparison, style: Mapping[str, Series]) -> dict[str, Markup]:
    """Norm -> robust accuracy (under the attack that leaves least) against the radius, where results hold attacks."""
    plots: dict[str, Markup] = {}
    for norm in sorted({run.attacks.norm for run in found.runs if run.attacks}):
        radii = [0.0, *(eps for each, eps in _radii(found.runs, every=True) if each == norm)]
        lines: dict[Series, dict[float, Spread]] = {}
        for row in found.rows:
            line = {eps: at for eps in radii if (at := spread(row.values(robust(norm, eps)))) is not None}
            if len(line) > 1:
                lines[style[row.name]] = line
        if lines:
            name = "Linf" if norm == "linf" else "L2"
            plots[norm] = drawn.radius_lines(lines, f"{name} radius", f"Robust accuracy by {name} radius")
    return plots


def stages(found: Comparison) -> dict[str, Any]:
    """The training cost of every stage of every row, by stage."""
    key = "gpu_seconds" if any(_cost(run, "gpu_seconds") for run in found.runs) else "cpu_seconds"
    rows = [row for row in found.rows if row.answerer is None and any(run.costs for run in row.runs)]
    names = list(dict.fromkeys(stage for row in rows for run in row.runs for stage in run.costs))

    def of(stage: str) -> Of:
        return lambda r, a: float(r.costs[stage].get(key) or 0) if stage in r.costs else None

    cells = [(row.name, [show(spread(row.values(of(stage))), "seconds") for stage in names]) for row in rows]
    return {"unit": f"{key[:3].upper()}-seconds", "heads": names, "rows": cells}


def _radii(runs: Sequence[Results], every: bool = False) -> list[tuple[str, float]]:
    """(norm, radius) of the attacks; every: of those of the curves too."""
    found = set()
    for run in runs:
        if run.attacks:
            found |= {(run.attacks.norm, row.eps) for row in run.attacks.rows if every or row.eps == run.attacks.eps}
    return sorted(each for each in found if each[1] > 0)


def _diagrams(row: Row) -> Diagrams:
    names = [run.default.name if row.answerer is None else row.answerer for run in row.runs]
    return drawn.pooled([run.reliability[name] for run, name in zip(row.runs, names, strict=True)])


def _cost(run: Results, key: str) -> float:
    return sum(float(stage.get(key) or 0) for stage in run.costs.values())

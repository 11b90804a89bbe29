"""What a study found: a table of rows and measures, mean and spread over seeds, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trivium.runtime.errors import ConfigError

from ..evaluation.results import Results
from ..evaluation.summary import Spread, show, spread
from .study import Job, Study

ORIGINAL, DEFAULT = "original", "default router"
Measure = Callable[[Results, str], float | None]
Table = dict[str, dict[str, Spread]]
"""Row -> measure -> spread over the seeds; a measure that a row lacks is left out."""

MEASURES: dict[str, Measure] = {
    "clean": lambda r, a: r.answerer(a).accuracy.clean,
    "mCA": lambda r, a: r.answerer(a).accuracy.corrupted,
    "ECE clean": lambda r, a: r.answerer(a).ece.clean,
    "ECE corrupted": lambda r, a: r.answerer(a).ece.corrupted,
    "negative flips": lambda r, a: _of(r.answerer(a).negative_flips, "clean"),
    "flips corrupted": lambda r, a: _of(r.answerer(a).negative_flips, "corrupted"),
    "acc. at 80 %": lambda r, a: r.answerer(a).accuracy_at_80.corrupted,
}
"""Name -> a share of one answerer, which every study has."""
ATTACKS = {"pgd": "PGD-20", "autoattack": "AutoAttack"}
"""Attack -> column, for rows that were attacked."""
COST = "CPU s"
"""Of all stages but the original's."""
DIFFERENCES = {
    "gate_over_head": "the better head",
    "gate_over_ensemble": "the better ensemble",
    "gate_over_control": "the better gate that sees one head alone",
}
"""Of studies.trade_off."""
EXPLAINED_TRADE_OFF = (
    "A clean and an adversarially trained head meet Fashion-MNIST, each picture once as it is and once attacked by PGD "
    "through a network that is none of these; the gate was fitted on pictures attacked through another one. % right, "
    "mean ± standard deviation over seeds. mixture: both, half and half. own attack: pictures attacked for this very "
    "row, with masks, temperatures and rule known."
)
EXPLAINED = (
    "% but for the cost; mean ± standard deviation over seeds {seeds}. mCA: mean accuracy over the corruptions that "
    "neither training nor calibration saw, five severities each. Flips: pictures that the original got right and the "
    "row gets wrong. ECE: expected calibration error. Acc. at 80 %: of the surest 80 % of the corrupted pictures. "
    "AutoAttack is tried where PGD leaves more than 5 %. CPU s: of training all that a row needs but its original. "
    "†: training drew views of this very kind."
)


def tabulate(study: Study, jobs: Sequence[Job]) -> Table:
    """The table of a study's finished runs. Rows of which some seed is missing are left out.

    Raises: ConfigError where a row names an answerer that its runs do not have.
    """
    table: Table = {}
    known = {(job.row.name, job.seed): run for job in jobs if (run := job.results()) is not None}
    for row in study.rows:
        found = [known[row.name, seed] for seed in study.seeds if (row.name, seed) in known]
        if len(found) < len(study.seeds):
            continue
        parts = [[known.get((name, seed)) for name in (row.name, *row.charged)] for seed in study.seeds]
        costs = [None if None in each else sum(_cost(run) for run in each if run is not None) for each in parts]
        for title, name in (row.answerers or {row.title: DEFAULT}).items():
            table[title] = _measured(study, found, title, name)
            if name != ORIGINAL and (cost := spread(costs)):
                table[title][COST] = cost
    return table


def seen(study: Study, jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Row -> the columns of shifts of which training drew views, for rows where there are any."""
    found: dict[str, list[str]] = {}
    for row in study.rows:
        run = next((run for job in jobs if job.row is row and (run := job.results()) is not None), None)
        if run is not None and (columns := [name for name, kinds in study.shifts.items() if _seen(run, kinds)]):
            found |= dict.fromkeys(row.answerers or [row.title], columns)
    return found


def compare(study: Study, table: Table) -> list[dict[str, Any]]:
    """The study's comparisons of two rows, seed by seed: what is asked, mean, deviation and values."""
    rows = []
    for each in study.comparisons:
        pair = [table.get(title, {}).get(each.measure) for title in (each.row, each.against)]
        if pair[0] is None or pair[1] is None:
            continue
        own, other = (np.array(side.values) for side in pair if side is not None)
        values = own / other if each.kind == "ratio" else own - other
        found = spread(values.tolist())
        assert found is not None
        rows.append({**each.model_dump(), **found._asdict()})
    return rows


def document(
    studies: Mapping[str, tuple[Study, Sequence[Job]]], trade_off: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything, as plain JSON. trade_off: what studies.trade_off wrote."""
    found: dict[str, Any] = {"format": "trivium-studies", "schema_version": 1, "studies": {}, "trade_off": trade_off}
    for name, (study, jobs) in studies.items():
        table = tabulate(study, jobs)
        results = [run for job in jobs if (run := job.results()) is not None]
        if not results:
            continue
        first = results[0]
        found["studies"][name] = {
            "title": study.title,
            "seeds": list(study.seeds),
            "data": first.data.model_dump(),
            "versions": first.versions,
            "left_out": first.left_out,
            "rows": {
                title: {measure: found._asdict() for measure, found in row.items()} for title, row in table.items()
            },
            "seen": {title: columns for title, columns in seen(study, jobs).items() if title in table},
            "unfinished": [row.title for row in study.rows if not set(row.answerers or [row.title]) & set(table)],
            "comparisons": compare(study, table),
            "reading": study.reading,
        }
    return found


def page(document: Mapping[str, Any]) -> str:
    """RESULTS.md from RESULTS.json."""
    lines = ["# What the methods are worth", ""]
    lines += ["Printed by `make evaluate`, from RESULTS.json. Whatever came out stands here.", ""]
    for found in document["studies"].values():
        data, rows = found["data"], found["rows"]
        measures = _in_order(measure for row in rows.values() for measure in row)
        seeds = ", ".join(map(str, found["seeds"]))
        lines += [f"## {found['title']}", ""]
        lines += [
            f"{data['pictures']} test pictures of {data['source']}, {data['corrupted']} of them corrupted. "
            + EXPLAINED.format(seeds=seeds),
            "",
            "| | " + " | ".join(measures) + " |",
            "|---|" + "---:|" * len(measures),
        ]
        for title, row in rows.items():
            cells = [_cell(measure, row[measure]) if measure in row else "" for measure in measures]
            marks = [" †" if measure in found["seen"].get(title, ()) else "" for measure in measures]
            lines.append(f"| {title} | " + " | ".join(map(str.__add__, cells, marks)) + " |")
        lines.append("")
        if found["unfinished"]:
            lines += [f"Not finished, so not here: {', '.join(found['unfinished'])}.", ""]
        for each in found["comparisons"]:
            lines.append(f"- {each['row']} against {each['against']}, {each['measure']}: {_compared(each)}")
        lines += ["", found["reading"].strip(), ""] if found["reading"] else [""]
    if document["trade_off"]:
        lines += _trade_off(document["trade_off"])
    return "\n".join(lines).rstrip() + "\n"


def _in_order(measures: Iterable[str]) -> list[str]:
    last = [*ATTACKS.values(), COST]
    return sorted(dict.fromkeys(measures), key=lambda name: last.index(name) + 1 if name in last else 0)


def _trade_off(found: Mapping[str, Any]) -> list[str]:
    columns = list(dict.fromkeys(column for row in found["rows"].values() for column in row))
    lines = ["## Heads that truly trade off", "", f"Linf {found['eps']:.3f}. {EXPLAINED_TRADE_OFF}", ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for title, row in found["rows"].items():
        cells = [show(_spread(row[column]), "share") if column in row else "" for column in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, title in DIFFERENCES.items():
        each = found["differences"][name]
        sure = sum(low > 0 for _, low, _ in each["intervals"])
        lines.append(
            f"- gate over {title}: {show(_spread(each), 'points')} points, above 0 with its 95 % interval in {sure} of "
            f"{len(each['values'])} seeds"
        )
    share = show(_spread(found["share_of_gap"]), "share")
    return [*lines, f"- share of the gap between the best head and the oracle: {share} %", ""]


def write(document: Mapping[str, Any], results: Path | None, markdown: Path | None) -> None:
    """RESULTS.json and RESULTS.md where they are asked for.

    Raises: ConfigError where a file cannot be written.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    try:
        if results is not None:
            results.write_text(text, encoding="utf-8")
        if markdown is not None:
            markdown.write_text(page(document), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None


def _measured(study: Study, runs: Sequence[Results], title: str, name: str) -> dict[str, Spread]:
    names = [run.model.default_router if name == DEFAULT else name for run in runs]
    for run, answerer in zip(runs, names, strict=True):
        if answerer not in {each.name for each in run.answerers}:
            known = ", ".join(each.name for each in run.answerers)
            raise ConfigError(f"study {study.name}: {title}: no answerer {answerer!r} in {run.model.path}: {known}")
    pairs = list(zip(runs, names, strict=True))
    columns: dict[str, Measure] = {**MEASURES}
    for column, kinds in study.shifts.items():
        columns[column] = lambda run, answerer, kinds=kinds: _on_shifts(run, answerer, kinds)  # type: ignore[misc]
    for attack, column in ATTACKS.items():
        columns[column] = lambda run, answerer, attack=attack: _attacked(run, answerer, attack)  # type: ignore[misc]
    return {measure: found for measure, of in columns.items() if (found := spread([of(*pair) for pair in pairs]))}


def _on_shifts(run: Results, answerer: str, kinds: Sequence[str]) -> float | None:
    found = [run.shifts[kind].answerers[answerer].accuracy for kind in kinds if kind in run.shifts]
    return float(np.mean(found)) if len(found) == len(kinds) else None


def _seen(run: Results, kinds: Sequence[str]) -> bool:
    return any(kind in run.shifts and not run.shifts[kind].counted for kind in kinds)


def _attacked(run: Results, answerer: str, attack: str) -> float | None:
    if run.attacks is None:
        return None
    wanted = (answerer, attack, run.attacks.eps)
    return next((row.accuracy for row in run.attacks.rows if (row.answerer, row.attack, row.eps) == wanted), None)


def _cost(run: Results) -> float:
    return sum(cost["cpu_seconds"] for stage, cost in run.costs.items() if stage != ORIGINAL)


def _of(two: Any, part: str) -> float | None:
    return None if two is None else getattr(two, part)


def _cell(measure: str, found: Mapping[str, Any]) -> str:
    return show(_spread(found), "seconds" if measure == COST else "share")


def _compared(each: Mapping[str, Any]) -> str:
    if each["kind"] == "difference":
        return f"{show(_spread(each), 'points')} points"
    return f"{each['mean']:.3f}" + ("" if each["deviation"] is None else f" ± {each['deviation']:.3f}") + " times"


def _spread(found: Mapping[str, Any]) -> Spread:
    return Spread(found["mean"], found["deviation"], found["values"])

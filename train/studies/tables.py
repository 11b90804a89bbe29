"""What a study found: a table of rows and measures, mean and spread over seeds, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trivium.runtime.errors import ConfigError

from ..evaluation.columns import Of, cost, robust
from ..evaluation.results import Answerer, Results, Two
from ..evaluation.summary import Spread, grid, show, spread
from .study import Job, Study

DEFAULT = "default router"
Runs = Mapping[tuple[str, int], Results]
"""(name of a row, seed) -> what a finished run found."""
Table = dict[str, dict[str, Spread]]
"""Row -> measure -> spread over the seeds; a measure that a row lacks is left out."""

MEASURES: dict[str, Of] = {
    "clean": lambda r, a: a.accuracy.clean,
    "mCA": lambda r, a: a.accuracy.corrupted,
    "ECE clean": lambda r, a: a.ece.clean,
    "ECE corrupted": lambda r, a: a.ece.corrupted,
    "negative flips": lambda r, a: _of(a.negative_flips, "clean"),
    "flips corrupted": lambda r, a: _of(a.negative_flips, "corrupted"),
    "acc. at 80 %": lambda r, a: a.accuracy_at_80.corrupted,
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
    "AutoAttack: of rows that keep more than 5 % under PGD. CPU s: of training all that a row needs but its original. "
    "†: training drew views of this very kind."
)


def finished(jobs: Sequence[Job]) -> dict[tuple[str, int], Results]:
    """What the jobs that are done have found."""
    return {(job.row.name, job.seed): run for job in jobs if (run := job.results()) is not None}


def tabulate(study: Study, runs: Runs) -> Table:
    """The table of a study's finished runs. Rows of which some seed is missing are left out.

    Raises: ConfigError where a row names an answerer that its runs do not have.
    """
    table: Table = {}
    for row in study.rows:
        if any((row.name, seed) not in runs for seed in study.seeds):
            continue
        own = [runs[row.name, seed] for seed in study.seeds]
        parts = [[runs.get((name, seed)) for name in (row.name, *row.charged)] for seed in study.seeds]
        costs = [None if None in each else sum(_cost(run) for run in each if run is not None) for each in parts]
        for title, name in (row.answerers or {row.title: DEFAULT}).items():
            pairs = [(run, _answerer(study, run, title, name)) for run in own]
            columns = _columns(study).items()
            table[title] = {name: cell for name, of in columns if (cell := spread([of(*pair) for pair in pairs]))}
            if pairs[0][1].role != "original" and (total := spread(costs)):
                table[title][COST] = total
    return table


def spent(runs: Runs) -> float:
    """CPU seconds of all runs: of training, a stage that several runs share counted once, and of evaluation."""
    stages = {
        (seed, stage, cost["cpu_seconds"]) for (_, seed), run in runs.items() for stage, cost in run.costs.items()
    }
    evaluated = sum(run.cpu_seconds + (run.attacks.cpu_seconds if run.attacks else 0) for run in runs.values())
    return sum(seconds for *_, seconds in stages) + evaluated


def seen(study: Study, runs: Runs) -> dict[str, list[str]]:
    """Row -> the columns of shifts of which training drew views, for rows where there are any."""
    found: dict[str, list[str]] = {}
    for row in study.rows:
        run = next((runs[row.name, seed] for seed in study.seeds if (row.name, seed) in runs), None)
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
        runs = finished(jobs)
        if not runs:
            continue
        table, first = tabulate(study, runs), next(iter(runs.values()))
        found["studies"][name] = {
            "title": study.title,
            "seeds": list(study.seeds),
            "data": first.data.model_dump(),
            "versions": first.versions,
            "left_out": first.left_out,
            "cpu_seconds": round(spent(runs)),
            "rows": {
                title: {measure: found._asdict() for measure, found in row.items()} for title, row in table.items()
            },
            "seen": {title: columns for title, columns in seen(study, runs).items() if title in table},
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
            f"All runs together: {found['cpu_seconds']:,} CPU-seconds of training and evaluation; a stage that several "
            "share counts once, the start of processes not at all.",
            "",
        ]
        cells = {}
        for title, row in rows.items():
            marks = [" †" if measure in found["seen"].get(title, ()) else "" for measure in measures]
            plain = [_cell(measure, row[measure]) if measure in row else "" for measure in measures]
            cells[title] = [*map(str.__add__, plain, marks)]
        lines += [*grid(measures, cells, "---:"), ""]
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
    cells = {
        title: [show(_spread(row[column]), "share") if column in row else "" for column in columns]
        for title, row in found["rows"].items()
    }
    lines += [*grid(columns, cells, "---:"), ""]
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


def _answerer(study: Study, run: Results, title: str, name: str) -> Answerer:
    if name == DEFAULT:
        return run.default
    found = next((each for each in run.answerers if each.name == name), None)
    if found is None:
        known = ", ".join(each.name for each in run.answerers)
        raise ConfigError(f"study {study.name}: {title}: no answerer {name!r} in {run.model.path}: {known}")
    return found


def _columns(study: Study) -> dict[str, Of]:
    shifts = {column: _on_shifts(kinds) for column, kinds in study.shifts.items()}
    return {**MEASURES, **shifts, **{column: _under(attack) for attack, column in ATTACKS.items()}}


def _on_shifts(kinds: Sequence[str]) -> Of:
    def mean(run: Results, answerer: Answerer) -> float | None:
        found = [run.shifts[kind].answerers[answerer.name].accuracy for kind in kinds if kind in run.shifts]
        return float(np.mean(found)) if len(found) == len(kinds) else None

    return mean


def _under(attack: str) -> Of:
    """Accuracy at the radius that was asked for."""
    return lambda run, a: robust(run.attacks.norm, run.attacks.eps, attack)(run, a) if run.attacks else None


def _seen(run: Results, kinds: Sequence[str]) -> bool:
    return any(kind in run.shifts and not run.shifts[kind].counted for kind in kinds)


def _cost(run: Results) -> float:
    trained = next(each for each in run.answerers if each.role != "original")
    return cost(run, trained, "cpu_seconds") or 0.0


def _of(two: Two | None, part: str) -> float | None:
    return None if two is None else getattr(two, part)


def _cell(measure: str, found: Mapping[str, Any]) -> str:
    return show(_spread(found), "seconds" if measure == COST else "share")


def _compared(each: Mapping[str, Any]) -> str:
    if each["kind"] == "difference":
        return f"{show(_spread(each), 'points')} points"
    return f"{each['mean']:.3f}" + ("" if each["deviation"] is None else f" ± {each['deviation']:.3f}") + " times"


def _spread(found: Mapping[str, Any]) -> Spread:
    return Spread(found["mean"], found["deviation"], found["values"])

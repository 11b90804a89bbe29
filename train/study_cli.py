"""`trivium study`: train and evaluate every row of a study, then write its tables."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from trivium.runtime.cpus import usable_cpus
from trivium.runtime.errors import ClientError, ConfigError

from .studies import tables
from .studies.study import Job, carry_out, load_study, studies


def main() -> None:
    """Carry out studies as the command line says.

    Raises: TriviumError, which trivium.runtime.cli turns into one line.
    """
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description="Compare ways of training: every row of a study with every seed is a run of trivium train and "
        "trivium evaluate. What is finished is not repeated, what was interrupted goes on.",
    )
    parser.add_argument("studies", nargs="+", metavar="STUDY", help=f"{', '.join(studies())}, or a YAML file")
    parser.add_argument(
        "--out", type=Path, default=Path("studies"), metavar="DIR", help="of the runs (default: studies)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these, and those that they build on")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a core)")
    parser.add_argument("--no-runs", action="store_true", help="only write the tables of what is there")
    parser.add_argument(
        "--trade-off", type=Path, metavar="FILE.json", help="tables of python -m trivium.train.studies.trade_off, too"
    )
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="where the tables go")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="where they go as Markdown")
    given = parser.parse_args()
    if given.workers is not None and given.workers < 1:
        raise ConfigError(f"--workers {given.workers}: at least 1")
    console, found, jobs = Console(), {}, list[Job]()
    for source in given.studies:
        study = load_study(source)
        if given.seeds:
            study = study.model_copy(update={"seeds": tuple(given.seeds)})
        study = study.only(given.rows) if given.rows else study
        own = [Job(study, row, seed, given.out) for row in study.rows for seed in study.seeds]
        found[study.name] = (study, own)
        jobs += own
    # so that the runs under way are told to stop too
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    failures = [] if given.no_runs else carry_out(jobs, given.workers or usable_cpus(), console)
    document = tables.document(found, read_trade_off(given.trade_off) if given.trade_off else None)
    tables.write(document, given.results, given.page)
    console.print(tables.page(document), markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise ClientError(f"{len(failures)} runs failed, the first: {failures[0]}")


def read_trade_off(path: Path) -> dict[str, Any]:
    """Raises: ConfigError where it is not what studies.trade_off wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'no valid JSON'}") from None
    if not isinstance(found, dict) or found.get("format") != "trivium-trade-off":
        raise ConfigError(f"{path}: not the results of trivium.train.studies.trade_off")
    return found

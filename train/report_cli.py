"""`trivium report`: compare finished evaluations on one page, in Markdown, or as JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from trivium.runtime.errors import ConfigError

from .evaluation.overview import render
from .evaluation.summary import compare, document, markdown, read_runs


def main() -> None:
    """Compare as the command line says."""
    given = parser().parse_args()
    comparisons = compare(read_runs(given.runs))
    command = shlex.join(["trivium", "report", *sys.argv[1:]])
    written = {given.out: render(comparisons, command)}
    if given.json:
        written[given.json] = json.dumps(document(comparisons), indent=1, ensure_ascii=False) + "\n"
    if given.markdown and str(given.markdown) != "-":
        written[given.markdown] = markdown(comparisons)
    for path, text in written.items():
        write(path, text)
    if str(given.markdown) == "-":
        print(markdown(comparisons))
        return
    for path in written:
        Console().print(str(path), highlight=False, soft_wrap=True)


def write(path: Path, text: str) -> None:
    """Raises: ConfigError in one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=sys.argv[0], description=(
        "Compare evaluations: one HTML page with tables (mean and spread over seeds), accuracy against training cost, "
        "bars by corruption, accuracy by attack radius, reliability. Runs of one name are seeds of one method."
    ))  # fmt: skip
    p.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="a results.json, a directory with some in it or below, or NAME=PATH to name the row (default: the model's "
        "name, which is its recipe's)",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, metavar="FILE", default="report.html", help="the HTML page (default: report.html)"
    )
    p.add_argument("--markdown", type=Path, metavar="FILE", help="the tables in Markdown too; - prints them")
    p.add_argument("--json", type=Path, metavar="FILE", help="the tables as JSON too, with the values of every seed")
    return p

"""`trivium feedback`: accuracy, coverage and risk of a server's answers, once labels are there."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from .bundle import open_bundle
from .errors import ConfigError
from .feedback import Measure, Report, Window, join, read_answers, read_labels

BROKEN = 3
"""Exit status where a promise was broken."""
DAY = 86400.0
WIDTH = 200
"""Columns where the output goes into a file or a pipe."""
NAMES: dict[Measure, str] = {
    "accuracy": "accuracy",
    "coverage": "sets hold the label",
    "risk": "errors among answers",
}


def show(report: Report, confidence: float) -> None:
    """Print a report for a person."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    table = Table("from", "model", "", "promise", "pictures", "share", "interval", "", box=None, pad_edge=False)
    for window in [Window("in all", report.rows), *report.windows]:
        start = window.start
        for row in window.rows:
            more = f"{row.size:.2f} classes a set" if row.size is not None else ""
            more = f"{100 * row.answered:.1f} % answered" if row.answered is not None else more
            bound = "" if row.promise is None else f"{'≥' if row.measure == 'coverage' else '≤'} {row.promise:g}"
            table.add_row(
                start,
                f"{row.model}/{row.version}",
                NAMES[row.measure],
                bound,
                str(row.pictures),
                "–" if row.share is None else f"{row.share:.4f}",
                f"{row.low:.4f} to {row.high:.4f}",
                Text("BROKEN", "bold red") if row.broken else Text(more, "dim"),
            )
            start = ""
    console.print(table)
    console.print(
        f"{report.labelled} pictures with answer and label; {report.without_answer} labels without an answer, "
        f"{report.ambiguous} of ids that differing answers share, {report.without_label} answers without a label; "
        f"{100 * confidence:g} % intervals"
    )


def main() -> None:
    """Join, measure, print; exit status BROKEN where a promise was broken.

    Raises: ConfigError, BundleError.
    """
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description="Compare a server's answers with labels that came later: accuracy, coverage of the prediction "
        "sets, errors among the pictures answered, with exact binomial intervals.",
        epilog="exit status: 0 where every promise lies within its interval or on its better side, "
        f"{BROKEN} where one was broken over all of the time, 2 for wrong use",
    )
    parser.add_argument(
        "--answers", type=Path, nargs="+", required=True, metavar="LOG",
        help="what `trivium serve --access-log --log-format json` wrote to stderr",
    )  # fmt: skip
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="JSONL",
        help='lines of {"id": request id, "label": class}; of several pictures "index" too, or "labels": [...]',
    )  # fmt: skip
    parser.add_argument("--bundle", type=Path, help="whose classes the labels' names are, if they are no numbers")
    parser.add_argument(
        "--window",
        type=float,
        default=DAY,
        metavar="SECONDS",
        help="length of the rows over time (default a day); 0: none",
    )
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (default 0.95)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    if not 0 < arguments.confidence < 1:
        raise ConfigError(f"--confidence must lie between 0 and 1, got {arguments.confidence:g}")
    if not (arguments.window == 0 or 1 <= arguments.window < 1e10):
        raise ConfigError(f"--window must be 0, or a second or more, got {arguments.window:g}")
    classes = open_bundle(arguments.bundle).manifest.classes if arguments.bundle else None
    labels = read_labels(arguments.labels, classes)
    report = join(read_answers(arguments.answers), labels, arguments.confidence, arguments.window)
    if arguments.json:
        print(json.dumps({"confidence": arguments.confidence, "broken": report.broken, **asdict(report)}))
    else:
        show(report, arguments.confidence)
    if report.broken:
        raise SystemExit(BROKEN)

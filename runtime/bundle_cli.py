"""`trivium bundle`: show what a bundle holds, verify that it is whole, print the manifest's JSON Schema."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .bundle import Bundle, Manifest, json_schema, open_bundle, printable
from .engine import Engine
from .errors import EngineError, MissingExtra
from .router import routers

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 200
"""Columns where the output goes into a file or a pipe."""


def main() -> None:
    """Run one of the subcommands show, verify and schema."""
    parser = argparse.ArgumentParser(prog=sys.argv[0], description="Look into a bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    show_parser = commands.add_parser("show", help="what the bundle holds, and why its router was chosen")
    show_parser.add_argument("bundle", metavar="BUNDLE")
    verify_parser = commands.add_parser("verify", help="check every file; exit status 0 where all is well")
    verify_parser.add_argument("bundle", metavar="BUNDLE")
    verify_parser.add_argument("--run", action="store_true", help="load the model too and repeat its golden answers")
    commands.add_parser("schema", help="the manifest's JSON Schema")
    arguments = parser.parse_args()

    if arguments.command == "schema":
        print(json.dumps(json_schema(), indent=2))
    elif arguments.command == "show":
        show(open_bundle(arguments.bundle))
    else:
        bundle = open_bundle(arguments.bundle)
        if arguments.run:
            Engine(bundle).self_test()
        files = len(bundle.manifest.files)
        golden = " and the golden answers repeat" if arguments.run and bundle.golden_path else ""
        print(f"{arguments.bundle}: whole: {files} files, digests as in the manifest{golden}")


def show(bundle: Bundle) -> None:
    """Print a verified bundle's contents for a person."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(bundle):
        facts.add_row(name, Text(printable(value)))
    console.print(facts)
    calibration = bundle.manifest.calibration
    if calibration is not None and calibration.routers:
        console.print("\nrouters compared")
        console.print(_table(calibration.routers))
    if bundle.manifest.tolerances:
        console.print("\nlargest differences measured at export")
        console.print(_table([{"between": k, "difference": v} for k, v in bundle.manifest.tolerances.items()]))
    console.print("\nfiles")
    console.print(_table([file.model_dump() for file in bundle.manifest.files]))


def _facts(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    preprocessing, dropout = manifest.preprocessing, manifest.dropout
    yield "name", f"{manifest.name}, version {manifest.version}"
    shown = ", ".join(manifest.classes[:10]) + (", ..." if len(manifest.classes) > 10 else "")
    yield "classes", f"{len(manifest.classes)}: {shown}"
    yield "heads", ", ".join(manifest.heads)
    resize = "" if preprocessing.resize is None else f", from {preprocessing.resize} on the shorter side"
    yield "pictures", f"{preprocessing.height} x {preprocessing.width} RGB{resize}, {preprocessing.interpolation}"
    yield "dropout", f"{dropout.passes} passes at rate {dropout.rate:g}, seed {dropout.seed}"
    yield "router", _router(manifest)
    yield "routers", ", ".join(routers(manifest))
    if manifest.calibration is not None:
        mixture = ", ".join(f"{share:.3g} {name}" for name, share in manifest.calibration.mixture.items())
        temperatures = ", ".join(f"{head} {t:.3g}" for head, t in manifest.calibration.temperature.items())
        yield "calibrated on", f"{manifest.calibration.pictures} pictures of {manifest.calibration.data}: {mixture}"
        yield "temperatures", temperatures
    try:
        engine = Engine(bundle)
        yield "kernel", f"{engine.kernels}: {engine.kernels_reason}"
    except (EngineError, MissingExtra) as error:
        yield "kernel", f"none would run: {error}"
    source = {key: value for key, value in manifest.provenance.items() if isinstance(value, str)}
    if source:
        yield "made from", ", ".join(f"{key} {value[:60]}" for key, value in source.items())
    packages = manifest.provenance.get("packages")
    if isinstance(packages, dict):
        yield "made with", ", ".join(f"{name} {version}" for name, version in packages.items())
    costs = manifest.training.get("costs")
    if isinstance(costs, dict):
        seconds = {stage: cost.get("cpu_seconds") for stage, cost in costs.items() if isinstance(cost, dict)}
        yield "training", ", ".join(f"{stage} {s:.0f} CPU-s" for stage, s in seconds.items() if isinstance(s, float))


def _router(manifest: Manifest) -> str:
    reason = manifest.calibration.chosen_because if manifest.calibration is not None else "not calibrated"
    return f"{manifest.router.default} ({reason})"


def _table(records: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(name for record in records for name in record))
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(Text(printable(name)))
    for record in records:
        table.add_row(*(Text(printable(_cell(record.get(name))), overflow="fold") for name in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)

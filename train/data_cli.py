"""`trivium data`: obtain Fashion-MNIST or the emoji renditions, or count what a data set holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trivium.runtime.errors import ConfigError

from .data import fashion_mnist, renditions
from .data.pictures import open_splits, parse_spec
from .data.sources import SPLITS

SHOWN = 20
"""Skipped files named one by one; the rest is counted."""


def main() -> None:
    """Run `trivium data`."""
    parser = argparse.ArgumentParser(prog=sys.argv[0], description="Obtain or inspect a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    obtain = commands.add_parser("fashion-mnist", help="obtain Fashion-MNIST (31 MB) unless it is there already")
    obtain.add_argument("--out", type=Path, help=f"directory (default {fashion_mnist.cache_directory()}/fashion-mnist)")
    drawn = commands.add_parser(
        "renditions", help="make the emoji-renditions data set: 11 styles, fetched by npm (54 MB), drawn by resvg"
    )
    drawn.add_argument("--out", type=Path, help=f"directory (default {renditions.default_directory()})")
    drawn.add_argument(
        "--from", dest="source", type=Path, metavar="DIR", help="npm tarballs or folders, instead of fetching them"
    )
    drawn.add_argument("--size", type=int, default=96, help="of the pictures, in pixels (default 96)")
    drawn.add_argument("--seed", type=int, default=0, help="of the split of things into parts (default 0)")
    check = commands.add_parser("check", help="pictures per class and split, and the files that are none")
    check.add_argument(
        "data",
        help="fashion-mnist, renditions, digits, a directory of class folders or of a Hugging Face dataset, a .csv "
        "manifest, or a pattern of .tar shards",
    )
    check.add_argument("--seed", type=int, default=0, help="of the splits (default 0)")
    check.add_argument("--strict", action="store_true", help="fail where a file is unreadable")
    arguments = parser.parse_args()
    if arguments.command == "fashion-mnist":
        fashion_mnist.obtain(arguments.out)
    elif arguments.command == "renditions":
        if not 8 <= arguments.size <= 1024:
            raise ConfigError(f"--size {arguments.size}: 8 to 1024 pixels")
        renditions.obtain(arguments.out, arguments.source, size=arguments.size, seed=arguments.seed)
    else:
        report(arguments.data, arguments.seed, arguments.strict, Console())


def report(data: str, seed: int, strict: bool, console: Console) -> None:
    """Print the table of counts and the skipped files.

    Raises: ConfigError where the data cannot be used, or (strict) a file was skipped.
    """
    source, parts = open_splits(parse_spec(data, seed=seed))
    table = Table(title=escape(source.name))
    table.add_column("class")
    counts = []
    for split in SPLITS:
        drawn = "" if split in source.parts else " (held out by seed)"
        table.add_column(f"{split}{drawn}", justify="right")
        counts.append(np.bincount(parts[split].labels, minlength=len(source.classes)))
    for row, name in enumerate(source.classes):
        table.add_row(escape(name), *(str(count[row]) for count in counts))
    table.add_section()
    table.add_row("all", *(str(count.sum()) for count in counts))
    console.print(table)
    for path, reason in source.skipped[:SHOWN]:
        console.print(f"skipped {path}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if len(source.skipped) > SHOWN:
        console.print(f"... and {len(source.skipped) - SHOWN} more")
    console.print(f"{len(source.skipped)} unreadable files")
    if strict and source.skipped:
        raise ConfigError(f"{data}: {len(source.skipped)} unreadable files, strict accepts none")

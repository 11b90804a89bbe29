"""`trivium score`: answer many pictures offline, into Parquet files; SCORE.md says how to read them."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cli import positive
from .scoring import pool
from .scoring.work import PART_ROWS

THREADS = "OMP_NUM_THREADS"


def main() -> None:
    """Score what is not scored yet; exit status 1 where no picture at all could be read."""
    arguments = _arguments()
    with one_thread():
        if arguments.engine == "processes":
            pool.prepare()
        # not above: while the pool loads what every scoring process needs, this one loads what it needs itself
        from .scoring.run import run
    # all that is loaded stays to the end, which would look through it in vain
    gc.freeze()
    run(arguments)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have libraries that are loaded meanwhile, here and in the pool, start no threads, if the user does not say."""
    if THREADS in os.environ:
        yield
        return
    os.environ[THREADS] = "1"
    try:
        yield
    finally:
        del os.environ[THREADS]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description="Answer many pictures offline: numbered Parquet files with a row a picture. An interrupted run "
        "goes on when it is started again.",
    )
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument(
        "input", metavar="INPUT",
        help="a folder of pictures; a .parquet or .csv file with a column 'path'; WebDataset shards: a .tar file or a "
        "quoted pattern such as 'shards/{000..099}.tar'",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new, empty, or begun by this command")
    parser.add_argument("--root", metavar="DIR", type=Path, help="of a table's paths (default: the table's folder)")
    parser.add_argument("--router", metavar="NAME", help="a head's name or a rule; the model's own choice by default")
    parser.add_argument("--coverage", metavar="SHARE", type=float, help="of the prediction sets, say 0.95")
    parser.add_argument("--max-risk", metavar="SHARE", type=float, help="of error where no abstention is, say 0.05")
    parser.add_argument(
        "--engine", choices=["processes", "ray"], default="processes",
        help="processes of this machine, or actors of Ray Data on the cluster that RAY_ADDRESS names (default "
        "processes)",
    )  # fmt: skip
    parser.add_argument("--workers", metavar="N", type=positive, help="processes or actors (default: one a core)")
    parser.add_argument(
        "--part-rows", metavar="N", type=positive, help=f"pictures of an output file (default {PART_ROWS})"
    )
    return parser.parse_args()

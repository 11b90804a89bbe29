"""`trivium score`: answer many pictures offline, into Parquet files; SCORE.md says how to read them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .bundle import MANIFEST, Bundle, digest, open_bundle
from .cpus import usable_cpus
from .predict import positive
from .promises import terms
from .router import unknown_router
from .scoring import actors, pool
from .scoring.inputs import Input, open_input
from .scoring.parts import Parts, ScoredBundle, chunks
from .scoring.scorer import Chunk, Scored, Task

CHUNK = {"processes": 16, "ray": 64}
"""Pictures that a process or an actor takes at a time; Ray does more about each."""


def main() -> None:
    """Score what is not scored yet; exit status 1 where no picture at all could be read."""
    arguments = _arguments()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    bundle = open_bundle(arguments.bundle)
    described = _described(bundle, arguments)
    pictures = open_input(arguments.input, arguments.root)
    if arguments.engine == "ray":
        actors.load()  # a mistake is told before anything is written
    with closing(Parts(arguments.out, described, pictures, arguments.part_rows)) as parts:
        missing = parts.missing()
        left = sum(map(len, missing))
        if left < len(pictures):
            console.print(f"{len(pictures) - left} of {len(pictures)} pictures were scored before")
        work = (
            Chunk(rows.start, pictures.rows(rows.start, rows.stop)) for rows in chunks(missing, CHUNK[arguments.engine])
        )
        task = Task(
            str(bundle.path.absolute()), described.digest, described.router, described.coverage, described.max_risk
        )
        if left:
            count(work, left, task, arguments.workers, arguments.engine, parts, console)
        parts.finish()
        print_end(parts, pictures, console)
        if parts.unreadable == len(pictures):
            raise SystemExit(1)


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
        "--part-rows", metavar="N", type=positive, help=f"pictures of an output file (default {Parts.PART_ROWS})"
    )
    return parser.parse_args()


def count(
    work: Iterator[Chunk], left: int, task: Task, workers: int | None, engine: str, parts: Parts, console: Console
) -> None:
    """Score the chunks, show how far it is, write the parts, and say what it took."""
    began = perf_counter()
    decode = compute = 0.0
    total: dict[str, float] = {}
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        shown = bar.add_task("", total=left, speed="")
        done = 0
        for scored in answers(work, task, workers, engine, console):
            parts.add(scored)
            done += len(scored.rows)
            decode, compute = decode + scored.decode, compute + scored.compute
            total[scored.process] = scored.total
            bar.update(shown, completed=done, speed=f"{done / (perf_counter() - began):.0f}/s")
    seconds = perf_counter() - began
    rest = max(0.0, sum(total.values()) - decode - compute)
    by = f"{len(total)} {'actors' if engine == 'ray' else 'processes'}"
    console.print(
        f"{done} pictures in {seconds:.1f} s, {done / seconds:.0f} a second, by {by}; CPU-s: {decode:.1f} reading and "
        f"decoding, {compute:.1f} engine, {rest:.1f} start and all else"
    )


def answers(work: Iterator[Chunk], task: Task, workers: int | None, engine: str, console: Console) -> Iterator[Scored]:
    """Scored chunks, in any order."""
    if engine == "ray":
        return actors.scored(work, task, workers)
    return pool.scored(work, task, workers or usable_cpus(), console.print)


def print_end(parts: Parts, pictures: Input, console: Console) -> None:
    """What is there now."""
    unreadable = f", {parts.unreadable} of them without an answer (column error)" if parts.unreadable else ""
    console.print(f"{parts.out}: {len(pictures)} pictures{unreadable}")


def _described(bundle: Bundle, arguments: argparse.Namespace) -> ScoredBundle:
    manifest = bundle.manifest
    if arguments.router not in (None, *manifest.routers()):
        raise unknown_router(arguments.router, manifest.routers())
    router = arguments.router or manifest.router.default
    return ScoredBundle(
        path=str(bundle.path),
        name=manifest.name,
        version=manifest.version,
        digest=digest(bundle.path / MANIFEST),
        router=router,
        guarantees=terms(manifest, router, arguments.coverage, arguments.max_risk) is not None,
        coverage=arguments.coverage,
        max_risk=arguments.max_risk,
    )

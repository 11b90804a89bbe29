"""A run of `trivium score`: what is left to do, by whom it is done, and where it goes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..bundle import MANIFEST, Bundle, digest, open_bundle
from ..cpus import usable_cpus
from ..promises import terms
from ..router import unknown_router
from . import actors, pool
from .inputs import Input, open_input
from .parts import Parts, ScoredBundle, chunks
from .work import Chunk, Scored, Task

CHUNK = {"processes": 16, "ray": 64}
"""Pictures that a process or an actor takes at a time; Ray does more about each."""


def run(arguments: argparse.Namespace) -> None:
    """Score what is not scored yet; exit status 1 where no picture at all could be read."""
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
        workers = arguments.workers or usable_cpus()
        work = (
            Chunk(rows.start, pictures.rows(rows.start, rows.stop))
            for rows in chunks(missing, CHUNK[arguments.engine], pool.AHEAD * workers)
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

"""A study: many ways to make one classifier robust, each a row of runs over seeds, trained and evaluated alike.

Every run is `trivium train` and `trivium evaluate` in a process of its own, so a study is what a user could type. A
run whose evaluation is on disk, of the same commands, is not repeated; one that was killed goes on at its last epoch.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from rich.console import Console

from trivium.runtime.cpus import usable_cpus
from trivium.runtime.errors import ClientError, ConfigError

from ..evaluation.results import Results, read_results
from ..sections import Section

STUDIES = Path(__file__).parent
COMMANDS, LOG = "commands.json", "log.txt"


class Row(Section):
    """A way to train, and how its answers are called in the tables."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    """Of its directory."""
    title: str
    recipe: str | None = None
    """None: the study's."""
    settings: dict[str, Any] = Field({})
    """Dotted key of the recipe -> value, on top of the study's, as trivium train --set takes them."""
    after: str | None = None
    """A row that goes before, seed by seed: its finished stages are taken over, and so may be its run's weights, as
    {runs}/ROW/{seed}/run, which also names runs before that one."""
    charged: tuple[str, ...] = ()
    """Rows whose training counts among this one's costs, since it starts from their weights."""
    answerers: dict[str, str] | None = None
    """Rows of the table -> head or router of these runs; None: the title -> the default router."""
    evaluate: tuple[str, ...] = ()
    """Arguments on top of the study's."""


class Comparison(Section):
    """Two rows of the table, seed by seed."""

    row: str
    against: str
    measure: str
    kind: Literal["ratio", "difference"] = "difference"


class Study(Section):
    """What is compared, on which data."""

    name: str
    title: str
    recipe: str
    settings: dict[str, Any] = Field({})
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    evaluate: tuple[str, ...] = ()
    """Arguments of trivium evaluate."""
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    shifts: dict[str, tuple[str, ...]] = Field({})
    """Column -> the shifts whose mean accuracy it holds; it is marked where training saw one of them."""
    comparisons: tuple[Comparison, ...] = ()
    reading: str = ""
    """What the outcome says, in Markdown."""

    def only(self, names: Sequence[str]) -> Study:
        """The rows named, and those that they build on.

        Raises: ConfigError for a name that is no row.
        """
        rows = {row.name: row for row in self.rows}
        if unknown := [name for name in names if name not in rows]:
            raise ConfigError(f"study {self.name} has no row {unknown[0]!r}; it has: {', '.join(rows)}")
        wanted, open_names = set[str](), list(names)
        while open_names:
            name = open_names.pop()
            wanted.add(name)
            open_names += [after for after in [rows[name].after] if after is not None]
        return self.model_copy(update={"rows": tuple(row for row in self.rows if row.name in wanted)})

    @model_validator(mode="after")
    def _in_order(self) -> Study:
        met: list[str] = []
        for row in self.rows:
            if row.name in met:
                raise ValueError(f"rows: two rows are called {row.name}")
            if row.after is not None and row.after not in met:
                raise ValueError(f"rows: {row.name} comes after {row.after}, which is no row before it")
            if unknown := [name for name in row.charged if name not in met]:
                raise ValueError(f"rows: {row.name} is charged for {unknown[0]}, which is no row before it")
            met.append(row.name)
        return self


class Job:
    """One row with one seed."""

    def __init__(self, study: Study, row: Row, seed: int, out: Path) -> None:
        self.study, self.row, self.seed = study, row, seed
        self.directory = out / study.name / row.name / str(seed)
        self.before = out / study.name / row.after / str(seed) / "run" if row.after else None
        self.run, self.evaluation = self.directory / "run", self.directory / "evaluation"

    @property
    def label(self) -> str:
        return f"{self.study.name}: {self.row.name}, seed {self.seed}"

    def commands(self) -> list[list[str]]:
        """What a user would type, save the program."""
        row, study = self.row, self.study
        places = {"{runs}": str(self.directory.parent.parent), "{seed}": str(self.seed)}
        settings = {**study.settings, **row.settings}
        train = ["train", row.recipe or study.recipe]
        for key, value in settings.items():
            train += ["--set", _filled(f"{key}={json.dumps(value)}", places)]
        train += ["--seed", str(self.seed), "--out", str(self.run)]
        train += ["--reuse", str(self.before)] if self.before else []
        evaluate = ["evaluate", str(self.run), "--seed", str(self.seed), "--out", str(self.evaluation)]
        return [train, evaluate + [_filled(each, places) for each in (*study.evaluate, *row.evaluate)]]

    def results(self) -> Results | None:
        """What its evaluation found, where that is on disk and was asked for by the same commands."""
        try:
            known = json.loads((self.directory / COMMANDS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if known != self.commands():
            return None
        return read_results(self.evaluation / "results.json")

    def do(self, stop: threading.Event, threads: int) -> None:
        """Train and evaluate, the words of both into log.txt.

        threads: of each process.

        Raises: ClientError where a command fails, with its last line.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / COMMANDS).unlink(missing_ok=True)
        with (self.directory / LOG).open("w", encoding="utf-8") as log:
            for command in self.commands():
                if stop.is_set():
                    return
                print(shlex.join(["trivium", *command]), file=log, flush=True)
                process = subprocess.Popen(
                    [sys.executable, "-m", "trivium", *command], stdout=log, stderr=log, env=environment
                )
                while True:
                    try:
                        process.wait(0.5)
                        break
                    except subprocess.TimeoutExpired:
                        if stop.is_set():
                            process.terminate()
                if process.returncode and not stop.is_set():
                    said = (self.directory / LOG).read_text(encoding="utf-8").strip().splitlines()
                    raise ClientError(f"{self.label}: {said[-1] if said else f'status {process.returncode}'}")
        if not stop.is_set():
            text = json.dumps(self.commands(), indent=1) + "\n"
            (self.directory / COMMANDS).write_text(text, encoding="utf-8")


def load_study(source: str) -> Study:
    """A study by name or from a YAML file.

    Raises: ConfigError with one line.
    """
    path = Path(source) if Path(source).suffix in (".yaml", ".yml") else STUDIES / f"{source}.yaml"
    if not path.is_file():
        raise ConfigError(f"no study {source!r}: there are {', '.join(studies())}, and no such .yaml file")
    try:
        return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
        raise ConfigError(f"{path}: no valid YAML ({' '.join(str(error).split())[:200]})") from None


def studies() -> list[str]:
    """Names of the studies in the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def carry_out(jobs: Sequence[Job], workers: int, console: Console) -> list[str]:
    """Do all jobs that are not done, some at a time, each after the one it builds on.

    Returns: one line for each job that failed; the others are done all the same, save those that build on it.
    """
    stop, failures, threads = threading.Event(), dict[Path, str](), max(usable_cpus() // workers, 1)
    open_jobs = [job for job in jobs if job.results() is None]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(open_jobs)} of them done before", highlight=False)
    waiting, running = list(open_jobs), dict[Future[None], Job]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                busy = {job.run for job in (*waiting, *running.values())}
                for job in [job for job in waiting if job.before not in busy]:
                    if len(running) == workers:
                        break
                    waiting.remove(job)
                    if job.before in failures:
                        failures[job.run] = f"{job.label}: left out, since {job.row.after} failed"
                        continue
                    running[pool.submit(job.do, stop, threads)] = job
                if not running:
                    continue
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    error = future.exception()
                    if error is not None:
                        if not isinstance(error, ClientError):
                            raise error
                        failures[job.run] = str(error)
                    left = len(waiting) + len(running)
                    console.print(failures.get(job.run) or f"{job.label}: done, {left} left", highlight=False)
        finally:
            stop.set()
    return list(failures.values())


def _filled(text: str, places: dict[str, str]) -> str:
    for place, value in places.items():
        text = text.replace(place, value)
    return text

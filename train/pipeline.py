"""A whole run, stage by stage: original, teacher, its check, student, checkpoint. Stages done before are skipped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from trivium.runtime.bundle import digest
from trivium.runtime.errors import ConfigError

from .checkpoint import (
    WEIGHTS,
    Architecture,
    CheckpointMeta,
    Cost,
    package_versions,
    save_checkpoint,
    save_tensors,
    write_json,
)
from .feed import Feed
from .loop import Loss, Stage, accuracy, derive, fingerprint, fit, machine
from .methods.objectives import original_objective, student_objective, teacher_objective
from .methods.teacher import Preflight, judge
from .models.backbone import create, load_weights, read_state
from .models.stages import Classifier, split
from .models.student import Student
from .progress import Watch
from .recipe import Model, Recipe

MODEL = "model.safetensors"
STAGE = "stage.json"
CHECKED = 5000
"""Calibration pictures, at most, that the teacher's check looks at."""


def train(recipe: Recipe, out: Path, console: Console | None = None) -> CheckpointMeta:
    """Run a recipe into the directory `out`, going on from whatever of it is there already.

    Raises: subclasses of TriviumError with one line.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    return Run(recipe, out, Watch(console or Console(), out / "logs")).train()


class Run:
    """One recipe in one directory."""

    def __init__(self, recipe: Recipe, out: Path, watch: Watch) -> None:
        self.recipe, self.out, self.watch = recipe, out, watch
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.machine = machine(recipe.device, recipe.precision)
        self.feed = Feed(recipe, self.machine)
        self.common = (
            recipe.seed,
            self.feed.description["digest"],
            self.feed.preprocessing.model_dump(),
            recipe.views.model_dump(),
            str(self.machine.device.type),
            self.machine.bfloat16,
        )
        self.costs: dict[str, Cost] = {}
        self.results: dict[str, Any] = {}

    def train(self) -> CheckpointMeta:
        """All stages, in order."""
        recipe, feed = self.recipe, self.feed
        for skipped in self.feed.pictures.skipped[:5]:
            self.watch.say(f"skipped: {skipped[0]}: {skipped[1]}")
        self.watch.say(
            f"data: {feed.description['source']}: {len(feed.pictures)} pictures to train, {len(feed.held_out)} held "
            f"out, {len(feed.classes)} classes, {feed.preprocessing.height} x {feed.preprocessing.width}; "
            f"{self.machine.device.type}, {'bfloat16' if self.machine.bfloat16 else 'float32'}, "
            f"{torch.get_num_threads()} threads"
        )
        settings = recipe.teacher
        original, original_print = self._model(
            "original", recipe.original, lambda model: original_objective(feed, model, recipe.original)
        )
        teacher, teacher_print = None, "none"
        if settings is not None:
            shifts = (settings.shifts or recipe.shifts).model_dump()
            teacher, teacher_print = self._model(
                "teacher", settings, lambda model: teacher_objective(feed, model, settings), shifts
            )
            if recipe.preflight != "off":
                self._preflight(original, teacher, fingerprint(original_print, teacher_print))
        student = self._student(original, teacher, fingerprint(original_print, teacher_print))
        meta = CheckpointMeta(
            name=recipe.name,
            classes=feed.classes,
            heads=list(student.head_names),
            preprocessing=feed.preprocessing,
            dropout=recipe.heads.dropout,
            architecture=Architecture(
                model=recipe.original.model,
                kwargs=recipe.original.kwargs,
                depth=recipe.heads.depth,
                tail=recipe.heads.tail,
                freeze_norm=recipe.heads.freeze_norm,
            ),
            data=feed.description,
            recipe=recipe.model_dump(mode="json"),
            costs=self.costs,
            results=self.results,
            packages=package_versions(),
            weights_sha256="0" * 64,
        )
        save_checkpoint(self.out, student, meta)
        self.watch.console.print(cost_table(self.costs))
        self.watch.say(f"checkpoint: {self.out}")
        return meta.model_copy(update={"weights_sha256": digest(self.out / WEIGHTS)})

    def _model(
        self, name: str, settings: Model, objective: Callable[[nn.Module], Loss], more: Any = None
    ) -> tuple[Classifier, str]:
        """A whole timm model, trained or fetched, as a frozen Classifier; and its fingerprint."""
        directory = self.out / name
        weights = settings.weights
        source = digest(Path(weights)) if Path(weights).is_file() else weights
        mark = fingerprint(name, *self.common, settings.model_dump(exclude={"weights"}), source, more)
        torch.manual_seed(derive(self.recipe.seed, name, "initial"))
        done = self._done(name, directory, mark, directory / MODEL)
        model = create(
            settings.model, len(self.feed.classes), settings.kwargs, pretrained=weights == "hub" and not done
        )
        if done:
            model.load_state_dict(read_state(directory / MODEL))
        else:
            fitting = weights == "train"
            if weights == "hub":
                fitting = model.pretrained_cfg.get("num_classes") == len(self.feed.classes)  # type: ignore[union-attr, operator]
            elif not fitting:
                fitting = load_weights(model, weights, self.watch.say)
            if not fitting and settings.schedule is None:
                raise ConfigError(
                    f"{name}: these weights were made for other classes than the {len(self.feed.classes)} of the data: "
                    f"give {name}.schedule to fine-tune them"
                )
            cost, figures = Cost(), dict[str, float]()
            if settings.schedule is not None:
                self.machine.place(model)
                stage = Stage(
                    name=name,
                    model=model,
                    loss=objective(model),
                    fetch=self.feed.fetch,
                    pictures=len(self.feed.pictures),
                    schedule=settings.schedule,
                    directory=directory,
                    fingerprint=mark,
                    seed=self.recipe.seed,
                    check=lambda: self.feed.glance(model),
                )
                cost, figures = fit(stage, self.machine, self.watch)
            directory.mkdir(parents=True, exist_ok=True)
            save_tensors(directory / MODEL, model.state_dict())
            self._finish(name, directory, mark, cost, figures)
        self.machine.place(model)
        frozen = (
            split(model, self.feed.preprocessing.height, self.feed.preprocessing.width).eval().requires_grad_(False)
        )
        return frozen, mark

    def _student(self, original: Classifier, teacher: Classifier | None, upstream: str) -> Student:
        recipe, directory = self.recipe, self.out / "student"
        torch.manual_seed(derive(recipe.seed, "student", "initial"))
        heads = recipe.heads
        student = Student(original, heads.names, heads.depth, heads.tail, heads.dropout.rate, heads.freeze_norm)
        self.machine.place(student)
        settings = (recipe.heads.model_dump(), recipe.student.model_dump(), recipe.shifts.model_dump())
        mark = fingerprint("student", *self.common, *settings, upstream)
        if self._done("student", directory, mark, directory / MODEL):
            student.load_state_dict({**student.state_dict(), **read_state(directory / MODEL)})
            return student.eval()
        stage = Stage(
            name="student",
            model=student,
            loss=student_objective(self.feed, student, teacher, recipe.student),
            fetch=self.feed.fetch,
            pictures=len(self.feed.pictures),
            schedule=recipe.student.schedule,
            directory=directory,
            fingerprint=mark,
            seed=recipe.seed,
            kept=Student.is_tuned,
            lr_scale=lambda name: recipe.student.tail_lr if name.startswith("branches.") else 1.0,
            check=lambda: self.feed.glance_heads(student),
        )
        cost, figures = fit(stage, self.machine, self.watch)
        save_tensors(directory / MODEL, {k: v for k, v in student.state_dict().items() if Student.is_tuned(k)})
        self._finish("student", directory, mark, cost, figures)
        return student

    def _done(self, name: str, directory: Path, mark: str, weights: Path) -> bool:
        try:
            state = json.loads((directory / STAGE).read_text(encoding="utf-8"))
            if state["fingerprint"] == mark and digest(weights) == state["weights_sha256"]:
                self.costs[name] = Cost.model_validate(state["cost"])
                self.results[name] = state["figures"]
                self.watch.say(f"{name}: done before, skipped")
                return True
        except (OSError, ValueError, KeyError):
            return False
        self.watch.say(f"{name}: the recipe or the data changed, trained anew")
        return False

    def _finish(self, name: str, directory: Path, mark: str, cost: Cost, figures: dict[str, float]) -> None:
        self.costs[name], self.results[name] = cost, figures
        state = {
            "fingerprint": mark,
            "cost": cost.model_dump(),
            "figures": figures,
            "weights_sha256": digest(directory / MODEL),
        }
        write_json(directory / STAGE, state)
        for epoch in directory.glob("epoch-*"):
            shutil.rmtree(epoch, ignore_errors=True)

    def _preflight(self, original: Classifier, teacher: Classifier, mark: str) -> None:
        file = self.out / "teacher" / "preflight.json"
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            found = state["fingerprint"] == mark
        except (OSError, ValueError, KeyError):
            found = False
        if found:
            result, cost = Preflight.model_validate(state["result"]), Cost.model_validate(state["cost"])
        else:
            cpu, wall = time.process_time(), time.monotonic()
            rows = {
                f"{who}_{kind}": accuracy(
                    self.feed.answer(model), self.feed.held_out_batches(CHECKED, kind == "shifted")
                )
                for who, model in (("original", original), ("teacher", teacher))
                for kind in ("clean", "shifted")
            }
            result = Preflight(pictures=min(CHECKED, len(self.feed.held_out)), **rows)
            cost = Cost(cpu_seconds=time.process_time() - cpu, wall_seconds=time.monotonic() - wall)
            write_json(file, {"fingerprint": mark, "result": result.model_dump(), "cost": cost.model_dump()})
        self.costs["preflight"], self.results["preflight"] = cost, result.model_dump()
        judge(result, "refuse" if self.recipe.preflight == "refuse" else "warn", self.watch.say)


def cost_table(costs: dict[str, Cost]) -> Table:
    """What each stage took."""
    table = Table(title="cost")
    for column in ("stage", "CPU s", "wall s", "epochs", "pictures", "tuned parameters"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    total = Cost(
        cpu_seconds=sum(cost.cpu_seconds for cost in costs.values()),
        wall_seconds=sum(cost.wall_seconds for cost in costs.values()),
        pictures=sum(cost.pictures for cost in costs.values()),
    )
    for name, cost in {**costs, "all": total}.items():
        row = (cost.cpu_seconds, cost.wall_seconds)
        counts = (cost.epochs, cost.pictures, cost.parameters)
        table.add_row(name, *(f"{value:.1f}" for value in row), *(f"{value:,}" if value else "" for value in counts))
    return table

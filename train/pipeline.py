"""A whole run, stage by stage: original, teacher, its check, student, checkpoint. Stages done before are skipped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from trivium.runtime.bundle import Preprocessing, digest
from trivium.runtime.errors import ConfigError

from .checkpoint import (
    WEIGHTS,
    Architecture,
    CheckpointMeta,
    Cost,
    is_run,
    load_classifier,
    package_versions,
    read_meta,
    save_checkpoint,
    save_tensors,
    write_json,
)
from .distributed import agreed, once, processes, summed
from .feed import Feed
from .loop import Loss, Stage, accuracy, derive, fingerprint, fit, machine
from .methods import adversarial, dad, robustify
from .methods.clean import original_objective
from .methods.teacher import Preflight, Teacher, judge, teacher_objective
from .models.backbone import Inlet, create, load_weights, preprocessing_of, read_state, weights_file
from .models.clip import create_clip, is_clip
from .models.mc import ORIGINAL
from .models.stages import Classifier, split
from .models.student import Student
from .progress import Watch
from .recipe import Recipe
from .sections import Model, Schedule

METHODS: dict[str, Callable[[Run, Student, Classifier | None, str], None]] = {
    "student": robustify.run,
    "adversarial": adversarial.run,
    "dad": dad.run,
}
"""Section of the recipe -> what trains the heads of a student in place, from the run, the student, the teacher and the
fingerprint of all that these came from."""
MODEL = "model.safetensors"
STAGE = "stage.json"
CHECKED = 5000
"""Calibration pictures, at most, that the teacher's check looks at."""


def train(recipe: Recipe, out: Path, console: Console | None = None, reuse: Sequence[Path] = ()) -> CheckpointMeta:
    """Run a recipe into the directory `out`, going on from whatever of it is there already.

    Stages that a run in `reuse` has finished with the same settings on the same data are copied from it.

    Raises: subclasses of TriviumError with one line.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    return Run(recipe, out, Watch(console or Console(), out / "logs"), reuse).train()


class Run:
    """One recipe in one directory."""

    def __init__(self, recipe: Recipe, out: Path, watch: Watch, reuse: Sequence[Path] = ()) -> None:
        self.recipe, self.out, self.watch, self.reuse = recipe, out, watch, reuse
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.machine = machine(recipe.device, recipe.precision, recipe.parallel, recipe.compile)
        self.feed = Feed(recipe, self.machine)
        self.common = (
            recipe.seed,
            self.feed.description["digest"],
            self.feed.preprocessing.model_dump(),
            recipe.views.model_dump(),
            str(self.machine.device.type),
            self.machine.precision,
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
            f"{self.machine.device.type}, {self.machine.precision}, {torch.get_num_threads()} threads"
            f"{f', {processes()} processes' if processes() > 1 else ''}"
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
        student = self._student(original)
        sources = {head: path if path == ORIGINAL else source_of(path) for head, path in recipe.heads.sources.items()}
        heads = recipe.heads.model_dump(exclude={"sources"})
        METHODS[recipe.method](self, student, teacher, fingerprint(original_print, teacher_print, heads, sources))
        meta = CheckpointMeta(
            name=recipe.name,
            classes=feed.classes,
            heads=list(student.head_names),
            preprocessing=feed.preprocessing,
            dropout=recipe.heads.dropout,
            architecture=Architecture(
                model=recipe.original.model,
                kwargs=recipe.original.kwargs,
                depth=student.depth,
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
        once(lambda: save_checkpoint(self.out, student, meta))
        self.watch.console.print(cost_table(self.costs))
        self.watch.say(f"checkpoint: {self.out}")
        return meta.model_copy(update={"weights_sha256": digest(self.out / WEIGHTS)})

    def _model(
        self, name: str, settings: Model, objective: Callable[[nn.Module], Loss], more: Any = None
    ) -> tuple[Classifier, str]:
        """A whole timm model, trained or fetched, as a frozen Classifier; and its fingerprint."""
        directory = self.out / name
        weights = settings.weights
        mark = fingerprint(name, *self.common, settings.model_dump(exclude={"weights"}), source_of(weights), more)
        torch.manual_seed(derive(self.recipe.seed, name, "initial"))
        done = self._done(name, directory, mark)
        if is_clip(settings.model):
            model: nn.Module = create_clip(
                settings.model, self.feed.classes, settings.kwargs, None if done else weights
            )
        else:
            model = create(
                settings.model, len(self.feed.classes), settings.kwargs, pretrained=weights == "hub" and not done
            )
        own = self._input(settings, model)
        inlet = Inlet(self.feed.preprocessing, own)
        if done:
            model.load_state_dict(read_state(directory / MODEL))
        else:
            fitting = weights == "train" or is_clip(settings.model)
            if weights == "hub":
                fitting = model.pretrained_cfg.get("num_classes") == len(self.feed.classes)  # type: ignore[union-attr, operator]
            elif is_run(weights):
                fitting = self._take_run(name, model, weights, own)
            elif not fitting:
                fitting = load_weights(model, weights, self.watch.say)
            if not fitting and settings.schedule is None:
                raise ConfigError(
                    f"{name}: these weights were made for other classes than the {len(self.feed.classes)} of the data: "
                    f"give {name}.schedule to fine-tune them"
                )
            cost, figures = Cost(), dict[str, float]()
            if settings.schedule is not None:
                # Shares the model's tensors.
                tuned = model if settings.depth == "all" else self._classifier(model, own).tune(settings.depth)
                seen = _through(inlet, tuned)
                check = partial(self.feed.glance, seen)
                cost, figures = self._fit(name, tuned, settings.schedule, objective(seen), mark, check=check)
            directory.mkdir(parents=True, exist_ok=True)
            once(lambda: save_tensors(directory / MODEL, model.state_dict()))
            self._finish(name, directory, mark, cost, figures)
        self.machine.place(model)
        self.machine.place(inlet)
        frozen = self._classifier(model, own).eval().requires_grad_(False)
        if inlet.needed:
            frozen.stages.insert(0, inlet)
        return frozen, mark

    def _input(self, settings: Model, model: nn.Module) -> Preprocessing:
        """What pictures a model takes: the original the data's, a teacher its own."""
        data = self.feed.preprocessing
        if not isinstance(settings, Teacher):
            return data
        own = data
        if is_run(settings.weights):
            own = read_meta(Path(settings.weights.partition("#")[0])).preprocessing
        elif settings.weights != "train":
            own = preprocessing_of(model)
            if not is_clip(settings.model):  # whose position embeddings fix the size
                own = own.model_copy(update={"height": data.height, "width": data.width})
        return own.model_copy(update=settings.input.model_dump(exclude_none=True))

    def _classifier(self, model: nn.Module, own: Preprocessing) -> Classifier:
        return split(model, own.height, own.width)

    def _take_run(self, name: str, model: nn.Module, path: str, own: Preprocessing) -> bool:
        """Fill a timm model with a head of another run; whether its classes are those of the data."""
        source, meta = load_classifier(path)
        if meta.classes != self.feed.classes:
            raise ConfigError(f"{name}.weights: {path} was trained for other classes than those of the data")
        try:
            self._classifier(model, own).load_state_dict(source.state_dict())
        except RuntimeError:
            theirs = meta.architecture.model
            raise ConfigError(f"{name}.weights: {path} is a run of {theirs}, which does not fit {name}.model") from None
        return True

    def _student(self, original: Classifier) -> Student:
        torch.manual_seed(derive(self.recipe.seed, "student", "initial"))
        heads = self.recipe.heads
        student = Student(original, heads.names, heads.depth, heads.tail, heads.dropout.rate, heads.freeze_norm)
        for name, path in heads.sources.items():
            if path == ORIGINAL:
                student.take_over(name, original)
                continue
            source, meta = load_classifier(path)
            if meta.classes != self.feed.classes:
                raise ConfigError(f"heads.sources.{name}: {path} was trained for other classes than those of the data")
            student.take_over(name, source)
        self.machine.place(student)
        return student

    def stage(
        self,
        name: str,
        model: nn.Module,
        schedule: Schedule,
        loss: Callable[[], Loss],
        settings: Any,
        *,
        kept: Callable[[str], bool] = lambda key: True,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
        check: Callable[[], dict[str, float]] = dict,
        finish: Callable[[], None] = lambda: None,
        feed: Feed | None = None,
    ) -> None:
        """Fill `model` with the outcome of a stage: read where it was done before, else trained and kept.

        Args:
            name: of the stage's directory, and of its row among the costs.
            loss: made only where there is something to train.
            settings: JSON-able; the stage is done anew where any of them changes. What the stage builds on must be
                in it (`upstream`), the data and the machine's precision need not.
            kept, lr_scale, check: see loop.Stage.
            finish: called when the model is trained and before it is kept.
            feed: of other pictures than the run's, whose digest must then be in the settings.

        Raises: TrainingDiverged.
        """
        directory = self.out / name
        mark = fingerprint(name, *self.common, settings)
        if self._done(name, directory, mark):
            model.load_state_dict({**model.state_dict(), **read_state(directory / MODEL)})
            model.eval()
            return
        cost, figures = self._fit(name, model, schedule, loss(), mark, kept, lr_scale, check, feed)
        finish()
        weights = {key: value for key, value in model.state_dict().items() if kept(key)}
        once(lambda: save_tensors(directory / MODEL, weights))
        self._finish(name, directory, mark, cost, figures)

    def _fit(
        self,
        name: str,
        model: nn.Module,
        schedule: Schedule,
        loss: Loss,
        mark: str,
        kept: Callable[[str], bool] = lambda key: True,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
        check: Callable[[], dict[str, float]] = dict,
        feed: Feed | None = None,
    ) -> tuple[Cost, dict[str, float]]:
        self.machine.place(model)
        feed = feed or self.feed
        stage = Stage(
            name=name,
            model=model,
            loss=loss,
            fetch=feed.fetch,
            pictures=len(feed.pictures),
            schedule=schedule,
            directory=self.out / name,
            fingerprint=mark,
            seed=self.recipe.seed,
            kept=kept,
            lr_scale=lr_scale,
            check=check,
        )
        return fit(stage, self.machine, self.watch)

    def _done(self, name: str, directory: Path, mark: str) -> bool:
        for number, source in enumerate((self.out, *self.reuse)):
            weights = source / name / MODEL
            try:
                state = json.loads((source / name / STAGE).read_text(encoding="utf-8"))
                if state["fingerprint"] != mark or digest(weights) != state["weights_sha256"]:
                    continue
                cost, figures = Cost.model_validate(state["cost"]), state["figures"]
            except (OSError, ValueError, KeyError):
                continue
            agreed(number)
            if source != self.out:
                directory.mkdir(parents=True, exist_ok=True)
                once(partial(shutil.copyfile, weights, directory / MODEL))
                once(partial(write_json, directory / STAGE, state))
            self.costs[name], self.results[name] = cost, figures
            self.watch.say(f"{name}: done before{'' if source == self.out else f' in {source}'}, skipped")
            return True
        agreed(-1)
        if (directory / STAGE).exists():
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

        def close() -> None:
            write_json(directory / STAGE, state)
            for epoch in directory.glob("epoch-*"):
                shutil.rmtree(epoch, ignore_errors=True)

        once(close)

    def _preflight(self, original: Classifier, teacher: Classifier, mark: str) -> None:
        file = self.out / "teacher" / "preflight.json"
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            found = state["fingerprint"] == mark
        except (OSError, ValueError, KeyError):
            found = False
        agreed(found)
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
            used = summed([time.process_time() - cpu])[0]
            cost = Cost(cpu_seconds=used, wall_seconds=time.monotonic() - wall)
            document = {"fingerprint": mark, "result": result.model_dump(), "cost": cost.model_dump()}
            once(lambda: write_json(file, document))
        self.costs["preflight"], self.results["preflight"] = cost, result.model_dump()
        judge(result, "refuse" if self.recipe.preflight == "refuse" else "warn", self.watch.say)


def _through(inlet: Inlet, model: nn.Module) -> nn.Module:
    return nn.Sequential(inlet, model) if inlet.needed else model


def source_of(weights: str) -> str:
    """What stands for a recipe's `weights` in a fingerprint: contents, where they are a file or a run."""
    if is_run(weights):
        run, _, head = weights.partition("#")
        return f"{read_meta(Path(run)).weights_sha256}#{head}"
    file = weights_file(weights)
    return digest(file) if file.is_file() else weights


def cost_table(costs: dict[str, Cost]) -> Table:
    """What each stage took."""
    total = Cost(
        cpu_seconds=sum(cost.cpu_seconds for cost in costs.values()),
        wall_seconds=sum(cost.wall_seconds for cost in costs.values()),
        gpu_seconds=sum(cost.gpu_seconds for cost in costs.values()),
        pictures=sum(cost.pictures for cost in costs.values()),
    )
    card = ["GPU s"] if total.gpu_seconds else []
    table = Table(title="cost")
    for column in ("stage", "CPU s", "wall s", *card, "epochs", "pictures", "tuned parameters"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, cost in {**costs, "all": total}.items():
        row = (cost.cpu_seconds, cost.wall_seconds, *([cost.gpu_seconds] if card else []))
        counts = (cost.epochs, cost.pictures, cost.parameters)
        table.add_row(name, *(f"{value:.1f}" for value in row), *(f"{value:,}" if value else "" for value in counts))
    return table

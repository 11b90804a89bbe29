"""A whole run, stage by stage: original, teacher, its check, student, checkpoint. Stages done before are skipped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trivium.runtime.bundle import Preprocessing, digest
from trivium.runtime.errors import ConfigError

from .backbone import Classifier, create, load_weights, preprocessing_of, read_state, split
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
from .data import load_pictures
from .loop import Stage, accuracy, derive, fingerprint, fit, machine
from .losses import clean_loss, combined_loss, robust_loss, uncertainty_weight
from .mc import normalise
from .progress import Watch
from .recipe import Model, Recipe
from .student import Student
from .teacher import Preflight, judge, teacher_loss, teacher_passes
from .views import Shifts, clean_view

MODEL = "model.safetensors"
STAGE = "stage.json"
GLANCE = 1000
"""Calibration pictures that an epoch's check looks at."""
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
        probe = create(recipe.original.model, None, recipe.original.kwargs)
        preprocessing = preprocessing_of(probe, recipe.input.model_dump())
        self.pictures = load_pictures(
            recipe.data, "train", preprocessing, train_transform=recipe.views.crop == "resized"
        )
        self.held_out = load_pictures(recipe.data, "calibration", preprocessing)
        if len(self.pictures) < 2 or len(self.held_out) == 0:
            raise ConfigError(
                f"the data has {len(self.pictures)} pictures to train on and {len(self.held_out)} held out for "
                "calibration: at least 2 and 1 are needed"
            )
        self.classes = list(self.pictures.classes)
        self.labels = torch.from_numpy(self.pictures.labels)
        sample = self._sample()
        if recipe.original.weights == "train":
            preprocessing = _measured(preprocessing, recipe, sample)
        self.preprocessing: Preprocessing = preprocessing
        grey = bool((sample[:, 0] == sample[:, 1]).all() and (sample[:, 1] == sample[:, 2]).all())
        size = (preprocessing.height, preprocessing.width)
        self.shifts = Shifts(recipe.shifts, size, derive(recipe.seed, "mixing"), grey)
        self.other_shifts = Shifts(recipe.shifts, size, derive(recipe.seed, "held-out mixing"), grey)
        teacher_shifts = recipe.teacher.shifts if recipe.teacher else None
        self.teacher_shifts = (
            Shifts(teacher_shifts, size, derive(recipe.seed, "mixing"), grey) if teacher_shifts else self.shifts
        )
        self.description = self.pictures.describe()
        self.common = (
            recipe.seed,
            self.description["digest"],
            preprocessing.model_dump(),
            recipe.views.model_dump(),
            str(self.machine.device.type),
            self.machine.bfloat16,
        )
        self.costs: dict[str, Cost] = {}
        self.results: dict[str, Any] = {}

    def train(self) -> CheckpointMeta:
        """All stages, in order."""
        for skipped in self.pictures.skipped[:5]:
            self.watch.say(f"skipped: {skipped[0]}: {skipped[1]}")
        self.watch.say(
            f"data: {self.description['source']}: {len(self.pictures)} pictures to train, {len(self.held_out)} held "
            f"out, {len(self.classes)} classes, {self.preprocessing.height} x {self.preprocessing.width}; "
            f"{self.machine.device.type}, {'bfloat16' if self.machine.bfloat16 else 'float32'}, "
            f"{torch.get_num_threads()} threads"
        )
        recipe = self.recipe
        original, original_print = self._model("original", recipe.original, self._original_loss)
        teacher, teacher_print = None, "none"
        if recipe.teacher:
            teacher_settings = recipe.teacher
            shifts = (teacher_settings.shifts or recipe.shifts).model_dump()
            teacher, teacher_print = self._model("teacher", teacher_settings, self._teacher_loss, shifts)
            if recipe.preflight != "off":
                self._preflight(original, teacher, fingerprint(original_print, teacher_print))
        student = self._student(original, teacher, fingerprint(original_print, teacher_print))
        meta = CheckpointMeta(
            name=recipe.name,
            classes=self.classes,
            heads=list(student.head_names),
            preprocessing=self.preprocessing,
            dropout=recipe.heads.dropout,
            architecture=Architecture(
                model=recipe.original.model,
                kwargs=recipe.original.kwargs,
                depth=recipe.heads.depth,
                tail=recipe.heads.tail,
                freeze_norm=recipe.heads.freeze_norm,
            ),
            data=self.description,
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

    def _model(self, name: str, settings: Model, loss: Callable[..., Any], more: Any = None) -> tuple[Classifier, str]:
        """A whole timm model, trained or fetched, as a frozen Classifier; and its fingerprint."""
        directory = self.out / name
        weights = settings.weights
        source = digest(Path(weights)) if Path(weights).is_file() else weights
        mark = fingerprint(name, *self.common, settings.model_dump(exclude={"weights"}), source, more)
        torch.manual_seed(derive(self.recipe.seed, name, "initial"))
        done = self._done(name, directory, mark, directory / MODEL)
        model = create(settings.model, len(self.classes), settings.kwargs, pretrained=weights == "hub" and not done)
        if done:
            model.load_state_dict(read_state(directory / MODEL))
        else:
            fitting = weights == "train"
            if weights == "hub":
                fitting = model.pretrained_cfg.get("num_classes") == len(self.classes)  # type: ignore[union-attr, operator]
            elif not fitting:
                fitting = load_weights(model, weights, self.watch.say)
            if not fitting and settings.schedule is None:
                raise ConfigError(
                    f"{name}: these weights were made for other classes than the {len(self.classes)} of the data: "
                    f"give {name}.schedule to fine-tune them"
                )
            cost, figures = Cost(), dict[str, float]()
            if settings.schedule is not None:
                self.machine.place(model)
                stage = Stage(
                    name=name,
                    model=model,
                    loss=lambda x, indices, generator: loss(model, x, indices, generator),
                    fetch=self._fetch,
                    pictures=len(self.pictures),
                    schedule=settings.schedule,
                    directory=directory,
                    fingerprint=mark,
                    seed=self.recipe.seed,
                    check=lambda: self._glance(lambda x: model(x)),
                )
                cost, figures = fit(stage, self.machine, self.watch)
            directory.mkdir(parents=True, exist_ok=True)
            save_tensors(directory / MODEL, model.state_dict())
            self._finish(name, directory, mark, cost, figures)
        self.machine.place(model)
        frozen = split(model, self.preprocessing.height, self.preprocessing.width).eval().requires_grad_(False)
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
            loss=lambda x, indices, generator: self._student_loss(student, teacher, x, indices, generator),
            fetch=self._fetch,
            pictures=len(self.pictures),
            schedule=recipe.student.schedule,
            directory=directory,
            fingerprint=mark,
            seed=recipe.seed,
            kept=Student.is_tuned,
            lr_scale=lambda name: recipe.student.tail_lr if name.startswith("branches.") else 1.0,
            check=lambda: self._glance_heads(student),
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
                f"{who}_{kind}": accuracy(self._answer(model), self._held_out_batches(CHECKED, kind == "shifted"))
                for who, model in (("original", original), ("teacher", teacher))
                for kind in ("clean", "shifted")
            }
            result = Preflight(pictures=min(CHECKED, len(self.held_out)), **rows)
            cost = Cost(cpu_seconds=time.process_time() - cpu, wall_seconds=time.monotonic() - wall)
            write_json(file, {"fingerprint": mark, "result": result.model_dump(), "cost": cost.model_dump()})
        self.costs["preflight"], self.results["preflight"] = cost, result.model_dump()
        judge(result, "refuse" if self.recipe.preflight == "refuse" else "warn", self.watch.say)

    def _fetch(self, indices: NDArray[np.int64], generator: torch.Generator) -> Tensor:
        return self.pictures.batch(indices, generator)

    def _views(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return clean_view(x.float() / 255, self.recipe.views, generator)

    def _normalise(self, x: Tensor) -> Tensor:
        return normalise(x, self.preprocessing).contiguous(memory_format=torch.channels_last)

    def _labels(self, indices: NDArray[np.int64]) -> Tensor:
        return self.labels[torch.from_numpy(indices)].to(self.machine.device)

    def _original_loss(
        self, model: nn.Module, x: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        schedule = self.recipe.original.schedule
        smoothing = schedule.label_smoothing if schedule else 0.0
        pictures = self._normalise(self._views(x, generator))
        with self.machine.autocast():
            logits = model(pictures)
        labels = self._labels(indices)
        return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing), {}

    def _teacher_loss(
        self, model: nn.Module, x: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        settings = self.recipe.teacher
        assert settings is not None, "only called for a recipe with a teacher"
        smoothing = settings.schedule.label_smoothing if settings.schedule else 0.0
        pictures, labels = self._views(x, generator), self._labels(indices)
        with self.machine.autocast():
            return teacher_loss(
                model, pictures, labels, generator, self.teacher_shifts, self._normalise, settings.loss,
                settings.jsd_weight, settings.clean_share, smoothing,
            )  # fmt: skip

    def _student_loss(
        self,
        student: Student,
        teacher: Classifier | None,
        x: Tensor,
        indices: NDArray[np.int64],
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        settings, labels = self.recipe.student, self._labels(indices)
        clean = self._views(x, generator)
        shifted = self._normalise(self.shifts(clean, generator))
        weight = teacher_logits = None
        with self.machine.autocast():
            with torch.no_grad():
                z, z_shifted = student.trunk(torch.cat([self._normalise(clean), shifted])).chunk(2)
                original = student.original_from_trunk(z).float()
                if teacher is not None:
                    wanted = settings.teacher_passes if settings.uncertainty == "mutual_information" else 1
                    passes = teacher_passes(teacher, shifted, wanted, student.dropout_rate)
                    weight = uncertainty_weight(passes, settings.uncertainty)
                    teacher_logits = passes.logsumexp(0) if wanted == 1 else passes.softmax(-1).mean(0).log()
            losses = {}
            for index, name in enumerate(student.head_names):
                if name == "clean":
                    logits = student.logits(index, student.branch(index, z))
                    losses[name] = clean_loss(logits, labels, original, settings.tau, settings.alpha)
                elif name == "robust":
                    logits = student.logits(index, student.branch(index, z_shifted))
                    losses[name] = robust_loss(logits, labels, teacher_logits, weight, settings.tau, settings.beta)
                else:
                    both = student.logits(index, student.branch(index, torch.cat([z, z_shifted])))
                    on_clean, on_shifted = both.chunk(2)
                    losses[name] = combined_loss(
                        on_clean, on_shifted, labels, original, teacher_logits, weight, settings.tau, settings.gamma
                    )
        total = torch.stack(list(losses.values())).sum()
        return total, {name: loss.item() for name, loss in losses.items()}

    def _glance(self, model: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return {
            kind: accuracy(self._answer(model), self._held_out_batches(GLANCE, kind == "shifted"))
            for kind in ("clean", "shifted")
        }

    def _glance_heads(self, student: Student) -> dict[str, float]:
        figures = dict[str, float]()
        for kind in ("clean", "shifted"):
            right = np.zeros(len(student.head_names))
            total = 0
            for pictures, labels in self._held_out_batches(GLANCE, kind == "shifted"):
                with torch.no_grad():
                    answers = self._answer(student)(pictures).argmax(-1).cpu().numpy()
                right += (answers == labels[:, None]).sum(0)
                total += len(labels)
            figures |= {f"{name}_{kind}": float(r / total) for name, r in zip(student.head_names, right, strict=True)}
        return figures

    def _answer(self, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def answer(pictures: Tensor) -> Tensor:
            with self.machine.autocast():
                return model(self._normalise(pictures)).float()

        return answer

    def _held_out_batches(self, most: int, shifted: bool) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Pictures [B, 3, H, W] in [0, 1] of the calibration split, the same ones each time, and their labels."""
        chosen = np.random.default_rng(self.recipe.seed).permutation(len(self.held_out))[:most]
        for start in range(0, len(chosen), 250):
            indices = chosen[start : start + 250]
            pictures = self.machine.channels_last(self.held_out.batch(indices)).float() / 255
            if shifted:
                generator = torch.Generator().manual_seed(derive(self.recipe.seed, "held-out", start))
                pictures = self.other_shifts(pictures, generator)
            yield pictures, self.held_out.labels[indices]

    def _sample(self, most: int = 1000) -> Tensor:
        """Some training pictures, uint8, without crops or mirrors."""
        chosen = np.random.default_rng(0).permutation(len(self.pictures))[:most]
        if self.recipe.views.crop == "none":
            return self.pictures.batch(chosen)
        return self.pictures.batch(chosen[:64], torch.Generator().manual_seed(0))


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


def _measured(preprocessing: Preprocessing, recipe: Recipe, sample: Tensor) -> Preprocessing:
    """Mean and standard deviation of the data, where the recipe gives none and no pretrained weights expect others."""
    pixels = sample.double().div(255).transpose(0, 1).flatten(1)
    mean = tuple(round(value, 4) for value in pixels.mean(1).tolist())
    std = tuple(round(max(value, 1e-3), 4) for value in pixels.std(1).tolist())
    update = {}
    if recipe.input.mean is None:
        update["mean"] = mean
    if recipe.input.std is None:
        update["std"] = std
    return preprocessing.model_copy(update=update)

"""What training sees: clean and shifted views of batches of the training split, and held-out pictures for checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError

from .checkpoint import is_run, read_meta
from .data.pictures import DataSpec, load_pictures
from .loop import Machine, accuracy, derive
from .models.backbone import create, preprocessing_of
from .models.mc import normalise
from .models.student import Student
from .recipe import Recipe
from .shifts.views import Shifts, clean_view

GLANCE = 1000
"""Calibration pictures that an epoch's check looks at."""


class Feed:
    """The data of a recipe on a machine.

    Raises: ConfigError where the data cannot be used or is too little.
    """

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        self.recipe, self.machine = recipe, machine
        probe = create(recipe.original.model, None, recipe.original.kwargs)
        preprocessing = preprocessing_of(probe, recipe.input.model_dump())
        if is_run(recipe.original.weights):
            preprocessing = read_meta(Path(recipe.original.weights.partition("#")[0])).preprocessing
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
        self.description = self.pictures.describe()
        self._labels = torch.from_numpy(self.pictures.labels)
        sample = self._sample()
        self.preprocessing = (
            _measured(preprocessing, recipe, sample) if recipe.original.weights == "train" else preprocessing
        )
        grey = bool((sample[:, 0] == sample[:, 1]).all() and (sample[:, 1] == sample[:, 2]).all())
        size, mixing = (preprocessing.height, preprocessing.width), derive(recipe.seed, "mixing")
        self.shifts = Shifts(recipe.shifts, size, mixing, grey)
        other = recipe.teacher.shifts if recipe.teacher else None
        self.teacher_shifts = Shifts(other, size, mixing, grey) if other else self.shifts
        self._held_out_shifts = Shifts(recipe.shifts, size, derive(recipe.seed, "held-out mixing"), grey)

    def over(self, data: DataSpec) -> Feed:
        """The same for other pictures, which the model sees normalised alike."""
        other = Feed(self.recipe.model_copy(update={"data": data}), self.machine)
        other.preprocessing = self.preprocessing
        return other

    def fetch(self, indices: NDArray[np.int64], generator: torch.Generator) -> Tensor:
        """Training pictures, uint8 [B, 3, H, W]."""
        return self.pictures.batch(indices, generator)

    def clean(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [B, 3, H, W] -> clean views in [0, 1]."""
        return clean_view(pictures.float() / 255, self.recipe.views, generator)

    def normalise(self, x: Tensor) -> Tensor:
        """Views in [0, 1] as the model wants them."""
        return normalise(x, self.preprocessing).contiguous(memory_format=torch.channels_last)

    def labels(self, indices: NDArray[np.int64]) -> Tensor:
        """int64 [B] on the device."""
        return self._labels[torch.from_numpy(indices)].to(self.machine.device)

    def answer(self, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Pictures [B, 3, H, W] in [0, 1] -> the model's logits, float32, as training computes them."""

        def logits(pictures: Tensor) -> Tensor:
            with self.machine.autocast():
                return model(self.normalise(pictures)).float()

        return logits

    def held_out_batches(self, most: int, shifted: bool) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """At most so many calibration pictures [B, 3, H, W] in [0, 1] with labels [B]; the same ones, and the same
        shifts from a mixing set that training does not use, each time."""
        chosen = np.random.default_rng(self.recipe.seed).permutation(len(self.held_out))[:most]
        for start in range(0, len(chosen), 250):
            indices = chosen[start : start + 250]
            pictures = self.machine.channels_last(self.held_out.batch(indices)).float() / 255
            if shifted:
                generator = torch.Generator().manual_seed(derive(self.recipe.seed, "held-out", start))
                pictures = self._held_out_shifts(pictures, generator)
            yield pictures, self.held_out.labels[indices]

    def glance(self, model: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Accuracy on some held-out pictures, clean and shifted."""
        return {
            kind: accuracy(self.answer(model), self.held_out_batches(GLANCE, kind == "shifted"))
            for kind in ("clean", "shifted")
        }

    def glance_heads(self, student: Student) -> dict[str, float]:
        """The same for each head."""
        figures = dict[str, float]()
        for kind in ("clean", "shifted"):
            right, total = np.zeros(len(student.head_names)), 0
            for pictures, labels in self.held_out_batches(GLANCE, kind == "shifted"):
                with torch.no_grad():
                    answers = self.answer(student)(pictures).argmax(-1).cpu().numpy()
                right += (answers == labels[:, None]).sum(0)
                total += len(labels)
            figures |= {f"{name}_{kind}": float(r / total) for name, r in zip(student.head_names, right, strict=True)}
        return figures

    def _sample(self, most: int = 1000) -> Tensor:
        chosen = np.random.default_rng(0).permutation(len(self.pictures))[:most]
        if self.recipe.views.crop == "none":
            return self.pictures.batch(chosen)
        return self.pictures.batch(chosen[:64], torch.Generator().manual_seed(0))


def _measured(preprocessing: Preprocessing, recipe: Recipe, sample: Tensor) -> Preprocessing:
    """Mean and standard deviation of the data, where the recipe gives none and no pretrained weights expect others."""
    pixels = sample.double().div(255).transpose(0, 1).flatten(1)
    update = {}
    if recipe.input.mean is None:
        update["mean"] = tuple(round(value, 4) for value in pixels.mean(1).tolist())
    if recipe.input.std is None:
        update["std"] = tuple(round(max(value, 1e-3), 4) for value in pixels.std(1).tolist())
    return preprocessing.model_copy(update=update)

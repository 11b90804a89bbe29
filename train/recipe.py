"""The recipe: every setting of a training run, typed; presets, files and --set; unknown keys name the nearest one."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trivium.runtime.bundle import Dropout
from trivium.runtime.errors import ConfigError

from .data.pictures import DataSpec
from .methods.losses import Uncertainty
from .models.student import Tail
from .shifts.views import CleanSpec, ShiftSpec

RECIPES = Path(__file__).parent / "recipes"
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Head = Literal["clean", "robust", "combined"]
Triple = tuple[float, float, float]


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(Section):
    """How long and how fast a stage learns; the rate warms up linearly and then falls as a cosine to 0."""

    epochs: Count
    batch: Count = 128
    pictures: Count | None = None
    """Of each epoch, drawn anew every epoch; None takes all."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 1e-3
    weight_decay: NonNegative = 0.01
    """Of matrices and filters; biases and norms are not decayed."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov's, of sgd."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Input(Section):
    """The model's pictures; what is None comes from timm's configuration of the original."""

    height: Count | None = None
    width: Count | None = None
    resize: Count | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: Triple | None = None
    """Per channel, of pixels in [0, 1]."""
    std: Triple | None = None


class Model(Section):
    """A timm model, its weights, and how it is trained here."""

    model: str
    kwargs: dict[str, Any] = {}
    weights: str = "train"
    """train (from scratch, here), hub (the hub's cache or download), or a local file."""
    schedule: Schedule | None = None
    """Clean training; with weights from elsewhere, fine-tuning (None: none)."""

    @model_validator(mode="after")
    def _trained(self) -> Model:
        if self.weights == "train" and self.schedule is None:
            raise ValueError("weights: train needs a schedule")
        return self


class Teacher(Model):
    """The small robust teacher."""

    loss: Literal["ce", "jsd"] = "ce"
    """ce: cross-entropy of shifted views; jsd: of clean pictures, and the Jensen-Shannon term of two views (AugMix)."""
    jsd_weight: NonNegative = 12.0
    clean_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of clean pictures among those of loss ce."""
    shifts: ShiftSpec | None = None
    """None: those of the student."""


class Heads(Section):
    """The student's heads."""

    names: Annotated[list[Head], Field(min_length=1)] = ["clean", "robust", "combined"]
    depth: Annotated[int, Field(ge=0)] = 1
    """Last stages of the model that are tuned."""
    tail: Tail = "copied"
    """copied: each head tunes its own copy of them; shared: one for all."""
    freeze_norm: bool = False
    """Batch norms of the tuned stages keep the original's statistics."""
    dropout: Dropout = Dropout(rate=0.5, passes=32, seed=0)

    @model_validator(mode="after")
    def _distinct(self) -> Heads:
        if len(set(self.names)) != len(self.names):
            raise ValueError("names must differ")
        return self


class Distillation(Section):
    """The student's losses L_c, L_u and L_m (train/methods/losses.py)."""

    schedule: Schedule
    tau: Rate = 2.0
    alpha: NonNegative = 1.0
    beta: NonNegative = 1.0
    gamma: NonNegative = 1.0
    uncertainty: Uncertainty = "entropy"
    """Weight of the teacher's answer; none is the ablation w = 1."""
    teacher_passes: Count = 16
    """Dropout passes of the teacher, for mutual_information."""
    tail_lr: Rate = 1.0
    """Learning rate of the tuned stages as a multiple of the heads'."""


class Recipe(Section):
    """A whole run: original classifier, teacher, check of the teacher, student."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Count | None = None
    """Of torch; None: all cores this process may use."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast where the processor multiplies in it."""
    data: DataSpec
    input: Input = Input()
    views: CleanSpec = CleanSpec()
    shifts: ShiftSpec = ShiftSpec()
    original: Model
    teacher: Teacher | None = None
    """None: no distillation from a teacher."""
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    """Where the teacher is no better than the original on shifted pictures it did not learn."""
    heads: Heads = Heads()
    student: Distillation


def load_recipe(source: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or the name of a preset, with settings "a.b=value" (YAML values) on top.

    Raises: ConfigError with one line.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{source}.yaml"
        if not path.is_file():
            near = difflib.get_close_matches(source, presets(), n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(f"no preset {source!r} (there are {', '.join(presets())}) and no .yaml file{hint}")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: unreadable ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values")
    for setting in settings:
        _set(document, setting)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None


def presets() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for each in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(each, type) and issubclass(each, BaseModel):
                yield from keys(each, f"{prefix}{name}.")


def _set(document: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {setting}: give it as key=value, such as student.schedule.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {setting}: the value is no valid YAML") from None
    # YAML 1.1 takes 1e-3 for a word, which no setting of a recipe is.
    if isinstance(value, str):
        value = _number(value)
    for part in parts[:-1]:
        below = document.get(part)
        if below is None:
            below = document[part] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {setting}: {part} is a value, it holds no keys")
        document = below
    document[parts[-1]] = value


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _explain(error: ValidationError) -> str:
    # Where a value may be one of several types, each of them reports; a misspelt key tells most.
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    unknown = first["type"] == "extra_forbidden"
    *above, last = first["loc"] or ("",)
    known = {part for key in keys() for part in key.split(".")}
    # Names of those types stand in the location too.
    where = ".".join(str(part) for part in [*(p for p in above if p in known), *([last] * (unknown or last in known))])
    if unknown:
        near = difflib.get_close_matches(where, list(keys()), n=1, cutoff=0.4)
        if not near:
            near = difflib.get_close_matches(str(last), list(keys()), n=1, cutoff=0.0)
        return f"unknown key {where!r}; nearest: {near[0]}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message

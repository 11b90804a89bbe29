"""The recipe: every setting of a training run, typed; presets, files and --set; unknown keys name the nearest one."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from trivium.runtime.errors import ConfigError

from .data.pictures import DataSpec
from .distributed import Parallel
from .methods.adversarial import Adversarial
from .methods.dad import Dad
from .methods.robustify import Distillation
from .methods.teacher import Teacher
from .sections import CalibrationSpec, Count, Heads, Input, Model, Section
from .shifts.views import CleanSpec, ShiftSpec

RECIPES = Path(__file__).parent / "recipes"
METHODS = ("student", "adversarial", "dad")
"""Sections of a recipe of which each names a way to train heads; a module of train/methods carries it out."""


class Recipe(Section):
    """A whole run: original classifier, teacher, check of the teacher, and one method that trains heads."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Count | None = None
    """Of torch; None: all cores this process may use."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 autocast where the processor multiplies in it; float16: with a scaled loss."""
    parallel: Parallel = "auto"
    """How torchrun's processes share a model: ddp or fsdp; auto: fsdp where it would fill half of a card, else ddp."""
    compile: bool = False
    """Whether torch.compile compiles what is trained."""
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
    calibration: CalibrationSpec = CalibrationSpec()
    student: Distillation | None = None
    """A method: heads distilled from the original and the teacher."""
    adversarial: Adversarial | None = None
    """A method: one head trained by AT, TRADES or TWINS."""
    dad: Dad | None = None
    """A method: heads distilled from the teacher on pictures and on discrete adversarial samples of them."""

    @property
    def method(self) -> str:
        """The section that says how the heads are trained."""
        return next(name for name in METHODS if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _one_method(self) -> Recipe:
        given = [name for name in METHODS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one method out of {', '.join(METHODS)}; there are {', '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _detached(self) -> Recipe:
        if self.student is not None and self.student.detach_clean and self.heads.tail != "shared":
            raise ValueError(
                "student.detach_clean is for heads.tail: shared; a clean head that is the original: "
                "heads.sources.clean: original"
            )
        return self

    @model_validator(mode="after")
    def _one_adversarial_head(self) -> Recipe:
        if self.adversarial is None:
            return self
        heads = self.heads
        if len(heads.names) != 1 or heads.sources:
            raise ValueError("adversarial trains one head: give heads.names one name, and no sources")
        if self.teacher is not None:
            raise ValueError("adversarial has no use for a teacher: set teacher: null")
        if heads.freeze_norm and self.adversarial.wings != "single":
            raise ValueError("heads.freeze_norm leaves no wing to adapt: set adversarial.wings: single")
        if self.adversarial.source is not None and heads.depth != "all":
            raise ValueError("adversarial.source fills all stages of the network: set heads.depth: all")
        return self


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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2001-99-99
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
    except (yaml.YAMLError, ValueError):
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

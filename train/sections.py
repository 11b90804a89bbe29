"""Parts of a recipe that several stages share, typed; an unknown key is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trivium.runtime.bundle import Dropout

from .models.student import Tail

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Triple = tuple[float, float, float]
Head = Annotated[str, Field(pattern=r"^(clean|robust|combined)(-[1-9])?$")]
"""What a head is for, and a number where several have the same role; each of those draws shifted views of its own."""


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(Section):
    """How long and how fast a stage learns; the rate warms up linearly and then falls."""

    epochs: Count
    batch: Count = 128
    """Of all processes together."""
    accumulate: Count = 1
    """Slices into which a batch is cut, learned from one after the other or shared by several processes; each has draws
    and batch statistics of its own."""
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
    decay: Literal["cosine"] | list[Share] = "cosine"
    """To 0 as half a cosine, or to a tenth at each of these shares of all steps."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_grad: Rate | None = None
    """Greatest norm of the gradient."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the weights' moving average, which then is what is evaluated and kept."""


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
    """timm's name or, of a teacher, clip: and open_clip's (models/clip.py)."""
    kwargs: dict[str, Any] = {}
    weights: str = "train"
    """train (from scratch, here), hub (the hub's cache or download), a local file, package:NAME (the weights file in an
    installed distribution), or the directory of a run: its only head or, as RUN#HEAD, one of several."""
    schedule: Schedule | None = None
    """Clean training; with weights from elsewhere, fine-tuning (None: none)."""
    depth: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Last stages that the schedule tunes, besides the final layer."""

    @model_validator(mode="after")
    def _trained(self) -> Model:
        if self.weights == "train" and self.schedule is None:
            raise ValueError("weights: train needs a schedule")
        if self.weights == "train" and self.depth != "all":
            raise ValueError("depth: weights: train starts from noise, so all stages must be tuned")
        return self


class CalibrationSpec(Section):
    """How temperatures and routing rules are fitted when a student is exported."""

    temperatures: bool = True
    """One a head; else all are 1."""
    clean_share: Share = 0.5
    """Weight of clean views in the mixture on which routers are judged."""
    agreement: Share = 0.95
    """paper: quantile of the clean-robust divergence on clean pictures up to which the heads count as agreeing."""
    uncertainty: Literal["predictive_entropy", "mutual_information"] = "predictive_entropy"
    """paper: by which the surest head answers where they disagree."""
    normalised: bool = True
    """paper: each head's uncertainty as a multiple of its mean on its own domain."""
    among: Literal["two", "three"] = "two"
    """paper: the surest of clean and robust, or of all three."""


class Heads(Section):
    """The student's heads."""

    names: Annotated[list[Head], Field(min_length=1)] = ["clean", "robust", "combined"]
    depth: Annotated[int, Field(ge=0)] | Literal["all"] = 1
    """Last stages of the model that are tuned; all leaves nothing frozen."""
    tail: Tail = "copied"
    """copied: each head tunes its own copy of them; shared: one for all."""
    freeze_norm: bool = False
    """Batch norms of the tuned stages keep the original's statistics."""
    dropout: Dropout = Dropout(rate=0.5, passes=32, seed=0)
    sources: dict[str, str] = {}
    """Head -> a run's directory (RUN or RUN#HEAD) whose classifier it takes over as it is, or `original`, which makes
    it the original exactly; it is not trained here."""

    @model_validator(mode="after")
    def _consistent(self) -> Heads:
        if len(set(self.names)) != len(self.names):
            raise ValueError("names must differ")
        if unknown := sorted(set(self.sources) - set(self.names)):
            raise ValueError(f"sources: no head {unknown[0]!r}")
        if self.sources and self.tail == "shared":
            raise ValueError("sources: a head from elsewhere needs tail: copied")
        if set(self.sources) == set(self.names):
            raise ValueError("sources: no head is left to train")
        return self

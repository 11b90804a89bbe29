"""results.json: what an evaluation found, typed; and the same numbers as CSV. Shares and accuracies lie in [0, 1]."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trivium.runtime.bundle import Calibration
from trivium.runtime.errors import ConfigError

SCHEMA_VERSION = 1


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Difference(Section):
    """A difference of accuracies with its 95 % paired bootstrap interval over pictures."""

    mean: float
    low: float
    high: float


class Two(Section):
    """One measure on clean pictures and on corrupted ones.

    Corrupted means the counted corruptions, every severity of every one weighing the same.
    """

    clean: float
    corrupted: float


class TwoDifferences(Section):
    clean: Difference
    corrupted: Difference


class Model(Section):
    """The model that was evaluated."""

    kind: Literal["bundle", "checkpoint"]
    path: str
    """As the user gave it."""
    name: str
    heads: list[str]
    classes: list[str]
    routers: list[str]
    default_router: str
    original: str
    """Where the original classifier's answers came from, or why there are none."""
    training_seed: int | None = None
    """Of the recipe, where the model's record holds it."""


class Data(Section):
    """The pictures that were asked about."""

    source: str
    split: str
    pictures: int
    """Each seen once clean."""
    corrupted: int
    """Those of them that were seen under every corruption and severity too, drawn by seed."""
    digest: str
    """SHA-256 of the data set, as train.data.pictures describes it."""


class Answerer(Section):
    """The original classifier, a head or a rule, and how well it answers."""

    name: str
    role: Literal["original", "head", "rule"]
    default: bool
    """Whether this is the default router."""
    accuracy: Two
    negative_flips: Two | None
    """Share of pictures that the original got right and this answerer gets wrong; None without an original."""
    positive_flips: Two | None
    ece: Two
    """Expected calibration error, 15 bins, all counted views in one diagram."""
    brier: Two
    """In [0, 2]."""
    nll: Two
    """Mean negative log-likelihood in nats."""
    accuracy_at_80: Two
    """Accuracy among the 80 % of the views with the largest probabilities."""
    over_original: TwoDifferences | None
    """Accuracy less the original's."""
    over_best_head: TwoDifferences
    """Accuracy less that of the best single head."""


class Bounds(Section):
    """What routing could gain at most. All on the mix: half clean, half corrupted."""

    best_head: str
    """The single head most accurate on the mix."""
    best_head_accuracy: Two
    oracle: Two
    """Right where any head is right."""
    domain_oracle: Two
    """For clean pictures and for every corruption the head that is best there, as if the domain were known."""
    captured: dict[str, float | None]
    """Rule -> share of the gap between best head and oracle that it closes on the mix; negative where it loses."""
    captured_domain: dict[str, float | None]
    """The same of the gap between best head and domain oracle; None where that gap is below 0.05 points."""


class Detection(Section):
    """Area under the ROC curve of a score; None where one side is empty."""

    score: str
    shift: float | None
    """Corrupted (counted) against clean pictures."""
    errors_clean: float | None
    """Wrong against right answers of the default router, on clean pictures."""
    errors_corrupted: float | None


class Diagram(Section):
    """Reliability diagram; empty bins are None."""

    edges: list[float]
    counts: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]


class Diagrams(Section):
    clean: Diagram
    corrupted: Diagram


class Histogram(Section):
    """Share of the views in each bin of predictive entropy."""

    edges: list[float]
    """nats."""
    clean: list[float]
    corrupted: list[float]


class Corrupted(Section):
    """One corruption: answerer -> accuracy at severities 1 to 5."""

    counted: bool
    """False where training or calibration saw this corruption; it is then in no headline figure."""
    accuracy: dict[str, list[float]]
    oracle: list[float]


class MeanCorruptionError(Section):
    """mCE in percent, over the counted corruptions."""

    yardstick: Literal["alexnet", "original"]
    """Whose errors are 100: AlexNet's on ImageNet-C itself at 224 pixels, else this evaluation's own original's."""
    values: dict[str, float]
    """By answerer."""


class OnShift(Section):
    """How well one answerer does on one shift; measures as in Answerer."""

    accuracy: float
    negative_flips: float | None
    positive_flips: float | None
    ece: float
    brier: float
    nll: float
    accuracy_at_80: float
    over_original: Difference | None


class Shift(Section):
    """A named shift: pictures of the model's classes from elsewhere, or the test pictures in another style."""

    reader: str
    """How the set was read (train.data.shift_sets), or "style"."""
    source: str
    """As the user gave it."""
    pictures: int
    classes: int
    """That occur among the right answers."""
    counted: bool
    """False where training drew views of this very style."""
    note: str
    digest: str
    answerers: dict[str, OnShift]
    severities: list[int] = []
    corruptions: dict[str, Corrupted] = {}
    """Of ImageNet-C."""
    mce: MeanCorruptionError | None = None


class Outside(Section):
    """Pictures of other things than the model's classes, and how well each score tells them from the clean test
    pictures."""

    source: str
    pictures: int
    digest: str
    auroc: dict[str, float | None]
    """Score -> area under the ROC curve, other things being the positives."""


class Attacked(Section):
    """One answerer under one attack of one radius."""

    answerer: str
    attack: str
    """As train.evaluation.adversarial.ATTACKS names them."""
    eps: float
    accuracy: float


class Attacks(Section):
    """Accuracy under attack, all on the same pictures, but for AutoAttack, which may be tried on some of them."""

    norm: Literal["linf", "l2"]
    eps: float
    """The radius that was asked for, in units of pixels in [0, 1]; rows may hold others of a curve."""
    pictures: int
    autoattack_pictures: int | None = None
    """Those of them that AutoAttack was tried on; None: all, or it was not asked for."""
    seed: int
    steps: dict[str, int]
    """Attack -> gradient steps of an attempt."""
    clean: dict[str, float]
    """Answerer -> accuracy on the same pictures, not attacked."""
    rows: list[Attacked]
    cpu_seconds: float
    wall_seconds: float


class Results(Section):
    """results.json, schema version 1.

    What a later release adds to a version is optional and has a default, so that older files stay readable; what
    changes its meaning makes a new version.
    """

    format: Literal["trivium-results"] = "trivium-results"
    schema_version: Literal[1] = 1
    command: str
    seed: int
    versions: dict[str, str]
    cpu_seconds: float
    wall_seconds: float
    model: Model
    data: Data
    severities: list[int]
    left_out: list[str]
    """Corruptions that training or calibration saw."""
    trained_on: list[str]
    """Kinds of augmented views used in training, where known."""
    answerers: list[Answerer]
    corruptions: dict[str, Corrupted]
    bounds: Bounds
    detection: list[Detection]
    head_share: dict[str, dict[str, dict[str, float]]]
    """Rule -> "0" (clean), "1" to "5" (severity) -> label of who answered -> share; only rules that change heads."""
    reliability: dict[str, Diagrams]
    entropy: dict[str, Histogram]
    """Head -> its predictive entropy."""
    attacks: Attacks | None = None
    calibration: Calibration | None
    costs: dict[str, dict[str, Any]]
    """Training stage -> what it took, where the checkpoint or bundle says it."""
    mce: MeanCorruptionError | None = None
    """Of `corruptions`; None without an original."""
    shifts: dict[str, Shift] = {}
    ood: dict[str, Outside] = {}

    def answerer(self, name: str) -> Answerer:
        return next(each for each in self.answerers if each.name == name)

    @property
    def default(self) -> Answerer:
        return next(each for each in self.answerers if each.default)

    @property
    def run_seed(self) -> int:
        """Of training where it is known, else of the evaluation."""
        return self.seed if self.model.training_seed is None else self.model.training_seed


def write_results(results: Results, path: Path) -> None:
    path.write_text(json.dumps(results.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Raises: ConfigError in one line."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: no valid JSON") from None
    if not isinstance(document, dict) or document.get("format") != "trivium-results":
        raise ConfigError(f"{path}: not the results of trivium evaluate")
    if document.get("schema_version") != SCHEMA_VERSION:
        found = str(document.get("schema_version"))[:40]
        raise ConfigError(f"{path}: schema version {found}, this release reads {SCHEMA_VERSION}")
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def short(value: float) -> float:
    """To six digits, as results hold it."""
    return round(float(value), 6)


def write_csv(results: Results, path: Path) -> None:
    """One row for every answerer and kind of picture: answerer, role, default, kind, severity, counted, accuracy.

    A kind is clean, a corruption, or the name of a shift (severity 0).
    """
    clean = {each.name: each.accuracy.clean for each in results.answerers}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["answerer", "role", "default", "kind", "severity", "counted", "accuracy"])
        for each in results.answerers:
            first = [each.name, each.role, int(each.default)]
            writer.writerow([*first, "clean", 0, 1, clean[each.name]])
            for kind, found in results.corruptions.items():
                for severity, value in zip(results.severities, found.accuracy[each.name], strict=True):
                    writer.writerow([*first, kind, severity, int(found.counted), value])
            for kind, shift in results.shifts.items():
                writer.writerow([*first, kind, 0, int(shift.counted), shift.answerers[each.name].accuracy])

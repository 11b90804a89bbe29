"""Were the promises kept? A server's log of answers against labels that came later."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from .binomial import clopper_pearson
from .errors import ConfigError
from .logs import ID_LENGTH

Measure = Literal["accuracy", "coverage", "risk"]
Label = int | str
Model = tuple[str, str]
"""Name and version."""
Key = tuple[Model, Measure, float | None]
"""What is measured against which promise."""


@dataclass(frozen=True)
class Answer:
    """What a line of the log says of one request."""

    seconds: float
    """When, since 1970."""
    model: Model
    class_id: list[int]
    sets: list[list[int]] | None
    coverage: float | None
    abstain: list[bool] | None
    max_risk: float | None


@dataclass(frozen=True)
class Row:
    """One measure of one model's answers, over some time."""

    model: str
    version: str
    measure: Measure
    """accuracy; coverage of the prediction sets; risk, the share of errors among the pictures not abstained from."""
    promise: float | None
    pictures: int
    """Of which the share is."""
    share: float | None
    low: float
    high: float
    """The interval of the true share."""
    broken: bool
    """Whether the promise lies beyond the interval."""
    answered: float | None = None
    """Of risk: the share of the pictures that were not abstained from."""
    size: float | None = None
    """Of coverage: classes in a set, on average."""


@dataclass(frozen=True)
class Window:
    """A span of time that has labelled answers."""

    start: str
    rows: list[Row]


@dataclass
class Report:
    """What came of joining answers with labels."""

    labelled: int = 0
    """Pictures with an answer and a label."""
    without_answer: int = 0
    """Labels whose request, or whose picture of it, the log does not have."""
    ambiguous: int = 0
    """Labels of requests whose id another request with other answers has too; they are left out."""
    without_label: int = 0
    """Pictures answered."""
    rows: list[Row] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether a promise was broken, over all of the time; of many windows some are beyond theirs by chance."""
        return any(row.broken for row in self.rows)


class Tally:
    """Counts of one span of time: of every model, measure and promise."""

    def __init__(self) -> None:
        self.hits: Counter[Key] = Counter()
        self.counts: Counter[Key] = Counter()
        self.classes: Counter[tuple[Model, float | None]] = Counter()
        self.asked: Counter[tuple[Model, float | None]] = Counter()

    def add(self, answer: Answer, index: int, label: int) -> None:
        """Count one picture of a request."""
        model, right = answer.model, answer.class_id[index] == label
        self._count(model, "accuracy", None, right)
        if answer.sets is not None:
            self._count(model, "coverage", answer.coverage, label in answer.sets[index])
            self.classes[model, answer.coverage] += len(answer.sets[index])
        if answer.abstain is not None and answer.max_risk is not None:
            self.asked[model, answer.max_risk] += 1
            if not answer.abstain[index]:
                self._count(model, "risk", answer.max_risk, not right)

    def _count(self, model: Model, measure: Measure, promise: float | None, hit: bool) -> None:
        self.counts[model, measure, promise] += 1
        self.hits[model, measure, promise] += hit

    def rows(self, confidence: float) -> list[Row]:
        """Shares with their intervals."""
        rows = []
        # where all was abstained from there is no count
        unanswered: set[Key] = {(model, "risk", promise) for model, promise in self.asked}
        keys: set[Key] = self.counts.keys() | unanswered
        for model, measure, promise in sorted(keys, key=lambda key: (key[0], key[1], key[2] or 0.0)):
            key = model, measure, promise
            hits, count = self.hits[key], self.counts[key]
            low, high = clopper_pearson(hits, count, confidence)
            broken = promise is not None and (high < promise if measure == "coverage" else low > promise)
            rows.append(
                Row(
                    *model,
                    measure,
                    promise,
                    count,
                    hits / count if count else None,
                    low,
                    high,
                    broken,
                    answered=count / self.asked[model, promise] if measure == "risk" else None,
                    size=self.classes[model, promise] / count if measure == "coverage" else None,
                )
            )
        return rows


def join(
    answers: Iterable[tuple[str, Answer]], labels: dict[str, dict[int, int]], confidence: float, window: float
) -> Report:
    """Measure all answers that have labels.

    Args:
        answers: by request id; one that comes again with the same answers counts once, with others not at all.
        labels: class by request id and number of the picture in its request.
        confidence: probability with which an interval holds the true share.
        window: seconds; 0 for none.
    """
    report = Report()
    found: dict[str, Answer | None] = {}
    for name, answer in answers:
        if name not in labels:
            report.without_label += len(answer.class_id)
        elif (known := found.setdefault(name, answer)) is not answer and known is not None:
            same = (known.model, known.class_id, known.sets) == (answer.model, answer.class_id, answer.sets)
            found[name] = known if same else None
    total, windows = Tally(), dict[float, Tally]()
    for name, own in labels.items():
        if name not in found:
            report.without_answer += len(own)
            continue
        chosen = found[name]
        if chosen is None:
            report.ambiguous += len(own)
            continue
        start = chosen.seconds // window * window if window else 0.0
        report.without_label += len(chosen.class_id)
        for index, label in own.items():
            if index >= len(chosen.class_id):
                report.without_answer += 1
                continue
            report.labelled += 1
            report.without_label -= 1
            total.add(chosen, index, label)
            windows.setdefault(start, Tally()).add(chosen, index, label)
    report.rows = total.rows(confidence)
    if window:
        report.windows = [Window(_moment(start), one.rows(confidence)) for start, one in sorted(windows.items())]
    return report


def read_answers(paths: Sequence[Path]) -> Iterator[tuple[str, Answer]]:
    """The answers in logs that `trivium serve --access-log --log-format json` wrote; other lines are passed over.

    Raises: ConfigError where a file cannot be read, or has no answer.
    """
    for path in paths:
        some = False
        for line in _lines(path):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or record.get("message") != "answered" or "class_id" not in record:
                    continue
                coverage, max_risk = record.get("coverage"), record.get("max_risk")
                answer = Answer(
                    datetime.fromisoformat(record["time"].replace("Z", "+00:00")).timestamp(),
                    (str(record["model"]), str(record["version"])),
                    [int(one) for one in record["class_id"]],
                    [list(map(int, one)) for one in record["prediction_set"]] if "prediction_set" in record else None,
                    None if coverage is None else float(coverage),
                    [bool(one) for one in record["abstain"]] if "abstain" in record else None,
                    None if max_risk is None else float(max_risk),
                )
                name = str(record["request_id"])
            except (ValueError, TypeError, KeyError, AttributeError):
                # a log holds other programs' lines, and ends within one
                continue
            if all(one is None or len(one) == len(answer.class_id) for one in (answer.sets, answer.abstain)):
                some = True
                yield name, answer
        if not some:
            raise ConfigError(f"{path}: no answer in it; they are logged by: serve --access-log --log-format json")


def read_labels(path: Path, classes: Sequence[str] | None) -> dict[str, dict[int, int]]:
    """Lines of {"id": ..., "label": ...}, with "index" for one of several pictures, or "labels" for all of them.

    A label is a class's number, or its name where `classes` are given; null is none. The last of several counts.

    Raises: ConfigError that names the line.
    """
    numbers = {name: number for number, name in enumerate(classes or ())}
    found: dict[str, dict[int, int]] = {}
    for place, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name, index = record["id"], record.get("index", 0)
            given = record["labels"] if "labels" in record else [record["label"]]
            if not isinstance(name, str) or not isinstance(given, list) or type(index) is not int or index < 0:
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                f'{path}, line {place}: expected {{"id": "...", "label": ...}}, perhaps "index" too, or "labels": [...]'
            ) from None
        for offset, label in enumerate(given):
            if label is not None:
                found.setdefault(name[:ID_LENGTH], {})[index + offset] = _class(label, numbers, f"{path}, line {place}")
    if not found:
        raise ConfigError(f"{path}: no label in it")
    return found


def _class(label: object, numbers: dict[str, int], place: str) -> int:
    if type(label) is int and 0 <= label < (len(numbers) or label + 1):
        return label
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    if isinstance(label, str) and not numbers:
        raise ConfigError(f"{place}: {label[:100]!r} is a class's name; name the model's classes with --bundle")
    raise ConfigError(f"{place}: no such class: {str(label)[:100]!r}")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")

"""Answers of a log joined with labels, by hand and by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trivium.runtime.binomial import clopper_pearson
from trivium.runtime.errors import ConfigError
from trivium.runtime.feedback import Report, join, read_answers, read_labels
from trivium.runtime.feedback_cli import BROKEN


def line(name: str, class_id: list[int], **changes: Any) -> str:
    record = {
        "time": "2026-03-01T23:59:59.500Z", "level": "info", "logger": "trivium.access", "message": "answered",
        "status": "OK", "request_id": name, "model": "m", "version": "1", "router": "clean", "class_id": class_id,
        "coverage": 0.9, "prediction_set": [[one, 7] for one in class_id],
        "max_risk": 0.1, "abstain": [False] * len(class_id), "shift_score": [0.5] * len(class_id),
    }  # fmt: skip
    return json.dumps({key: value for key, value in (record | changes).items() if value is not None})


def measured(tmp_path: Path, log: list[str], labels: list[Any], window: float = 86400.0) -> Report:
    (tmp_path / "log").write_text("\n".join(log))
    (tmp_path / "labels").write_text("\n".join(json.dumps(one) for one in labels))
    return join(read_answers([tmp_path / "log"]), read_labels(tmp_path / "labels", None), 0.95, window)


def rows(report: Report) -> dict[str, tuple[int, float | None]]:
    return {row.measure: (row.pictures, row.share) for row in report.rows}


def test_shares_are_those_counted_by_hand(tmp_path: Path) -> None:
    log = [
        line("a", [1, 2, 3], abstain=[False, False, True]),
        line("b", [4], time="2026-03-02T00:00:00.100Z"),
        "starting ...",
        line("c", [5]),
        '{"message": "answered", "class_id": [1',
    ]
    labels = [
        {"id": "a", "labels": [1, 7, 9]},
        {"id": "b", "label": 0},
        {"id": "b", "index": 1, "label": 0},
        {"id": "d", "label": 1},
    ]
    report = measured(tmp_path, log, labels)
    assert (report.labelled, report.without_answer, report.without_label, report.ambiguous) == (4, 2, 1, 0)
    assert rows(report) == {"accuracy": (4, 0.25), "coverage": (4, 0.5), "risk": (3, 2 / 3)}
    by_measure = {row.measure: row for row in report.rows}
    assert by_measure["risk"].answered == 0.75
    assert by_measure["coverage"].size == 2
    assert (by_measure["accuracy"].low, by_measure["accuracy"].high) == clopper_pearson(1, 4, 0.95)
    assert [window.start for window in report.windows] == ["2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z"]
    assert [sum(row.pictures for row in window.rows if row.measure == "accuracy") for window in report.windows] == [
        3,
        1,
    ]


def test_a_promise_is_broken_only_beyond_its_interval(tmp_path: Path) -> None:
    def broken(right: int, count: int, **changes: Any) -> set[str]:
        log = [line(str(i), [1], prediction_set=[[1]], **changes) for i in range(count)]
        labels = [{"id": str(i), "label": int(i < right)} for i in range(count)]
        return {row.measure for row in measured(tmp_path, log, labels).rows if row.broken}

    assert broken(90, 100) == set()
    # 84 of 100 may come of a true share of 0.9
    assert broken(84, 100) == set()
    assert broken(80, 100) == {"coverage", "risk"}
    assert broken(80, 100, max_risk=None) == {"coverage"}
    assert broken(0, 100, abstain=[True], coverage=0.05) == {"coverage"}
    assert broken(3, 5) == set()


def test_answers_without_promises_have_an_accuracy(tmp_path: Path) -> None:
    bare = line("a", [1], prediction_set=None, coverage=None, abstain=None, max_risk=None)
    assert rows(measured(tmp_path, [bare], [{"id": "a", "label": 1}])) == {"accuracy": (1, 1.0)}


def test_where_all_is_abstained_from_nothing_is_known_of_the_risk(tmp_path: Path) -> None:
    report = measured(tmp_path, [line("a", [1], abstain=[True])], [{"id": "a", "label": 2}])
    (risk,) = [row for row in report.rows if row.measure == "risk"]
    assert (risk.pictures, risk.share, risk.answered, risk.broken) == (0, None, 0.0, False)


def test_an_id_of_two_requests_counts_once_or_not_at_all(tmp_path: Path) -> None:
    again = [line("a", [1]), line("a", [1]), line("b", [1]), line("b", [2]), line("b", [1])]
    report = measured(tmp_path, again, [{"id": "a", "label": 1}, {"id": "b", "label": 1}])
    assert (report.labelled, report.ambiguous) == (1, 1)


def test_versions_and_promises_are_measured_apart(tmp_path: Path) -> None:
    log = [line("a", [1]), line("b", [1], version="2"), line("c", [1], coverage=0.95)]
    report = measured(tmp_path, log, [{"id": name, "label": 1} for name in "abc"])
    assert [(row.version, row.promise) for row in report.rows if row.measure == "coverage"] == [
        ("1", 0.9),
        ("1", 0.95),
        ("2", 0.9),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no label in it"),
        ("{}", "line 1: expected"),
        ('{"id": "a", "label": 1}\n[]', "line 2: expected"),
        ('{"id": "a", "index": -1, "label": 1}', "line 1: expected"),
        ('{"id": "a", "label": -1}', "no such class: '-1'"),
        ('{"id": "a", "label": true}', "no such class"),
        ('{"id": "a", "label": "cat"}', "name the model's classes with --bundle"),
    ],
)
def test_labels_that_cannot_be_read_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_labels(tmp_path / "labels", None)


def test_labels_may_be_names_where_the_classes_are_known(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text('{"id": "a", "labels": ["dog", null, 0]}')
    assert read_labels(tmp_path / "labels", ["cat", "dog"]) == {"a": {0: 1, 2: 0}}
    (tmp_path / "labels").write_text('{"id": "a", "label": 2}')
    with pytest.raises(ConfigError, match="no such class: '2'"):
        read_labels(tmp_path / "labels", ["cat", "dog"])


def test_a_log_without_answers_says_how_they_are_logged(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line("a", [1]).replace("answered", "refused"))
    with pytest.raises(ConfigError, match="--access-log --log-format json"):
        list(read_answers([tmp_path / "log"]))


def test_the_command_prints_and_ends_by_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(line(str(i), [1], prediction_set=[[1]]) for i in range(50)))

    def run(right: int, *more: str) -> subprocess.CompletedProcess[str]:
        labels = "\n".join(json.dumps({"id": str(i), "label": int(i < right)}) for i in range(50))
        (tmp_path / "labels").write_text(labels)
        command = [sys.executable, "-m", "trivium", "feedback", "--answers", "log", "--labels", "labels", *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    kept = run(47)
    assert kept.returncode == 0, kept.stderr
    assert "0.9400" in kept.stdout
    assert "BROKEN" not in kept.stdout
    broken = run(30, "--json")
    assert broken.returncode == BROKEN
    document = json.loads(broken.stdout)
    assert document["broken"] is True
    assert {row["measure"]: row["share"] for row in document["rows"]} == {"accuracy": 0.6, "coverage": 0.6, "risk": 0.4}
    assert run(47, "--confidence", "2").returncode == 2

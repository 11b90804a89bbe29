"""Studies: what they ask for, in which order it is done, and the tables of what came out."""

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from trivium.runtime.errors import ClientError, ConfigError
from trivium.train.evaluation.results import read_results
from trivium.train.recipe import load_recipe
from trivium.train.studies import study as module
from trivium.train.studies import tables
from trivium.train.studies.study import Job, Study, carry_out, load_study, studies

ROWS: list[dict[str, Any]] = [
    {"name": "base", "title": "base"},
    {
        "name": "second",
        "title": "second",
        "after": "base",
        "settings": {"seed": 1, "heads.sources": {"robust": "{runs}/base/{seed}/run"}},
    },
    {"name": "third", "title": "third", "after": "second", "charged": ["base"]},
]


def study(**changes: Any) -> Study:
    return Study.model_validate({"name": "s", "title": "S", "recipe": "demo", "rows": ROWS, "seeds": [0, 1]} | changes)


def jobs_of(found: Study, out: Path) -> list[Job]:
    return [Job(found, row, seed, out) for row in found.rows for seed in found.seeds]


@pytest.mark.parametrize("name", studies())
def test_every_row_of_the_studies_that_come_along_is_a_recipe(name: str, tmp_path: Path) -> None:
    for job in jobs_of(load_study(name), tmp_path):
        train, evaluate = job.commands()
        settings = [after for before, after in itertools.pairwise(train) if before == "--set"]
        load_recipe(train[1], settings)
        assert evaluate[1] == train[train.index("--out") + 1]
        assert not any(place in part for part in (*settings, *evaluate) for place in ("{runs}", "{seed}"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": [ROWS[1]]}, "rows: second comes after base, which is no row before it"),
        ({"rows": [ROWS[0], ROWS[0]]}, "rows: two rows are called base"),
        ({"rows": [ROWS[0] | {"charged": ["loud"]}]}, "base is charged for loud, which is no row before it"),
        ({"rows": []}, "rows: "),
        ({"colour": 1}, "colour: "),
    ],
)
def test_a_wrong_study_is_one_line(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    document = {"name": "s", "title": "S", "recipe": "demo", "rows": ROWS} | change
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match=reason) as caught:
        load_study(str(tmp_path / "s.yaml"))
    assert "\n" not in str(caught.value)


def test_unknown_names_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study 'loud': there are .*fashion-mnist"):
        load_study("loud")
    with pytest.raises(ConfigError, match=r"no row 'loud'; it has: base, second, third$"):
        study().only(["loud"])
    (tmp_path / "s.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_study(str(tmp_path / "s.yaml"))


def test_a_row_may_name_the_runs_before_it(tmp_path: Path) -> None:
    train, _ = jobs_of(study(), tmp_path)[3].commands()
    assert f'heads.sources={{"robust": "{tmp_path}/s/base/1/run"}}' in train
    assert train[train.index("--reuse") + 1] == f"{tmp_path}/s/base/1/run"


def test_chosen_rows_bring_those_they_build_on() -> None:
    assert [row.name for row in study().only(["second"]).rows] == ["base", "second"]


class Recorder(Job):
    """A job that writes down when it began and ended, and fails where it is told to."""

    words: list[str]
    broken: tuple[str, ...] = ()

    def do(self, stop: threading.Event, threads: int) -> None:
        self.words.append(f"begin {self.row.name} {self.seed}")
        if self.row.name in self.broken:
            raise ClientError(f"{self.label}: broken")
        self.words.append(f"end {self.row.name} {self.seed}")


def recorders(words: list[str], broken: tuple[str, ...], out: Path) -> list[Job]:
    found = study()
    jobs = [Recorder(found, row, seed, out) for row in reversed(found.rows) for seed in found.seeds]
    for job in jobs:
        job.words, job.broken = words, broken
    return list(jobs)


@pytest.mark.parametrize("workers", [1, 3])
def test_each_run_waits_for_the_one_it_builds_on(workers: int, tmp_path: Path) -> None:
    words: list[str] = []
    assert carry_out(recorders(words, (), tmp_path), workers, Console(quiet=True)) == []
    assert len(words) == 12
    for seed in (0, 1):
        order = [word.removesuffix(f" {seed}") for word in words if word.endswith(f" {seed}")]
        assert order == [f"{what} {name}" for name in ("base", "second", "third") for what in ("begin", "end")]


def test_what_builds_on_a_failure_is_left_out_and_the_rest_is_done(tmp_path: Path) -> None:
    words: list[str] = []
    failures = carry_out(recorders(words, ("second",), tmp_path), 2, Console(quiet=True))
    assert sorted(failures) == [
        "s: second, seed 0: broken",
        "s: second, seed 1: broken",
        "s: third, seed 0: left out, since second failed",
        "s: third, seed 1: left out, since second failed",
    ]
    assert "end base 1" in words
    assert not any("third" in word for word in words)


def test_a_command_that_fails_is_one_line(tmp_path: Path) -> None:
    job = jobs_of(study(recipe=str(tmp_path / "absent.yaml")), tmp_path)[0]
    with pytest.raises(ClientError, match=r"s: base, seed 0: .*absent\.yaml: unreadable") as caught:
        job.do(threading.Event(), 1)
    assert "\n" not in str(caught.value)
    assert job.results() is None


def test_finished_runs_count_only_for_the_same_commands(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(study(), finished)
    assert all(job.results() is not None for job in jobs)
    monkeypatch.setattr(Job, "do", lambda *_: pytest.fail("done before"))
    assert carry_out(jobs, 1, Console(quiet=True)) == []
    other = jobs_of(study(evaluate=["--pictures", "7"]), finished)
    assert all(job.results() is None for job in other)


def test_tables_hold_mean_and_spread_over_the_seeds(finished: Path) -> None:
    found = study(
        shifts={"style": ["sketch", "inversion"], "absent": ["loud"]},
        comparisons=[
            {"row": "second", "against": "base", "measure": "mCA", "kind": "ratio"},
            {"row": "second", "against": "base", "measure": "clean"},
            {"row": "second", "against": "nothing", "measure": "clean"},
        ],
    )
    jobs = jobs_of(found, finished)
    runs = tables.finished(jobs)
    table = tables.tabulate(found, runs)
    assert list(table) == ["base", "second", "third"]
    assert table["base"]["clean"].values == [0.9, 0.92]
    assert table["base"]["clean"].mean == pytest.approx(0.91)
    assert table["base"]["clean"].deviation == pytest.approx(0.02 / 2**0.5)
    assert table["base"]["style"].values == pytest.approx([0.7, 0.7])
    assert tables.seen(found, runs)["base"] == ["style"]  # training drew inverted views
    assert table["base"]["CPU s"].values == [12, 12]  # the original's 100 are not in it
    assert table["third"]["CPU s"].values == [24, 24]
    assert "absent" not in table["base"]
    ratio, difference = tables.compare(found, table)
    assert ratio["mean"] == pytest.approx(1.0)
    assert difference["values"] == pytest.approx([0.01, 0.01])
    # of either seed the three stages once, and three evaluations
    assert tables.spent(runs) == 2 * (100 + 5 + 7 + 3)
    document = json.loads(json.dumps(tables.document({"s": (found, jobs)})))
    text = tables.page(document)
    assert "All runs together: 230 CPU-seconds" in text
    assert "| base | 91.0 ± 1.4 |" in text
    assert "| 70.0 ± 0.0 † |" in text
    assert "- second against base, clean: +1.0 ± 0.0 points" in text


def test_the_trade_off_has_a_table_of_its_own() -> None:
    cell = {"mean": 0.5, "deviation": 0.01, "values": [0.49, 0.5, 0.51]}
    gain = {"mean": 0.02, "deviation": 0.01, "values": [0.01, 0.02, 0.03]}
    differences = {name: {**gain, "intervals": [[0.0, -0.1, 0.1], [0.0, 0.01, 0.1]]} for name in tables.DIFFERENCES}
    found = {"eps": 0.098, "rows": {"gate": {"clean": cell}}, "differences": differences, "share_of_gap": cell}
    text = tables.page(tables.document({}, found))
    assert "| gate | 50.0 ± 1.0 |" in text
    assert "- gate over the better head: +2.0 ± 1.0 points, above 0 with its 95 % interval in 1 of 3 seeds" in text
    assert "share of the gap between the best head and the oracle: 50.0 ± 1.0 %" in text


def test_a_row_with_a_missing_seed_is_left_out(finished: Path) -> None:
    found = study(seeds=[0, 1, 2])
    jobs = jobs_of(found, finished)
    assert tables.tabulate(found, tables.finished(jobs)) == {}
    assert "Not finished, so not here: base, second, third." in tables.page(tables.document({"s": (found, jobs)}))


def test_a_row_of_an_unknown_answerer_is_one_line(finished: Path) -> None:
    found = study()
    row = found.rows[0].model_copy(update={"answerers": {"loud": "loud"}})
    found = found.model_copy(update={"rows": (row,)})
    with pytest.raises(ConfigError, match=r"loud: no answerer 'loud' in .*: original, combined$"):
        tables.tabulate(found, tables.finished(jobs_of(found, finished)))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The results of every run of `study()`."""
    for job in jobs_of(study(), tmp_path):
        better = {"base": 0.0, "second": 0.01, "third": 0.02}[job.row.name] + 0.02 * job.seed
        job.evaluation.mkdir(parents=True)
        (job.evaluation / "results.json").write_text(json.dumps(results(0.9 + better)))
        (job.directory / "commands.json").write_text(json.dumps(job.commands()))
        read_results(job.evaluation / "results.json")
    return tmp_path


def results(clean: float) -> dict[str, Any]:
    two = {"clean": clean, "corrupted": 0.5}
    difference = {"mean": 0.0, "low": 0.0, "high": 0.0}
    answerer = {
        "role": "head", "default": False, "accuracy": two, "negative_flips": two, "positive_flips": two, "ece": two,
        "brier": two, "nll": two, "accuracy_at_80": two, "over_original": None,
        "over_best_head": {"clean": difference, "corrupted": difference},
    }  # fmt: skip
    on_shift = {
        "negative_flips": None, "positive_flips": None, "ece": 0, "brier": 0, "nll": 0, "accuracy_at_80": 0,
        "over_original": None,
    }  # fmt: skip
    shift = {"reader": "style", "source": "", "pictures": 1, "classes": 1, "note": "", "digest": ""}
    return {
        "format": "trivium-results", "schema_version": 1,
        "command": "", "seed": 0, "versions": {}, "cpu_seconds": 1, "wall_seconds": 1,
        "model": {
            "kind": "checkpoint", "path": "run", "name": "m", "heads": ["combined"], "classes": ["a", "b"],
            "routers": ["combined"], "default_router": "combined", "original": "",
        },
        "data": {"source": "digits", "split": "test", "pictures": 10, "corrupted": 5, "digest": ""},
        "severities": [1], "left_out": [], "trained_on": [],
        "answerers": [
            {"name": "original", **answerer, "role": "original"}, {"name": "combined", **answerer, "default": True}
        ],
        "corruptions": {},
        "bounds": {
            "best_head": "combined", "best_head_accuracy": two, "oracle": two, "domain_oracle": two, "captured": {},
            "captured_domain": {},
        },
        "detection": [], "head_share": {}, "reliability": {}, "entropy": {}, "calibration": None,
        "costs": {"original": {"cpu_seconds": 100}, "teacher": {"cpu_seconds": 5}, "student": {"cpu_seconds": 7}},
        "shifts": {
            name: {**shift, "counted": name != "inversion", "answerers": {"combined": {**on_shift, "accuracy": value}}}
            for name, value in (("sketch", 0.5), ("inversion", 0.9))
        },
    }  # fmt: skip


def test_a_stop_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    job = jobs_of(study(), tmp_path)[0]
    monkeypatch.setattr(module.sys, "executable", "/bin/sh")
    (tmp_path / "trivium").write_text("echo begun; exec sleep 60\n")  # what `sh -m trivium` runs
    monkeypatch.chdir(tmp_path)
    at_work = threading.Thread(target=job.do, args=(stop, 1))
    at_work.start()
    deadline = time.monotonic() + 20
    while "begun" not in (job.directory / "log.txt").read_text() if (job.directory / "log.txt").exists() else True:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stop.set()
    at_work.join(20)
    assert not at_work.is_alive()
    assert not (job.directory / "commands.json").exists()

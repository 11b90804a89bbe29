"""trivium report: runs grouped by name and seed, mean and spread, the page, Markdown and JSON, what is refused."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.browser import CHROMIUM, WHY_NOT, overflow
from tests.commands import called

from trivium.runtime.errors import ConfigError
from trivium.train import report_cli
from trivium.train.data.pictures import DataSpec, load_pictures
from trivium.train.evaluation.columns import cost, radius, robust
from trivium.train.evaluation.evaluate import evaluate
from trivium.train.evaluation.overview_charts import COLORS, front, pooled, series
from trivium.train.evaluation.results import Diagram, Diagrams, Results
from trivium.train.evaluation.subject import BundleSubject
from trivium.train.evaluation.summary import Comparison, Spread, compare, document, read_runs, show, spread, tables

NASTY = "<script>alert(1)</script> & co"
EPS = (2 / 255, 4 / 255, 8 / 255)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, single_head_bundle: Path) -> dict[str, Any]:
    """A real evaluation of the tiny bundle with styles and other data, as results.json holds it."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for i in range(10):
        for split in ("train", "val", "test"):
            target = root / split / f"class {i}"
            target.mkdir(parents=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(target / "0.png")
    subject, original = BundleSubject(str(tiny_bundle)), BundleSubject(str(single_head_bundle))
    settings = subject.manifest.preprocessing
    pictures = load_pictures(DataSpec(kind="imagefolder", root=root), "test", settings)
    digits = load_pictures(DataSpec(kind="digits", limit=20), "test", settings)
    results, _ = evaluate(subject, pictures, original=original, styles=True, outside={"digits": digits})
    return results.model_dump(mode="json")


@pytest.fixture
def write(measured: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """write(name, seed, gain, seconds, attacked=...) puts a run of a made-up method into a directory of its own: the
    measured results, every answerer but the original better by `gain` everywhere."""

    def write(name: str, seed: int, gain: float = 0.0, seconds: float = 10.0, attacked: bool = False) -> Path:
        run = copy.deepcopy(measured)
        run["model"] |= {"name": name, "training_seed": seed}
        run["seed"] = 100 + seed
        for each in run["answerers"]:
            if each["role"] != "original":
                for part in ("clean", "corrupted"):
                    each["accuracy"][part] = 0.5 + gain
        run["costs"] = {"original": {"cpu_seconds": 500.0}, "student": {"cpu_seconds": seconds}}
        if attacked:
            rows = [
                {"answerer": answerer, "attack": attack, "eps": round(eps, 6), "accuracy": 0.4 + gain - 5 * eps - less}
                for answerer in ("original", run["model"]["default_router"])
                for attack, less in (("pgd", 0.0), ("apgd", 0.01))
                for eps in EPS
            ]
            run["attacks"] = {
                "norm": "linf", "eps": round(EPS[-1], 6), "pictures": 10, "seed": 0, "steps": {"pgd": 20, "apgd": 50},
                "clean": {"original": 0.5, run["model"]["default_router"]: 0.5 + gain}, "rows": rows,
                "cpu_seconds": 1.0, "wall_seconds": 1.0,
            }  # fmt: skip
        path = tmp_path / "runs" / name.replace("/", "") / str(seed) / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(run))
        return path

    return write


def one(paths: list[Path]) -> Comparison:
    (found,) = compare(read_runs([str(path) for path in paths]))
    return found


def cell(found: Comparison, title: str, row: str, column: str) -> Spread | None:
    table = next(each for each in tables(found) if each.title.startswith(title))
    heads = [each.name for each in table.columns]
    return dict(table.rows)[row][heads.index(column)]


def command(*arguments: object) -> None:
    called(report_cli.main, "report", *arguments)


def test_seeds_of_one_name_are_one_row(write: Callable[..., Path]) -> None:
    gains = (0.1, 0.12, 0.2)
    paths = [write("three heads", seed, gain) for seed, gain in enumerate(gains)] + [write("probe", 0, 0.05)]
    found = one(paths)
    assert [row.name for row in found.rows] == ["original", "three heads", "probe"]
    accuracy = cell(found, "Accuracy, flips", "three heads", "corrupted accuracy")
    assert accuracy is not None
    assert accuracy.values == pytest.approx([0.5 + gain for gain in gains])
    assert accuracy.mean == pytest.approx(0.64)
    assert accuracy.deviation == pytest.approx(np.std(gains, ddof=1))
    assert show(accuracy, "share") == "64.0 ± 5.3"
    alone = cell(found, "Accuracy, flips", "probe", "corrupted accuracy")
    assert alone is not None
    assert (alone.deviation, show(alone, "share")) == (None, "55.0")


def test_every_head_and_router_has_a_row(write: Callable[..., Path]) -> None:
    found = one([write("three heads", 0), write("three heads", 1)])
    names = [row.name for row in found.answerers]
    assert "three heads: robust" in names
    assert "three heads: blend" in names
    assert not any("original" in name for name in names)


def test_originals_that_differ_within_a_seed_are_told_apart(write: Callable[..., Path]) -> None:
    first, second = write("a", 0), write("b", 0)
    document = json.loads(second.read_text())
    document["answerers"][0]["accuracy"]["clean"] += 0.05
    second.write_text(json.dumps(document))
    assert [row.name for row in one([first, second]).rows][:2] == ["a: original", "b: original"]


def test_the_original_flips_nothing_and_costs_nothing(write: Callable[..., Path]) -> None:
    found = one([write("a", 0, seconds=30.0)])
    assert cell(found, "Accuracy, flips", "original", "negative flips, clean") is None
    assert cell(found, "Accuracy, flips", "original", "training, CPU-s") == (0.0, None, [0.0])
    # what the original itself took is nobody's cost
    assert cell(found, "Accuracy, flips", "a", "training, CPU-s") == (30.0, None, [30.0])


def test_cost_is_told_in_gpu_seconds_where_stages_took_some(measured: dict[str, Any]) -> None:
    run = Results.model_validate(measured).model_copy(
        update={"costs": {"original": {"gpu_seconds": 9.0}, "student": {"cpu_seconds": 3.0, "gpu_seconds": 4.0}}}
    )
    assert cost(run, run.default, "gpu_seconds") == 4.0
    assert cost(run, run.default, "cpu_seconds") == 3.0
    assert cost(run.model_copy(update={"costs": {}}), run.default, "cpu_seconds") is None


def test_the_least_of_several_attacks_counts(write: Callable[..., Path]) -> None:
    found = one([write("a", 0, attacked=True), write("b", 0)])
    least = cell(found, "Accuracy under attack", "a", "least, Linf 8/255")
    pgd = cell(found, "Accuracy under attack", "a", "pgd, Linf 8/255")
    assert least is not None
    assert pgd is not None
    assert least.mean == pytest.approx(pgd.mean - 0.01)
    # a run that was not attacked has a dash, not a zero
    assert cell(found, "Accuracy under attack", "b", "pgd, Linf 8/255") is None
    (run, _) = found.runs
    assert robust("linf", 0.0)(run, run.default) == 0.5
    assert robust("l2", 0.5)(run, run.default) is None


def test_shifts_are_averaged_over_those_that_count(measured: dict[str, Any], write: Callable[..., Path]) -> None:
    path = write("a", 0)
    run = json.loads(path.read_text())
    run["shifts"]["sketch"]["counted"] = False
    path.write_text(json.dumps(run))
    found = one([path])
    default = run["model"]["default_router"]
    expected = [shift["answerers"][default]["accuracy"] for name, shift in run["shifts"].items() if name != "sketch"]
    mean = cell(found, "Accuracy on shifts", "a", "mean of those that count")
    assert mean is not None
    assert mean.mean == pytest.approx(np.mean(expected))
    assert cell(found, "Accuracy on shifts", "a", "sketch (seen by some)") is not None


def test_runs_on_other_data_stand_apart(write: Callable[..., Path]) -> None:
    first, second = write("a", 0), write("b", 0)
    document = json.loads(second.read_text())
    document["data"]["digest"] = "1" * 64
    second.write_text(json.dumps(document))
    assert [len(found.runs) for found in compare(read_runs([str(first), str(second)]))] == [1, 1]


def test_a_run_is_found_by_file_directory_or_name(write: Callable[..., Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        write("a", seed)
    root = tmp_path / "runs" / "a"
    assert [run.results.run_seed for run in read_runs([str(root)])] == [0, 1]
    # once is enough
    assert len(read_runs([str(root), str(root / "0"), str(root / "0" / "results.json")])) == 2
    assert {run.name for run in read_runs([f"ours={root}"])} == {"ours"}


def test_mistakes_are_one_line(write: Callable[..., Path], tmp_path: Path) -> None:
    first, second = write("a", 0), write("b", 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("{}")
    left_out = json.loads(second.read_text()) | {"left_out": ["fog"]}
    third = tmp_path / "third.json"
    third.write_text(json.dumps(left_out))
    for arguments, text in (
        ([tmp_path / "nowhere"], "no such file or directory"),
        ([tmp_path / "empty"], "no results.json in it or below"),
        ([tmp_path / "other.json"], "not the results"),
        ([first, f"a={second}"], "are both a with seed 0: give one another name"),
        ([first, third], "differ in left_out: \\[\\] and \\['fog'\\]"),
        ([first, "--out", first / "x.html"], "x.html: "),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            command(*arguments)
        assert "\n" not in str(caught.value)


def test_heads_that_differ_between_seeds_are_refused(write: Callable[..., Path]) -> None:
    first, second = write("a", 0), write("a", 1)
    run = json.loads(second.read_text())
    del run["answerers"][1]
    second.write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="the runs of a differ in their heads or routers"):
        one([first, second])


def test_markdown_and_json_hold_the_tables(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write("a", seed, 0.1 * seed, attacked=True) for seed in (0, 1)]
    words: list[object] = [*paths, "--out", tmp_path / "page.html", "--json", tmp_path / "all.json"]
    command(*words, "--markdown", "-")
    printed = capsys.readouterr().out
    assert "| | clean accuracy, % |" in printed
    assert re.search(r"\| a \| 55\.0 ± 7\.1 \|", printed)
    rows = [line.count("|") for line in printed.splitlines() if line.startswith("| ")]
    assert min(rows) > 2
    made = json.loads((tmp_path / "all.json").read_text())
    (part,) = made["comparisons"]
    assert part["rows"]["a"]["seeds"] == [0, 1]
    found = part["tables"]["Accuracy, flips and cost"]["a"]["clean accuracy"]
    assert found["values"] == [0.5, 0.6]
    assert made == json.loads(json.dumps(document([one(paths)])))
    command(*words, "--markdown", tmp_path / "tables.md")
    assert (tmp_path / "tables.md").read_text().strip() == printed.strip()


@pytest.fixture
def page(write: Callable[..., Path], tmp_path: Path) -> Path:
    paths = [write("three heads", seed, 0.1 + seed / 50, 20 + seed, True) for seed in range(3)]
    paths += [write(NASTY, 0, 0.05, 400.0, True), write("AT", 0, -0.1, 90.0)]
    command(*paths, "--out", tmp_path / "page.html")
    return tmp_path / "page.html"


def test_the_page_is_whole_in_itself(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert NASTY.split("&")[0].replace("<", "&lt;").replace(">", "&gt;") in text
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(each.startswith("data:") for each in references)
    assert "60.0 ± " not in text
    assert "62.0 ± 2.0" in text
    for heading in ("What accuracy costs", "Accuracy on shifts", "Accuracy under attack", "Robust accuracy by radius",
                    "Against other data", "Accuracy by corruption", "Is the confidence true?",
                    "What each stage took"):  # fmt: skip
        assert heading in text
    # accuracy against cost thrice, one plot by radius, fifteen of bars, four of reliability, four swatches
    assert text.count("<svg") == 3 + 1 + 15 + 4 + 4


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
@pytest.mark.parametrize("width", [1280, 800])
def test_a_browser_has_nothing_to_complain_about(page: Path, width: int) -> None:
    assert overflow(page, width) <= 0


def test_the_front_holds_what_nothing_beats_at_both() -> None:
    points = [(10, 0.5), (20, 0.4), (5, 0.3), (30, 0.7), (30, 0.6), (40, 0.7)]
    assert front(points) == [(5, 0.3), (10, 0.5), (30, 0.7)]


def test_rows_are_told_apart_by_colour_mark_or_dash() -> None:
    names = ["original", *(f"row {i}" for i in range(2 * len(COLORS)))]
    found = series(names)
    assert list(found) == names
    assert len({(each.color, each.mark, each.dash) for each in found.values()}) == len(names)


def test_pooled_diagrams_weigh_bins_by_their_answers() -> None:
    def diagram(counts: list[int], accuracy: list[float | None]) -> Diagrams:
        made = Diagram(edges=[0, 0.5, 1], counts=counts, confidence=accuracy, accuracy=accuracy)
        return Diagrams(clean=made, corrupted=made)

    found = pooled([diagram([0, 1], [None, 0.6]), diagram([0, 3], [None, 1.0])]).clean
    assert found.counts == [0, 4]
    assert found.accuracy[0] is None
    assert found.accuracy[1] == pytest.approx(0.9)


def test_formats() -> None:
    assert spread([0.1, None]) is None
    assert spread([]) is None
    assert show(None, "share") == "–"
    assert show(Spread(-0.0123, 0.004, []), "points") == "−1.2 ± 0.4"
    assert show(Spread(83.17, None, []), "number") == "83.2"
    assert show(Spread(1234.5, 3.2, []), "seconds") == "1234 ± 3"
    assert (radius("linf", round(8 / 255, 6)), radius("linf", 0.1), radius("l2", 0.5)) == (
        "Linf 8/255",
        "Linf 0.1",
        "L2 0.5",
    )

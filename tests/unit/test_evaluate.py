"""Evaluation: measures against plain recomputation, and the command over a real bundle and real picture files."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.commands import called

from trivium.runtime.bundle import open_bundle
from trivium.runtime.engine import Engine
from trivium.runtime.errors import BundleError, ConfigError
from trivium.runtime.router import route
from trivium.train import evaluate_cli
from trivium.train.checkpoint import CheckpointError
from trivium.train.data.pictures import DataSpec, load_pictures
from trivium.train.evaluation import evaluate
from trivium.train.evaluation.metrics import ALEXNET
from trivium.train.evaluation.results import Corrupted, Results, read_results
from trivium.train.evaluation.shifted import by_unit, mean_corruption_error
from trivium.train.evaluation.subject import BundleSubject, open_subject
from trivium.train.evaluation.tally import Tally, choose_pictures, labels_for, variants
from trivium.train.shifts.corruptions import TEST_CORRUPTIONS, corrupt
from trivium.train.shifts.styles import STYLES, restyle

CLASSES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, some_pictures: np.ndarray) -> Path:
    """An ImageFolder whose labels are what the tiny bundle's combined head answers, save every third."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 1), ("test", 3)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = some_pictures[generator.integers(12)].copy()
                picture[generator.integers(32) :, generator.integers(32) :] //= 2
                Image.fromarray(picture).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def out(folder: Path, tiny_bundle: Path, single_head_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("evaluation")
    command(*words(tiny_bundle, folder, single_head_bundle, target))
    return target


def words(bundle: Path, folder: Path, original: Path, out: Path) -> list[object]:
    """An evaluation of everything: the set "again" is the test pictures themselves."""
    words = [bundle, "--data", folder, "--original", original, "--pictures", 20, "--out", out]
    return [*words, "--shift", f"again={folder / 'test'}", "--styles", "--ood", "digits"]


@pytest.fixture(scope="module")
def results(out: Path) -> Results:
    return read_results(out / "results.json")


def command(*arguments: object) -> None:
    called(evaluate_cli.main, "evaluate", *arguments)


def toy(right: dict[str, list[list[bool]]]) -> Tally:
    """A tally of two pictures, clean and under one corruption, that a test fills: answerer -> [V][N] right."""
    tally = Tally([("clean", 0), *((TEST_CORRUPTIONS[0], s) for s in range(1, 6))], np.array([0, 0]))
    for name, rows in right.items():
        tally.class_id[name] = np.where(rows, 0, 1).astype(np.int32)
        tally.confidence[name] = np.full((6, 2), 0.9, np.float32)
    return tally


def test_views_are_15_corruptions_of_5_severities_and_clean() -> None:
    assert len(variants()) == 76
    assert variants()[0] == ("clean", 0)


def test_accuracy_agrees_with_a_plain_loop(results: Results, folder: Path, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    pictures = load_pictures(DataSpec(kind="imagefolder", root=folder), "test", bundle.manifest.preprocessing)
    chosen = choose_pictures(pictures, 20, 0)
    assert len(chosen) < len(pictures)
    engine = Engine(bundle)
    for kind, severity in (("clean", 0), ("fog", 2), ("pixelate", 5)):
        # clean figures are of all pictures, corrupted ones of those that were chosen
        seen = chosen if severity else np.arange(len(pictures))
        images = pictures.batch(seen).permute(0, 2, 3, 1).contiguous().numpy()
        view = corrupt(images, kind, severity, 0) if severity else images
        statistics = engine.run(view)
        for name in ("clean", "combined", "mean", "paper", "blend"):
            expected = (route(statistics, bundle.manifest, name).class_id == pictures.labels[seen]).mean()
            if severity == 0:
                assert results.answerer(name).accuracy.clean == pytest.approx(expected, abs=1e-6)
            else:
                assert results.corruptions[kind].accuracy[name][severity - 1] == pytest.approx(expected, abs=1e-6)


def test_headline_is_the_mean_over_corruptions(results: Results) -> None:
    for each in results.answerers:
        cells = [found.accuracy[each.name] for found in results.corruptions.values()]
        assert each.accuracy.corrupted == pytest.approx(np.mean(cells), abs=1e-5)


def test_flips_explain_the_difference_to_the_original(results: Results) -> None:
    original = results.answerer("original")
    for each in results.answerers:
        assert each.negative_flips is not None
        assert each.positive_flips is not None
        assert each.over_original is not None
        for domain in ("clean", "corrupted"):
            gain = getattr(each.accuracy, domain) - getattr(original.accuracy, domain)
            flips = getattr(each.positive_flips, domain) - getattr(each.negative_flips, domain)
            assert gain == pytest.approx(flips, abs=1e-5)
            assert getattr(each.over_original, domain).mean == pytest.approx(gain, abs=1e-5)


def test_bounds_hold(results: Results) -> None:
    bounds, heads = results.bounds, results.model.heads
    for domain in ("clean", "corrupted"):
        best = max(getattr(results.answerer(head).accuracy, domain) for head in heads)
        assert getattr(bounds.oracle, domain) >= getattr(bounds.domain_oracle, domain) - 1e-6
        assert getattr(bounds.domain_oracle, domain) >= best - 1e-6
    zero = results.answerer(bounds.best_head).over_best_head
    assert (zero.clean.mean, zero.corrupted.low, zero.corrupted.high) == (0, 0, 0)


def test_shares_histograms_and_diagrams_are_whole(results: Results) -> None:
    for rule in results.head_share.values():
        for shares in rule.values():
            assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    for found in results.entropy.values():
        assert sum(found.clean) == pytest.approx(1, abs=1e-4)
        assert sum(found.corrupted) == pytest.approx(1, abs=1e-4)
    for diagrams in results.reliability.values():
        assert sum(diagrams.clean.counts) == 30
        assert sum(diagrams.corrupted.counts) == 20 * 75


def test_measures_by_hand() -> None:
    # picture 0 is always right under "a"; "b" is right on picture 1 alone, from severity 3 on
    tally = toy({
        "a": [[True, False]] * 6,
        "b": [[False, False]] * 3 + [[False, True]] * 3,
        "original": [[True, True]] + [[False, True]] * 5,
    })  # fmt: skip
    kinds = [name for name in TEST_CORRUPTIONS if name != TEST_CORRUPTIONS[0]]
    assert evaluate.two(tally, evaluate.right_of("a"), kinds).model_dump() == {"clean": 0.5, "corrupted": 0.5}
    assert evaluate.two(tally, evaluate.right_of("b"), kinds).corrupted == pytest.approx(3 / 10)
    oracle = evaluate.any_right(tally, ["a", "b"])
    assert evaluate.by_severity(tally, oracle, TEST_CORRUPTIONS[0]) == [0.5, 0.5, 1, 1, 1]
    found = evaluate.bounds(tally, ["a", "b"], ["b"], "a", kinds)
    assert found.oracle.corrupted == pytest.approx(0.8)
    assert found.domain_oracle.corrupted == pytest.approx(0.5)
    # mixes: best (0.5 + 0.5) / 2, oracle (0.5 + 0.8) / 2, b (0 + 0.3) / 2
    assert found.captured["b"] == pytest.approx((0.15 - 0.5) / (0.65 - 0.5), abs=1e-4)
    assert found.captured_domain["b"] is None


def test_left_out_corruptions_count_nowhere(tiny_bundle: Path, folder: Path, tmp_path: Path, results: Results) -> None:
    command(tiny_bundle, "--data", folder, "--pictures", 20, "--leave-out", "fog", "snow", "--out", tmp_path)
    found = read_results(tmp_path / "results.json")
    assert found.left_out == ["snow", "fog"]
    assert not found.corruptions["fog"].counted
    for each in found.answerers:
        cells = [c.accuracy[each.name] for kind, c in found.corruptions.items() if kind not in ("fog", "snow")]
        assert each.accuracy.corrupted == pytest.approx(np.mean(cells), abs=1e-5)
    # without --original there is nothing to flip, and the record says why
    assert found.default.negative_flips is None
    assert "--original" in found.model.original
    assert found.answerer("combined").accuracy.clean == results.answerer("combined").accuracy.clean


def test_the_same_call_gives_the_same_numbers(out: Path, tiny_bundle: Path, folder: Path, single_head_bundle: Path,
                                              tmp_path: Path) -> None:  # fmt: skip
    command(*words(tiny_bundle, folder, single_head_bundle, tmp_path))
    first, second = (json.loads((where / "results.json").read_text()) for where in (out, tmp_path))
    for each in (first, second):
        for key in ("cpu_seconds", "wall_seconds", "command"):
            del each[key]
    assert first == second
    assert (out / "results.csv").read_bytes() == (tmp_path / "results.csv").read_bytes()


def test_csv_holds_every_accuracy(out: Path, results: Results) -> None:
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.answerers) * (76 + 1 + len(STYLES))
    for row in rows:
        severity = int(row["severity"])
        expected = results.answerer(row["answerer"]).accuracy.clean
        if row["kind"] in results.shifts:
            expected = results.shifts[row["kind"]].answerers[row["answerer"]].accuracy
        elif severity:
            expected = results.corruptions[row["kind"]].accuracy[row["answerer"]][severity - 1]
        assert float(row["accuracy"]) == expected


def test_a_single_head_is_its_own_original(single_head_bundle: Path, folder: Path, tmp_path: Path) -> None:
    command(single_head_bundle, "--data", folder, "--pictures", 6, "--out", tmp_path)
    found = read_results(tmp_path / "results.json")
    assert [each.role for each in found.answerers] == ["original"]
    assert found.head_share == {}
    assert "this is the original classifier" in (tmp_path / "report.html").read_text()


def test_labels_follow_class_names(folder: Path, tiny_bundle: Path) -> None:
    preprocessing = open_bundle(tiny_bundle).manifest.preprocessing
    pictures = load_pictures(DataSpec(kind="imagefolder", root=folder), "test", preprocessing)
    backwards = labels_for(pictures, CLASSES[::-1])
    assert (backwards == 9 - pictures.labels).all()
    with pytest.raises(ConfigError, match=r"1 of 10 classes are none of the model's 9, .* say 'class 0'"):
        labels_for(pictures, CLASSES[1:])


def test_pictures_are_drawn_by_seed(folder: Path, tiny_bundle: Path) -> None:
    preprocessing = open_bundle(tiny_bundle).manifest.preprocessing
    pictures = load_pictures(DataSpec(kind="imagefolder", root=folder), "test", preprocessing)
    assert choose_pictures(pictures, 12, 1).tolist() == choose_pictures(pictures, 12, 1).tolist()
    assert choose_pictures(pictures, 12, 1).tolist() != choose_pictures(pictures, 12, 2).tolist()
    assert choose_pictures(pictures, None, 1).tolist() == list(range(30))


def test_mistakes_are_one_line(tiny_bundle: Path, folder: Path, tmp_path: Path, build_bundle: Any) -> None:
    twelve = build_bundle(tmp_path / "twelve", classes=12)
    for arguments, error, text in (
        ([tmp_path], ConfigError, "neither a bundle"),
        ([tiny_bundle], ConfigError, "name it with --data"),
        ([tiny_bundle, "--data", tmp_path / "nowhere"], ConfigError, "neither fashion-mnist"),
        ([tiny_bundle, "--data", "digits"], ConfigError, "none of the model's 10, by name or WordNet id, say '0'"),
        ([tiny_bundle, "--data", folder, "--leave-out", "rain"], ConfigError, "no corruption 'rain'"),
        (
            [tiny_bundle, "--data", folder, "--leave-out", *TEST_CORRUPTIONS],
            ConfigError,
            "every corruption is left out",
        ),
        ([tiny_bundle, "--data", folder, "--pictures", 0], ConfigError, "at least 1"),
        ([tiny_bundle, "--data", folder, "--shift", "x"], ConfigError, "NAME=PATH"),
        (
            [tiny_bundle, "--data", folder, "--shift", f"x={folder}", f"x={folder}"],
            ConfigError,
            "two sets of this name",
        ),
        ([tiny_bundle, "--data", folder, "--styles", "--shift", f"sketch={folder}"], ConfigError, "name of a style"),
        ([tiny_bundle, "--data", folder, "--ood", folder], ConfigError, "that is the data under test itself"),
        ([tiny_bundle, "--data", folder, "--original", twelve], ConfigError, "its classes, or their order, are not"),
    ):
        with pytest.raises(error, match=text) as caught:
            command(*arguments)
        assert "\n" not in str(caught.value)


def test_damaged_models_are_refused_by_name(tmp_path: Path) -> None:
    for name, error in (("manifest.json", BundleError), ("checkpoint.json", CheckpointError)):
        root = tmp_path / name.partition(".")[0]
        root.mkdir()
        (root / name).write_text("{")
        with pytest.raises(error, match=name):
            open_subject(str(root))
    with pytest.raises(ConfigError, match="only a bundle runs on Ray"):
        open_subject(str(root), engine="ray")


def test_a_bundle_subject_answers_as_the_engine_does(tiny_bundle: Path, some_pictures: np.ndarray) -> None:
    statistics, original = BundleSubject(str(tiny_bundle)).answer(some_pictures)
    assert original is None
    expected = Engine(open_bundle(tiny_bundle)).run(some_pictures)
    for found, wanted in zip(statistics, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


def test_results_of_another_kind_are_refused(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "results.json"
    document = json.loads((out / "results.json").read_text())
    for change, text in (
        ({"format": "else"}, "not the results"),
        ({"schema_version": 99}, "schema version 99"),
        ({"seed": "x"}, "seed: "),
        ({"more": 1}, "more: "),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(ConfigError, match=text):
            read_results(path)


def test_a_shift_set_is_measured_as_clean_pictures_are(results: Results) -> None:
    # the set holds the very test pictures, so that every figure must come out again
    again = results.shifts["again"]
    assert (again.reader, again.pictures, again.classes, again.counted) == ("class folders", 30, 10, True)
    for each in results.answerers:
        found = again.answerers[each.name]
        assert each.negative_flips is not None
        assert each.over_original is not None
        names = ["accuracy", "ece", "brier", "nll", "accuracy_at_80"]
        if each.role == "original":
            assert (found.negative_flips, found.positive_flips, found.over_original) == (None, None, None)
        else:
            names += ["negative_flips", "positive_flips"]
            assert found.over_original == each.over_original.clean
        for name in names:
            assert getattr(found, name) == pytest.approx(getattr(each, name).clean, abs=1e-6), name


def test_styles_are_asked_of_the_chosen_pictures(results: Results, folder: Path, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    pictures = load_pictures(DataSpec(kind="imagefolder", root=folder), "test", bundle.manifest.preprocessing)
    chosen = choose_pictures(pictures, 20, 0)
    images = pictures.batch(chosen).permute(0, 2, 3, 1).contiguous().numpy()
    for name in STYLES:
        found = results.shifts[name]
        assert (found.reader, found.pictures, found.counted) == ("style", 20, True)
        answers = route(Engine(bundle).run(restyle(images, name, 0)), bundle.manifest, "combined").class_id
        expected = (answers == pictures.labels[chosen]).mean()
        assert found.answerers["combined"].accuracy == pytest.approx(expected, abs=1e-6)


def test_styles_that_training_saw_do_not_count(build_bundle: Any, folder: Path, tmp_path: Path) -> None:
    provenance = {"recipe": {"seed": 5, "shifts": {"augmix": 0.5, "structural": 0.5}}}
    bundle = build_bundle(tmp_path / "bundle", heads=("combined",), provenance=provenance)
    command(bundle, "--data", folder, "--pictures", 4, "--styles", "--out", tmp_path)
    found = read_results(tmp_path / "results.json")
    assert [name for name, shift in found.shifts.items() if not shift.counted] == ["sketch", "inversion"]
    assert found.model.training_seed == 5


def test_scores_against_other_things(results: Results) -> None:
    (name, found), *others = results.ood.items()
    assert (name, others, found.pictures) == ("digits", [], 359)
    heads = [f"{score}, {head}" for head in ("clean", "robust", "combined", "original")
             for score in ("1 - max probability", "predictive entropy")]  # fmt: skip
    dropout = [f"{score}, {head}" for head in results.model.heads for score in ("mutual information", "energy")]
    pairs = [f"divergence, {pair}" for pair in ("clean and robust", "clean and combined", "robust and combined")]
    assert set(found.auroc) == {"1 - max probability", "predictive entropy", *heads, *dropout, *pairs}
    assert all(value is not None and 0 <= value <= 1 for value in found.auroc.values())


def test_the_area_under_the_curve_is_of_other_things_against_clean_ones(
    folder: Path, tiny_bundle: Path, results: Results
) -> None:
    bundle = open_bundle(tiny_bundle)
    scores = []
    for spec in (DataSpec(kind="imagefolder", root=folder), DataSpec(kind="digits")):
        pictures = load_pictures(spec, "test", bundle.manifest.preprocessing)
        images = pictures.batch(range(len(pictures))).permute(0, 2, 3, 1).contiguous().numpy()
        scores.append(Engine(bundle).run(images).mutual_information[:, 1])
    inside, outside = scores
    expected = np.mean([[(b > a) + (b == a) / 2 for a in inside] for b in outside])
    assert results.ood["digits"].auroc["mutual information, robust"] == pytest.approx(expected, abs=2e-3)


def test_imagenet_c_is_told_by_corruption_and_against_the_own_original(
    tiny_bundle: Path, single_head_bundle: Path, folder: Path, some_pictures: np.ndarray, tmp_path: Path
) -> None:
    for kind in ("fog", "speckle_noise"):
        for severity in range(1, 6):
            for i in range(4):
                target = tmp_path / "c" / kind / str(severity) / f"class {i}"
                target.mkdir(parents=True)
                picture = corrupt(some_pictures[i : i + 1], kind, severity, 0)[0]
                Image.fromarray(picture).save(target / f"{i}.png")
    out = tmp_path / "out"
    command(tiny_bundle, "--data", folder, "--original", single_head_bundle, "--pictures", 6, "--out", out,
            "--shift", f"made={tmp_path / 'c'}")  # fmt: skip
    found = read_results(out / "results.json").shifts["made"]
    assert (found.reader, found.pictures, found.severities) == ("imagenet-c", 40, [1, 2, 3, 4, 5])
    # speckle noise is one of the benchmark's four for validation: shown, never counted
    assert {kind: each.counted for kind, each in found.corruptions.items()} == {"fog": True, "speckle_noise": False}
    for name, figures in found.answerers.items():
        assert figures.accuracy == pytest.approx(np.mean(found.corruptions["fog"].accuracy[name]), abs=1e-5)
    assert found.mce is not None
    assert found.mce.yardstick == "original"
    assert found.mce.values["original"] == 100
    errors = {name: 1 - np.mean(found.corruptions["fog"].accuracy[name]) for name in ("original", "robust")}
    assert found.mce.values["robust"] == pytest.approx(100 * errors["robust"] / errors["original"], abs=1e-3)


def test_alexnets_own_errors_on_the_whole_benchmark_make_100() -> None:
    def corrupted(error: float, counted: bool = True) -> Corrupted:
        right = {"combined": [1 - error] * 5, "original": [1 - error / 2] * 5}
        return Corrupted(counted=counted, accuracy=right, oracle=[1.0] * 5)

    whole = {name: corrupted(error) for name, error in ALEXNET.items()}
    found = mean_corruption_error({**whole, "spatter": corrupted(0.3, False)}, "alexnet")
    assert found is not None
    assert found.yardstick == "alexnet"
    assert found.values == pytest.approx({"combined": 100, "original": 50})
    # a part of the benchmark has no yardstick but the original
    del whole["fog"]
    found = mean_corruption_error(whole, "alexnet")
    assert found is not None
    assert found.yardstick == "original"
    assert found.values == pytest.approx({"combined": 200, "original": 100})


def test_versions_of_one_picture_are_one_unit() -> None:
    values, units = np.array([1.0, 0.0, -1.0, 1.0, 1.0, 1.0]), np.array([7, 7, 7, 2, 2, 2])
    assert by_unit(values, units).tolist() == [1.0, 0.0]
    assert by_unit(values, units).mean() == values.mean()
    assert by_unit(values, None) is values


def test_results_of_earlier_releases_are_read(out: Path, tmp_path: Path) -> None:
    document = json.loads((out / "results.json").read_text())
    for added in ("mce", "shifts", "ood"):
        del document[added]
    del document["model"]["training_seed"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    found = read_results(path)
    assert (found.mce, found.shifts, found.ood, found.model.training_seed) == (None, {}, {}, None)

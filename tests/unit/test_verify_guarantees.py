"""Verification of guarantees: what repeated calibrations measure, the page, and the command's mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.unit.test_guarantees_calibrate import HALF, manifest, views

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.guarantees import Guarantees, RouterGuarantees
from trivium.runtime.promises import certified_least, confidence
from trivium.runtime.router import route
from trivium.train.guarantees.calibrate import Settings, conformity, guarantees_of, with_guarantees
from trivium.train.guarantees.page import BEGIN, END, put_figures, render
from trivium.train.guarantees.plots import ticks
from trivium.train.guarantees.pool import Pool, read, write
from trivium.train.guarantees.trials import SPLIT, Trials
from trivium.train.guarantees.verified import Verified, read_verified, write_verified
from trivium.train.guarantees.verify import coverage_row, verify

SETTINGS = Settings(mixture=HALF, accuracy_loss=0.05, negative_flips=0.08)
PICTURES, SPLITS = 1500, 3


@pytest.fixture(scope="module")
def pool() -> Pool:
    found = views(PICTURES, 0)
    assert found.shifted is not None
    kinds = np.where(np.arange(PICTURES) % 2 == 0, "fog", "snow")
    return Pool(found, found.shifted, kinds)


@pytest.fixture(scope="module")
def model() -> Manifest:
    return manifest()


@pytest.fixture(scope="module")
def found(pool: Pool, model: Manifest) -> Verified:
    return verify(model, pool, SETTINGS, command="here", data={"test": PICTURES}, splits=SPLITS, share=0.5)


def test_what_is_measured_is_what_a_server_would_answer(pool: Pool, model: Manifest) -> None:
    trials = Trials(model, pool, SETTINGS, 0.5)
    trials.run(1, seed=3)
    order = np.random.Generator(np.random.Philox([3, 0])).permutation(PICTURES)
    declared, tuning, used = pool.declared, trials.tuning, trials.used
    assert (tuning, used) == (187, 750)
    promised, guard = guarantees_of(
        trials.manifest, declared.take(order[:tuning]), declared.take(order[tuning:used]), SETTINGS
    )
    assert guard is not None
    whole, test = with_guarantees(trials.manifest, promised, guard), declared.take(order[used:])
    for router in ("combined", "guard", "mean"):
        own, routed = promised.routers[router], route(test.statistics, whole, router)
        wrong = routed.class_id != test.labels
        sets = conformity(routed, SETTINGS, "lac") <= own.lac[promised.coverages.index(0.9)]
        held = sets[np.arange(len(wrong)), test.labels]
        assert trials.record.mean("coverage", router, "lac", 0.9) == pytest.approx(held.mean())
        assert trials.record.mean("size", router, "lac", 0.9) == pytest.approx(sets.sum(1).mean())
        least = certified_least(promised, own, 0.3)
        assert least is not None
        answered = confidence(routed, test.statistics, whole, own.confidence) >= least
        assert trials.record.mean(SPLIT, router, 0.3, "answered") == pytest.approx(answered.mean())
        assert trials.record.mean(SPLIT, router, 0.3, "risk") == pytest.approx(wrong[answered].mean())


def test_a_verification_finds_calibrated_promises_kept(found: Verified) -> None:
    row = found.row("combined", "lac", 0.9)
    assert row.low <= row.mean <= row.high
    assert abs(row.mean - 0.9) < 0.04
    assert 1 <= row.size <= 4
    assert found.tuning + found.calibration + found.test == PICTURES
    assert {"clean", "robust", "combined", "guard"} <= found.routers.keys()
    assert found.harm is not None
    assert found.harm.negative_flips <= found.harm.base_negative_flips
    assert 0 < found.removed.declared <= 1
    asked = {(row.router, row.calibrated_on, row.asked_about) for row in found.conditions}
    assert ("clean", "clean", "unseen") in asked
    assert len(asked) == 16


def test_a_promise_that_is_not_kept_shows(pool: Pool, model: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*arguments: object) -> tuple[Guarantees, None]:
        honest, _ = guarantees_of(*arguments)  # type: ignore[arg-type]
        rows = {
            name: RouterGuarantees(
                lac=[0.0] * len(own.lac), raps=own.raps, confidence=own.confidence, least=[-1e9] * len(own.least)
            )
            for name, own in honest.routers.items()
        }
        return honest.model_copy(update={"routers": rows}), None

    monkeypatch.setattr("trivium.train.guarantees.trials.guarantees_of", careless)
    found = verify(model, pool, SETTINGS, command="here", data={"test": PICTURES}, splits=2, share=0.5)
    assert found.row("combined", "lac", 0.95).kept == 0
    assert found.worst() == (1, 1)
    assert found.harm is None


def test_a_test_part_just_below_the_promise_still_counts_as_kept() -> None:
    row = coverage_row(np.array([0.885, 0.879, 0.93, 0.9]), np.ones(4), 0.9)
    assert row.kept == 0.75


def test_the_pool_is_read_back_only_for_the_same_question(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "pool.npz"
    assert read(path, "one") is None
    write(path, "one", pool)
    again = read(path, "one")
    assert again is not None
    for mine, theirs in zip(pool.unseen, again.unseen, strict=True):
        assert np.array_equal(mine, theirs)
    assert isinstance(again.declared.clean, HeadStatistics)
    assert np.array_equal(again.declared.labels, pool.declared.labels)
    assert read(path, "two") is None
    path.write_bytes(path.read_bytes()[:1000])
    assert read(path, "one") is None


def test_too_few_pictures_are_refused_with_the_number_needed(pool: Pool, model: Manifest) -> None:
    small = Pool(
        pool.declared.take(slice(100)), HeadStatistics(*(c[:100] for c in pool.unseen)), pool.unseen_kind[:100]
    )
    with pytest.raises(ConfigError, match="needs 99 calibration pictures"):
        Trials(model, small, SETTINGS, 0.5)
    with pytest.raises(ConfigError, match="leaves none to test on"):
        Trials(model, pool, SETTINGS, 0.9999)


def test_the_page_and_the_figures_are_made_of_what_was_found(found: Verified, tmp_path: Path) -> None:
    write_verified(found, tmp_path / "found.json")
    again = read_verified(tmp_path / "found.json")
    assert again == found
    html = render(again)
    assert html.count('<svg class="plot"') == 5
    assert f"{100 * found.row('combined', 'lac', 0.9).mean:.2f}" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    page = tmp_path / "PAGE.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    put_figures(page, found)
    once = page.read_text()
    put_figures(page, found)
    assert page.read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert once.count(f"### {found.model}") == 1
    assert "Shaded: 95 % of the splits.\n\n" in once
    assert (tmp_path / f"PAGE-{found.model}.svg").read_text().startswith("<svg xmlns=")
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="no part between"):
        put_figures(page, found)
    (tmp_path / "found.json").write_text("{}")
    with pytest.raises(ConfigError, match="not what trivium verify-guarantees writes"):
        read_verified(tmp_path / "found.json")


def test_ticks_lie_within_the_axis() -> None:
    for low, high in ((0.8, 1.0), (0.0, 0.16), (0.78, 1.0), (0.0, 24.0)):
        values = ticks(low, high)
        assert 3 <= len(values) <= 8
        assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)

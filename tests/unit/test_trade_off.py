"""The trade-off study: its figures from what was measured, and the whole of it on scikit-learn's digits."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from trivium.train.evaluation.metrics import Interval
from trivium.train.studies import trade_off
from trivium.train.studies.trade_off import Measured, document, show_table


def measured(gate: float, low: float) -> Measured:
    accuracy = {
        "clean head": {"clean": 0.9, "attacked": 0.4, "mixture": 0.65, "own attack": 0.0},
        "robust head": {"clean": 0.8, "attacked": 0.7, "mixture": 0.75, "own attack": 0.5},
        "gate": {"clean": 0.9, "attacked": 2 * gate - 0.9, "mixture": gate, "own attack": 0.4},
        "oracle": {"clean": 0.95, "attacked": 0.75, "mixture": 0.85},
    }
    over = Interval(gate - 0.75, low, 0.1)
    return Measured(accuracy, over, Interval(0.0, -0.01, 0.01), Interval(-0.01, -0.02, 0.0), 0.1)


FOUND = [measured(0.78, 0.01), measured(0.77, -0.01), measured(0.79, 0.02)]


def test_figures_are_means_over_seeds_and_shares_of_each_seeds_gap() -> None:
    found = json.loads(json.dumps(document([0, 1, 2], FOUND)))
    assert found["share_of_gap"]["mean"] == pytest.approx(0.3)
    assert found["share_of_gap"]["deviation"] == pytest.approx(0.1)
    assert found["rows"]["gate"]["mixture"]["values"] == [0.78, 0.77, 0.79]
    assert set(found["rows"]["oracle"]) == {"clean", "attacked", "mixture"}
    assert found["differences"]["gate_over_head"]["mean"] == pytest.approx(0.03)
    assert [interval[1] for interval in found["differences"]["gate_over_head"]["intervals"]] == [0.01, -0.01, 0.02]


def test_the_table_says_in_how_many_seeds_a_gain_is_sure() -> None:
    console = Console(file=io.StringIO(), width=200)
    show_table(FOUND, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "gate over the better head: +3.0 ± 1.0 points, above 0 with its 95 % interval in 2 of 3 seeds" in text
    assert "gate over the better ensemble: +0.0 ± 0.0 points, above 0 with its 95 % interval in 0 of 3 seeds" in text
    assert "share of the gap between the best head and the oracle: 30.0 ± 10.0 %" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_study_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    schedule = {"epochs": 2, "batch": 64, "lr": 5e-3}
    model = {"model": "trivium_resnet10_tiny", "schedule": schedule}
    size = {"height": 16, "width": 16, "resize": 16}
    data = {"kind": "digits", "limit": {"train": 256, "calibration": 60, "test": 80}}
    monkeypatch.setattr(trade_off, "MODEL", {"threads": 1, "data": data, "input": size, "original": model})
    adversarial = {"attack": {"eps": 0.1, "steps": 2}, "schedule": schedule, "held_out": 20}
    monkeypatch.setattr(trade_off, "ROBUST", {**trade_off.ROBUST, "adversarial": adversarial})
    monkeypatch.setattr(trade_off, "STUDENT", {"student": {"schedule": schedule | {"epochs": 1}}})
    monkeypatch.setattr(trade_off, "STEPS", 3)
    monkeypatch.setattr(trade_off, "ADAPTIVE_STEPS", 5)
    results = tmp_path / "found.json"
    words = ["trade_off", "--out", str(tmp_path), "--calibration-pictures", "60", "--pictures", "80",
             "--attack-pictures", "10", "--results", str(results)]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    trade_off.main()
    rows = json.loads(results.read_text())["rows"]
    assert set(trade_off.WHITE_BOX) | {"oracle", *trade_off.ENSEMBLES} <= set(rows)
    for seed in range(3):
        alone = [rows[name]["mixture"]["values"][seed] for name in ("clean head", "robust head")]
        for name in ("gate", "min_entropy"):
            assert rows[name]["mixture"]["values"][seed] <= rows["oracle"]["mixture"]["values"][seed]
        assert max(alone) <= rows["oracle"]["mixture"]["values"][seed] <= 1
    for name in trade_off.WHITE_BOX:
        assert rows[name]["own attack"]["mean"] <= rows[name]["clean"]["mean"] + 0.2
    assert "share of the gap" in capsys.readouterr().out
